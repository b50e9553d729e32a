"""A tiny analytic policy that needs no download: what `genpolicy check` and the tests train in
milliseconds.

The base draws 2 x 4 x 4 latents from N(0, I): the exact output for that density, plus a small
network that starts near zero and learns the rest. Prompts are bags of words with fixed
vectors; pictures are a fixed linear map of its latents.
"""

from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from genpolicy.chain import Linear, Prediction, VariancePreserving
from genpolicy.chain.schedule import Schedule
from genpolicy.chain.values import Parametrisation, expand
from genpolicy.config.errors import at_least
from genpolicy.config.schema import ChainConfig
from genpolicy.contracts.task import Context
from genpolicy.models import _head

WEIGHTS = "toy.safetensors"
HEAD = "prediction_type"
"""Key of the file's metadata."""
LEVELS = 1000
"""T of the variance-preserving table."""
WORD = 8
"""Length of a word's vector."""
MIX = ((0.2, 0.0), (0.0, 0.2), (0.1, 0.1))
"""Red, green and blue of a pixel, as weights of the two latent channels, around grey."""


@dataclass(eq=False)
class Toy:
    """A network of two layers on 2 x 4 x 4 latents as a `genpolicy.contracts.model.Model`; pictures
    are 3 x 8 x 8.

    pretrained: folder of a saved one; None draws the weights from ``seed``.
    family: "flow" (linear schedule) or "vp" (variance preserving with 1000 levels).
    prediction_type: meaning of the network's output; None: what the saved one says, and of a new
        one velocity (flow) or epsilon (vp).
    hidden: width of the network.
    frames: if set, samples are videos of so many frames.
    train: "full", the only way it learns.
    device: where it computes.
    """

    pretrained: str | None = None
    family: Literal["flow", "vp"] = "flow"
    prediction_type: Parametrisation | None = None
    hidden: int = 32
    seed: int = 0
    frames: int | None = None
    train: Literal["full"] = "full"
    device: str = "cpu"

    acts: ClassVar[bool] = False
    learns_from: ClassVar[float] = 0.0
    draws: ClassVar[int] = 0

    def __post_init__(self) -> None:
        at_least("model toy", self, hidden=1, frames=1)
        self.device = torch.device(self.device)
        self.precision: Literal["fp32", "bf16", "fp16"] = "fp32"
        self.clip: tuple[float, bool] | None = None
        self.evaluations = 0.0
        self.event_shape: tuple[int, ...] = (
            (2, 4, 4) if self.frames is None else (2, self.frames, 4, 4)
        )
        flow = self.family == "flow"
        self.parametrisation: Parametrisation = self._head()
        levels = (1 - torch.linspace(1e-4, 0.02, LEVELS, dtype=torch.float64)).cumprod(0)
        self.schedule: Schedule = Linear() if flow else VariancePreserving(levels)
        size = int(np.prod(self.event_shape))
        self.network = torch.nn.Sequential(
            torch.nn.Linear(size + 2 + WORD, self.hidden),
            torch.nn.Tanh(),
            torch.nn.Linear(self.hidden, size),
        )
        self._weigh()

    def _file(self) -> Path:
        file = Path(self.pretrained or "") / WEIGHTS
        if not file.is_file():
            raise FileNotFoundError(
                f"policy.pretrained {self.pretrained} is no saved toy: it has no {WEIGHTS}"
            )
        return file

    def _head(self) -> Parametrisation:
        flow = self.family == "flow"
        own: Parametrisation = "velocity" if flow else "epsilon"
        if self.pretrained is not None:
            with safe_open(self._file(), "pt") as file:
                own = (file.metadata() or {}).get(HEAD, own)
            _head.tell(self.prediction_type, own)
        valid = _head.FLOW if flow else _head.VARIANCE_PRESERVING
        return _head.choose(self.prediction_type, own, valid, f"a toy of family {self.family}")

    def _weigh(self) -> None:
        if self.pretrained is not None:
            self.network.load_state_dict(load_file(self._file()))
            self.network.to(self.device)
            return
        generator = torch.Generator().manual_seed(self.seed)
        for layer, scale in ((self.network[0], 1.0), (self.network[2], 0.1)):
            for parameter in layer.parameters():
                bound = scale / layer.in_features**0.5  # type: ignore[operator]
                parameter.data.uniform_(-bound, bound, generator=generator)
        self.network.to(self.device)

    def grid(self, steps: int, start: float | None = None) -> Tensor:
        """The schedule's own K+1 noise times, from ``start`` (None: the noisiest) to 0."""
        return self.schedule.grid(steps, start)

    def native_grid(self, steps: int) -> Tensor:
        """The same as `grid`: no other library samples it."""
        return self.grid(steps)

    def encode(self, context: Context) -> Tensor:
        """[B,WORD]: the mean of the words' vectors, zeros for an empty prompt."""
        return torch.stack([_meaning(prompt) for prompt in context.prompts]).to(self.device)

    def negative(self, condition: Tensor) -> Tensor:
        """The empty prompt's zeros."""
        return torch.zeros_like(condition)

    def denoise(self, x: Tensor, t: Tensor, condition: Tensor) -> Prediction:
        """The exact output for x0 ~ N(0, I) plus the network's. x [B,*E], t [B]."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        known = {  # cov(output, x)
            "epsilon": sigma,
            "sample": alpha,
            "velocity": sigma - alpha,
            "v_prediction": torch.zeros_like(alpha),  # alpha eps - sigma x0 does not covary with x
        }[self.parametrisation]
        times = torch.stack([t, t**2], -1).to(x).expand(len(x), 2)
        learned = self.network(torch.cat([x.flatten(1), times, condition], -1)).view_as(x)
        output = expand(known / (alpha**2 + sigma**2), x) * x + learned
        self.evaluations += len(x) * (2 if output.requires_grad else 1)
        return Prediction.of(self.parametrisation, output, x, alpha, sigma)

    def times(self, uniform: Tensor) -> Tensor:
        """flow: uniform on (.001, 1]: at 0 there is nothing to learn. vp: one of the levels, all
        alike.
        """
        if self.family == "flow":
            return 1 - 0.999 * uniform
        return ((uniform * LEVELS).floor() + 1) / LEVELS

    def supervised(self, context: Context, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """`encode`, and 0 for every row."""
        return self.encode(context), torch.zeros(len(context), device=self.device)

    def scored(self, value: Tensor) -> Tensor:
        """Every dim counts."""
        return value

    def event_mask(self, pad: Tensor) -> None:
        """Every dim counts in imitation too."""

    def features(self, condition: Tensor) -> Tensor:
        """The prompt's vector."""
        return condition

    def decode(self, x0: Tensor) -> Tensor:
        """Each latent pixel as 2 x 2 pixels, grey plus `MIX` of its channels: [B,(F,)3,8,8] in [0,
        1].
        """
        colours = torch.tensordot(x0, torch.tensor(MIX).to(x0), ([1], [1])).movedim(-1, -3) + 0.5
        return colours.repeat_interleave(2, -1).repeat_interleave(2, -2).clamp(0, 1)

    def event(self, outputs: Tensor) -> Tensor:
        """The inverse of `decode` where that clamped nothing: the latents nearest to the pictures'
        colours.
        """
        outputs = outputs.to(self.device)
        pixels = outputs.unflatten(-1, (4, 2)).unflatten(-3, (4, 2)).mean((-3, -1)) - 0.5
        inverse = torch.linalg.pinv(torch.tensor(MIX, dtype=torch.float64)).to(pixels)
        return torch.tensordot(pixels, inverse, ([-3], [1])).movedim(-1, 1)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The network's parameters."""
        return dict(self.network.named_parameters())

    def save(self, directory: Path, sampler: ChainConfig | None = None) -> None:
        """One safetensors file, whose metadata say the head."""
        save_file(self.network.state_dict(), directory / WEIGHTS, {HEAD: self.parametrisation})


def _meaning(prompt: str) -> Tensor:
    words = [
        np.random.default_rng(list(blake2b(word.encode(), digest_size=8).digest())).standard_normal(
            WORD
        )
        for word in prompt.lower().split()
    ]
    return torch.from_numpy(np.mean(words or [np.zeros(WORD)], 0)).float()

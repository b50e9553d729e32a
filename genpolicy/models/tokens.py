"""Our own small policy of tokens: every dim of a chunk of actions is a bin of the data's range, and
a network says the bins one after another.

    p(chunk | s) = prod_d p(token_d | token_<d, s)

The dims are in the order of time, the dims of one action together. All chance is the chain's first
noise z: u = Phi(z) is uniform, and token d is the inverse distribution function of p at u_d. So a
chunk is a function of noise and of what is seen, x_0 = G(z, s), which is one step of a chain:
best-of-N, learned starts and evaluation work as with any other policy. What is said is the place
inside the bin that u points at, not the bin's centre: then x_0 has a density (that of the loss but
for a constant), two noises are two chunks, between which a critic can choose, and x_0 rises
continuously with each z_d as long as the tokens before stay the same. The error of half a bin, .4 %
of the range, is that of the centre.

What is seen, and the scale of observations and actions, are those of `genpolicy.models.mlp`. A
sample has no gradient with respect to the weights that could be trusted: tokens jump.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from genpolicy.chain import Linear, Prediction
from genpolicy.chain.schedule import Schedule
from genpolicy.chain.values import Parametrisation
from genpolicy.config.errors import at_least
from genpolicy.config.parse import decode
from genpolicy.config.schema import ChainConfig
from genpolicy.contracts.dataset import Dataset
from genpolicy.contracts.task import Context
from genpolicy.models import _mlp_files
from genpolicy.models._bins import Bins, one_step, uniform
from genpolicy.models._mlp_condition import Sight, chosen, width
from genpolicy.models._mlp_scaling import Scaling
from genpolicy.models._token_networks import Autoregressive

KIND = "tokens"
"""The name of its files."""
PREFIXES = ("network.", "eyes.")
"""The beginnings of the names of saved weights; the names of statistics begin otherwise."""


@dataclass(eq=False)
class Tokens:
    """An autoregressive network as a `genpolicy.contracts.model.TokenModel`.

    pretrained: folder of a saved one, whose settings then replace the ones here; None draws weights
        from torch's global generator in `initialise`.
    history: observation frames it sees.
    chunk: T actions per event, all executed.
    bins: of each dim, uniform over the data's range; 128 in PA-RL (arXiv 2412.06685).
    hidden: width of the network; at 128 a chunk of 16 tokens is sampled in the time of ten steps of
        the default mlp, and an update takes four times as long as one of that.
    blocks: residual blocks of the network.
    inputs: the observations it sees, as those of an mlp; None: every one of the data set.
    train: "full", the only way it learns.
    device: where it computes.
    shapes, action_dim: of what it sees and does; not to be set.
    """

    pretrained: str | None = None
    history: int = 1
    chunk: int = 4
    bins: int = 128
    hidden: int = 128
    blocks: int = 2
    inputs: list[str] | None = None
    train: Literal["full"] = "full"
    device: str = "cpu"
    shapes: dict[str, tuple[int, ...]] = field(init=False, default_factory=dict)
    action_dim: int = field(init=False, default=0)

    acts: ClassVar[bool] = True
    learns_from: ClassVar[float] = 0.0
    draws: ClassVar[int] = 0

    def __post_init__(self) -> None:
        self.device = torch.device(self.device)
        self.precision: Literal["fp32", "bf16", "fp16"] = "fp32"
        self.evaluations = 0.0
        self.schedule: Schedule = Linear()
        self.parametrisation: Parametrisation = "sample"
        self.clip: tuple[float, bool] | None = None
        if self.pretrained is not None:
            self._load(Path(self.pretrained))
        self._settle()

    # Shapes, weights and statistics

    def _settle(self) -> None:
        """Checks the settings and sets what follows from them alone."""
        at_least("policy tokens", self, history=1, chunk=1, bins=2, hidden=1, blocks=1)
        self._bins = Bins(self.bins)
        self.executed = self.chunk
        self.horizon = range(self.chunk)

    def initialise(self, dataset: Dataset) -> None:
        """Fresh weights for the data set's shapes, and its statistics: mean and std of what is
        seen, range of actions.
        """
        names = chosen(self.inputs, dataset)
        shapes = {name: tuple(dataset.shapes[name]) for name in names}
        self._build(shapes, *dataset.shapes["action"], Scaling.fit(dataset, names, self.device))

    def _build(self, shapes: dict[str, tuple[int, ...]], action_dim: int, scaling: Scaling) -> None:
        self.shapes = shapes
        self.action_dim = action_dim
        self.event_shape: tuple[int, ...] = (self.chunk, action_dim)
        condition = width(shapes, self.history)
        dims = math.prod(self.event_shape)
        network = Autoregressive(dims, self.bins, condition, self.hidden, self.blocks)
        self._network = network.to(self.device)
        self._scaling = scaling
        self._sight = Sight(shapes, self.history, scaling, self.device, 0, 0.0, 0.0)

    def _load(self, folder: Path) -> None:
        found = _mlp_files.read(folder, KIND, self.device)
        given = {"pretrained": None, "device": self.device}
        new = decode(type(self), found.settings, str(found.file), given)
        for name in found.settings:
            setattr(self, name, getattr(new, name))
        self._build(found.shapes, found.action_dim, found.scaling(PREFIXES))
        found.restore(self._modules())

    def save(self, directory: Path, sampler: ChainConfig | None = None) -> None:
        """Weights and statistics as safetensors; settings and shapes as json."""
        settings = {k: v for k, v in asdict(self).items() if k not in ("pretrained", "device")}
        _mlp_files.write(directory, KIND, settings, self._modules(), self._scaling)

    def _modules(self) -> dict[str, torch.nn.Module]:
        """The modules whose weights are saved, by the prefix of their names."""
        return dict(zip(PREFIXES, (self._network, self._sight.eyes), strict=True))

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The network's parameters, then the encoders'."""
        eyes = {
            f"eyes.{name}": parameter for name, parameter in self._sight.eyes.named_parameters()
        }
        return {**dict(self._network.named_parameters()), **eyes}

    # The tokens

    def token_losses(self, condition: Tensor, event: Tensor) -> Tensor:
        """-log p(token_d | token_<d, s) of every dim of event [B,T,D], in nats, [B,T,D]."""
        said = self.tokens(event)
        losses = functional.cross_entropy(
            self._network(said, condition).movedim(-1, 1), said, reduction="none"
        )
        self._count(len(event), losses)
        return losses.view_as(event)

    def tokens(self, event: Tensor) -> Tensor:
        """The bins of event [B,T,D], of what lies outside the data's range the nearest: [B,T*D]."""
        return self._bins.tokens(event)

    def denoise(self, x: Tensor, t: Tensor, condition: Tensor) -> Prediction:
        """The chunk that noise x [B,T,D] says, counted as one evaluation: all its tokens are as
        much work as one row of the loss.
        """
        places = self._network.generate(uniform(x), condition)
        output = self._bins.event(places).view_as(x)
        self._count(len(x), output)
        return Prediction.of(
            self.parametrisation, output, x, self.schedule.alpha(t), self.schedule.sigma(t)
        )

    def _count(self, rows: int, output: Tensor) -> None:
        self.evaluations += rows * (2 if output.requires_grad else 1)

    # The chain's view

    def grid(self, steps: int, start: float | None = None) -> Tensor:
        """[1, 0]; `ValueError` for any other chain."""
        return one_step(self.schedule, steps, start)

    def native_grid(self, steps: int) -> Tensor:
        """The same as `grid`: no other library samples it."""
        return self.grid(steps)

    def event_mask(self, pad: Tensor) -> None:
        """Returns None: every action counts; after an episode's end its last one is held."""

    def times(self, uniform: Tensor) -> Tensor:
        """1, where its only step begins."""
        return torch.ones_like(uniform)

    def encode(self, context: Context) -> Tensor:
        """Standardised vectors and encoders' features in the order of ``inputs``, oldest frame
        first in each: [B,C].
        """
        return self._sight.encode(context)

    def observations(self, standard: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of the standardisation, for values in which nothing is clamped."""
        return self._sight.observations(standard)

    def supervised(self, context: Context, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """`encode`, and 0 for every row."""
        return self.encode(context), torch.zeros(len(context), device=self.device)

    def negative(self, condition: Tensor) -> Tensor:
        """Raises: it has no unconditional branch."""
        raise ValueError("policy tokens has no unconditional branch; set chain.guidance to 1")

    def scored(self, value: Tensor) -> Tensor:
        """Every dim counts."""
        return value

    def features(self, condition: Tensor) -> Tensor:
        """The condition, through which no critic's gradient reaches an encoder."""
        return condition.detach()

    def event(self, actions: Tensor) -> Tensor:
        """Actions [B,T,D] scaled so that the data's range is [-1, 1]."""
        return self._scaling.event(actions.to(self.device))

    def decode(self, x0: Tensor) -> Tensor:
        """The inverse of `event`."""
        return self._scaling.actions(x0)

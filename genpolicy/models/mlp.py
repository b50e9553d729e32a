"""Our own small denoiser of action chunks from low-dimensional observations: trained in seconds on one CPU thread.

Observations are standardised by the data set's mean and std, actions scaled to [-1, 1] by its min and max. The event is the
whole chunk [T,D], all of it executed.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from genpolicy.chain import Linear, Prediction, VariancePreserving
from genpolicy.chain.schedule import Schedule
from genpolicy.chain.values import Parametrisation
from genpolicy.models import _mlp_networks as networks
from genpolicy.task import Context, Dataset

WEIGHTS, SETTINGS = "mlp.safetensors", "mlp.json"
LEVELS = 100
"""T of the variance-preserving table, and the scale of time that the network is told."""
STILL = 1e-4
"""An observation dim whose std is below this stood still in the data: it is only shifted."""
STD_FLOOR = 0.01
OUTLIER = 5.0
"""Standardised observations are clamped to this: what the data never came near should not be extrapolated."""
REACH_FLOOR = 1e-3
"""Least half range of an action dim, in the environment's units: one that never moved in the data hardly moves, and
the scaling stays invertible.
"""


@dataclass(eq=False)
class MLP:
    """A small network on vectors as a `genpolicy.policy.ControlModel`.

    pretrained: folder of a saved one, whose settings then replace the ones here; None draws weights from torch's global
    generator in `initialise`.
    history: observation frames it sees. chunk: T actions an event, all executed.
    network: "residual" (everything is one vector) or "unet" (convolutions over the chunk's time axis).
    hidden: width; of a unet four times that of its first level. blocks: residual blocks; of a unet levels.
    inputs: the observations it sees, in this order; None: every vector of the data set, in its order.
    family: "vp" predicts epsilon on a squared-cosine table of `LEVELS` levels, its x0 clipped into the data's range: at
    the noisiest levels it divides by a tiny alpha. "flow" predicts a velocity, and nothing is clipped: its x0 = x - t v
    has no such division, and published flow policies act unclipped.
    train: "full", the only way it learns.
    """

    pretrained: str | None = None
    history: int = 1
    chunk: int = 4
    network: Literal["residual", "unet"] = "residual"
    hidden: int = 256
    blocks: int = 2
    inputs: list[str] | None = None
    family: Literal["vp", "flow"] = "vp"
    train: Literal["full"] = "full"
    device: str = "cpu"
    shapes: dict[str, tuple[int, ...]] = field(init=False, default_factory=dict)
    action_dim: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.device = torch.device(self.device)
        self.precision: Literal["fp32", "bf16", "fp16"] = "fp32"
        self.evaluations = 0.0
        if self.pretrained is not None:
            self._load(Path(self.pretrained))
            return
        self._settle()

    # Shapes, weights and statistics

    def _settle(self) -> None:
        """What follows from the settings alone."""
        for name in ("history", "chunk", "hidden", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"policy.{name} is {getattr(self, name)}; it must be at least 1")
        halvings = 2 ** (self.blocks - 1)
        if self.network == "unet" and self.chunk % halvings:
            raise ValueError(
                f"policy.chunk {self.chunk} can't be halved {self.blocks - 1} times by a unet of {self.blocks} levels;"
                f" choose a multiple of {halvings}"
            )
        if self.network == "unet" and self.hidden % (4 * networks.GROUPS):
            raise ValueError(f"policy.hidden {self.hidden} of a unet must be a multiple of {4 * networks.GROUPS}")
        flow = self.family == "flow"
        self.parametrisation: Parametrisation = "velocity" if flow else "epsilon"
        self.schedule: Schedule = Linear() if flow else VariancePreserving(squared_cosine(LEVELS))
        self.clip: tuple[float, bool] | None = None if flow else (1.0, True)
        self.executed = self.chunk
        self.horizon = range(self.chunk)
        self._levels = networks.embed(torch.arange(LEVELS).double()).float().to(self.device)

    def initialise(self, dataset: Dataset) -> None:
        """Fresh weights for the data set's shapes, and its statistics: mean and std of what is seen, range of actions."""
        vectors = [n for n, shape in dataset.shapes.items() if n.startswith("observation.") and len(shape) == 1]
        names = self.inputs or vectors
        wrong = [name for name in names if name not in vectors]
        if wrong or not names:
            raise ValueError(
                f"policy.inputs: {wrong[0] if wrong else 'the data set'} is no vector observation of the data set;"
                f" it has {', '.join(vectors) or 'none'}"
            )
        self._build({name: tuple(dataset.shapes[name]) for name in names}, *dataset.shapes["action"])
        for name in names:
            mean, std = (dataset.stats[name][statistic].float() for statistic in ("mean", "std"))
            self._stats[f"{name}.mean"] = mean.to(self.device)
            self._stats[f"{name}.std"] = torch.where(std < STILL, 1.0, std.clamp_min(STD_FLOOR)).to(self.device)
        low, high = (dataset.stats["action"][statistic].float() for statistic in ("min", "max"))
        self._stats["action.middle"] = ((high + low) / 2).to(self.device)
        self._stats["action.reach"] = ((high - low) / 2).clamp_min(REACH_FLOOR).to(self.device)

    def _build(self, shapes: dict[str, tuple[int, ...]], action_dim: int) -> None:
        self.shapes, self.action_dim = shapes, action_dim
        self.event_shape: tuple[int, ...] = (self.chunk, action_dim)
        condition = self.history * sum(math.prod(shape) for shape in shapes.values())
        if self.network == "residual":
            network = networks.Residual(self.event_shape, condition, self.hidden, self.blocks)
        else:
            channels = [self.hidden // 4 * 2**level for level in range(self.blocks)]
            network = networks.UNet(self.event_shape, condition, channels)
        self._network = network.to(self.device)
        self._stats: dict[str, Tensor] = {}

    def _load(self, folder: Path) -> None:
        if not (folder / SETTINGS).is_file() or not (folder / WEIGHTS).is_file():
            raise FileNotFoundError(f"policy.pretrained {folder} is no saved mlp: it has no {SETTINGS} and {WEIGHTS}")
        settings = json.loads((folder / SETTINGS).read_text())
        shapes = {name: tuple(shape) for name, shape in settings.pop("shapes").items()}
        action_dim = settings.pop("action_dim")
        for name, value in settings.items():
            setattr(self, name, value)
        self._settle()
        self._build(shapes, action_dim)
        tensors = load_file(folder / WEIGHTS, device=str(self.device))
        weights = {name: value for name, value in tensors.items() if name.startswith("network.")}
        self._network.load_state_dict({name.removeprefix("network."): value for name, value in weights.items()})
        self._stats = {name: value for name, value in tensors.items() if name not in weights}

    def save(self, directory: Path) -> None:
        """Weights and statistics as safetensors; settings and shapes as json."""
        settings = {k: v for k, v in asdict(self).items() if k not in ("pretrained", "device")}
        (directory / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
        weights = {f"network.{name}": value for name, value in self._network.state_dict().items()}
        save_file({**weights, **self._stats}, directory / WEIGHTS)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The network's parameters."""
        return dict(self._network.named_parameters())

    # The chain's view

    def grid(self, steps: int) -> Tensor:
        """The schedule's own K+1 noise times."""
        return self.schedule.grid(steps)

    def event_mask(self, pad: Tensor) -> None:
        """Everything counts: after an episode's end its last action is held."""

    def times(self, uniform: Tensor) -> Tensor:
        """vp: one of the levels, all alike. flow: uniform on (.001, 1]: at 0 there is nothing to learn from x_t = x_0."""
        if self.family == "vp":
            return ((uniform * LEVELS).floor() + 1) / LEVELS
        return 1 - 0.999 * uniform

    def encode(self, context: Context) -> Tensor:
        """Standardised observations, one after the other, oldest frame first in each: [B, history * sum of dims]."""
        parts: list[Tensor] = []
        for name, shape in self.shapes.items():
            seen = context.observation.get(name)
            if seen is None or seen.shape[1:] != (self.history, *shape):
                got = "is missing" if seen is None else f"comes as {list(seen.shape[1:])}"
                raise ValueError(f"observation {name} {got}; this policy needs {[self.history, *shape]} of every row")
            standard = (seen.to(self.device) - self._stats[f"{name}.mean"]) / self._stats[f"{name}.std"]
            parts.append(standard.clamp(-OUTLIER, OUTLIER).flatten(1))
        return torch.cat(parts, -1)

    def negative(self, condition: Tensor) -> Tensor:
        """Raises: it has no unconditional branch."""
        raise ValueError("policy mlp has no unconditional branch; set chain.guidance to 1")

    def denoise(self, x: Tensor, t: Tensor, condition: Tensor) -> Prediction:
        """One network evaluation of x [B,T,D] at t [B], counted."""
        output = self._network(x, self._time(t), condition)
        self.evaluations += len(x) * (2 if output.requires_grad else 1)
        return Prediction.of(self.parametrisation, output, x, self.schedule.alpha(t), self.schedule.sigma(t))

    def _time(self, t: Tensor) -> Tensor:
        """[B,TIME]: the level's row of a table, or LEVELS * t embedded."""
        if self.family == "vp":
            return self._levels[(t * LEVELS).round().long().to(self.device) - 1]
        return networks.embed(t * LEVELS).float().to(self.device)

    def scored(self, value: Tensor) -> Tensor:
        """Every dim counts."""
        return value

    def features(self, condition: Tensor) -> Tensor:
        """The standardised observations."""
        return condition.detach()

    def event(self, actions: Tensor) -> Tensor:
        """Actions [B,T,D] scaled so that the data's range is [-1, 1]."""
        return (actions.to(self.device) - self._stats["action.middle"]) / self._stats["action.reach"]

    def decode(self, x0: Tensor) -> Tensor:
        """The inverse of `event`."""
        return x0 * self._stats["action.reach"] + self._stats["action.middle"]


def squared_cosine(levels: int) -> Tensor:
    """alpha_bar [levels] with 1 - beta_i = f((i+1)/T) / f(i/T), f(u) = cos^2((u + .008)/1.008 pi/2), beta_i at most .999
    (arXiv 2102.09672 eq. 17; diffusers' "squaredcos_cap_v2"). fp64.
    """
    u = torch.linspace(0, 1, levels + 1, dtype=torch.float64)
    f = ((u + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    return (f[1:] / f[:-1]).clamp_min(1 - 0.999).cumprod(0)

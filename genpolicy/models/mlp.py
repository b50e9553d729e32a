"""Our own small denoiser of action chunks: from vectors trained in seconds on one CPU thread, from
pictures or point clouds, through small encoders that learn with it, in minutes.

Observations are standardised by the data set's mean and std, actions scaled to [-1, 1] by its min
and max. The event is the whole chunk [T,D], all of it executed.

The encoders learn where `encode` runs with gradients: in imitation. Everywhere else what was seen
is encoded once and kept, so that they stand still. `encode` draws nothing, with gradients or
without: the same context is the same condition. What imitation may add (moved pictures, a sampled
bottleneck, the encoders' own losses) is in `supervised` alone.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from genpolicy.chain import Linear, Prediction, VariancePreserving
from genpolicy.chain.schedule import Schedule
from genpolicy.chain.values import Parametrisation
from genpolicy.config.parse import decode
from genpolicy.config.schema import ChainConfig
from genpolicy.contracts.dataset import Dataset
from genpolicy.contracts.task import Context
from genpolicy.models import _head, _mlp_files
from genpolicy.models import _mlp_networks as networks
from genpolicy.models._mlp_condition import Sight, chosen, width
from genpolicy.models._mlp_scaling import Scaling

KIND = "mlp"
"""The name of its files."""
PREFIXES = ("network.", "eyes.")
"""The beginnings of the names of saved weights; the names of statistics begin otherwise."""
LEVELS = 100
"""T of the variance-preserving table, and the scale of time that the network is told."""
HEADS: dict[str, tuple[Parametrisation, ...]] = {
    "vp": _head.VARIANCE_PRESERVING,
    "flow": _head.FLOW,
    "gaussian": ("sample",),
}
"""The heads that each family can have; its default is the first."""


@dataclass(eq=False)
class MLP:
    """A small network as a `genpolicy.contracts.model.ControlModel`.

    pretrained: folder of a saved one, whose settings then replace the ones here (all but shift and
        prediction_type); None draws weights from torch's global generator in `initialise`.
    history: observation frames it sees.
    chunk: T actions per event, all executed.
    network: "residual" (everything is one vector) or "unet" (convolutions over the chunk's time
        axis).
    hidden: width; of a unet four times that of its first level.
    blocks: residual blocks; of a unet levels.
    inputs: the observations it sees, in this order; None: every one of the data set, in its order.
        Vectors [q] are taken as they are; pictures [C,H,W] and point clouds [P,3] have an encoder
        each (see `_encoders`).
    family: "vp" denoises along a squared-cosine table of `LEVELS` levels, its x0 clipped into the
        data's range, whatever its head: at the noisiest levels epsilon divides by a tiny alpha, and
        what "sample" says beyond the range of the data, or of a clipped teacher, is an error too.
        "flow" clips nothing: x0 = x - t v has no such division, and published flow policies act
        unclipped. "gaussian" says x0 itself and sees neither x nor t: with chain {steps: 1, kernel:
        {name: floorstd, floor: s, kernel: {name: ddim, eta: 0.0}}, window: [0, 1]} it is the policy
        N(mu(what is seen), s^2), whose mean square is its -log-likelihood. A clip of mu would only
        cut that one's gradient.
    prediction_type: meaning of the network's output (vp: epsilon, sample or v_prediction; flow:
        velocity or sample; gaussian: sample); None: what the saved one says, and of a new one the
        first of these. With another head than the saved one's the weights stay as they are, and
        learn to say it.
    train: "full", the only way it learns.
    shift: in imitation, pictures are moved by up to so many pixels, at random.
    bottleneck, reconstruction: weights of the encoders' own losses in imitation, as RL-100 has them
        (.001 and .5); 0 is without.
    device: where it lives.
    """

    pretrained: str | None = None
    history: int = 1
    chunk: int = 4
    network: Literal["residual", "unet"] = "residual"
    hidden: int = 256
    blocks: int = 2
    inputs: list[str] | None = None
    family: Literal["vp", "flow", "gaussian"] = "vp"
    prediction_type: Parametrisation | None = None
    train: Literal["full"] = "full"
    shift: int = 0
    bottleneck: float = 0.0
    reconstruction: float = 0.0
    device: str = "cpu"
    shapes: dict[str, tuple[int, ...]] = field(init=False, default_factory=dict)
    action_dim: int = field(init=False, default=0)

    acts: ClassVar[bool] = True
    learns_from: ClassVar[float] = 0.0

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
        """Checks the settings and sets everything that follows from them alone."""
        for name in ("history", "chunk", "hidden", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"policy.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("shift", "bottleneck", "reconstruction"):
            if getattr(self, name) < 0:
                raise ValueError(f"policy.{name} is {getattr(self, name)}; it must be at least 0")
        halvings = 2 ** (self.blocks - 1)
        if self.network == "unet" and self.chunk % halvings:
            raise ValueError(
                f"policy.chunk {self.chunk} can't be halved {self.blocks - 1} times by a unet of"
                f" {self.blocks} levels; choose a multiple of {halvings}"
            )
        if self.network == "unet" and self.hidden % (4 * networks.GROUPS):
            raise ValueError(
                f"policy.hidden {self.hidden} of a unet must be a multiple of {4 * networks.GROUPS}"
            )
        valid = HEADS[self.family]
        self.parametrisation: Parametrisation = _head.choose(
            self.prediction_type, valid[0], valid, f"an mlp of family {self.family}"
        )
        vp = self.family == "vp"
        self.schedule: Schedule = VariancePreserving(squared_cosine(LEVELS)) if vp else Linear()
        self.clip: tuple[float, bool] | None = (1.0, True) if vp else None
        self.executed = self.chunk
        self.horizon = range(self.chunk)
        self._levels = networks.embed(torch.arange(LEVELS).double()).float().to(self.device)

    def initialise(self, dataset: Dataset) -> None:
        """Fresh weights for the data set's shapes, and its statistics: mean and std of what is
        seen, range of actions.
        """
        names = chosen(self.inputs, dataset)
        self._build(
            {name: tuple(dataset.shapes[name]) for name in names},
            *dataset.shapes["action"],
            Scaling.fit(dataset, names, self.device),
        )

    def _build(self, shapes: dict[str, tuple[int, ...]], action_dim: int, scaling: Scaling) -> None:
        self.shapes = shapes
        self.action_dim = action_dim
        self.event_shape: tuple[int, ...] = (self.chunk, action_dim)
        condition = width(shapes, self.history)
        if self.network == "residual":
            network = networks.Residual(self.event_shape, condition, self.hidden, self.blocks)
        else:
            channels = [self.hidden // 4 * 2**level for level in range(self.blocks)]
            network = networks.UNet(self.event_shape, condition, channels)
        self._network = network.to(self.device)
        self._scaling = scaling
        self._sight = Sight(
            shapes,
            self.history,
            scaling,
            self.device,
            self.shift,
            self.bottleneck,
            self.reconstruction,
        )

    def _load(self, folder: Path) -> None:
        found = _mlp_files.read(folder, KIND, self.device)
        # its settings are checked as a new one's are
        given = {"pretrained": None, "device": self.device}
        new = decode(type(self), found.settings, str(found.file), given)
        # shift is of this run's imitation, not of the network
        for name in found.settings.keys() - {"shift", "prediction_type"}:
            setattr(self, name, getattr(new, name))
        # policies saved before the head was a setting have none
        _head.tell(self.prediction_type, new.prediction_type or HEADS[self.family][0])
        self.prediction_type = self.prediction_type or new.prediction_type
        self._settle()
        self._build(found.shapes, found.action_dim, found.scaling(PREFIXES))
        found.restore(self._modules())

    def save(self, directory: Path, sampler: ChainConfig | None = None) -> None:
        """Weights and statistics as safetensors; settings and shapes as json."""
        settings = {k: v for k, v in asdict(self).items() if k not in ("pretrained", "device")}
        settings["prediction_type"] = self.parametrisation
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

    # The chain's view

    def grid(self, steps: int, start: float | None = None) -> Tensor:
        """The schedule's own K+1 noise times, from ``start`` (None: the noisiest) to 0."""
        return self.schedule.grid(steps, start)

    def native_grid(self, steps: int) -> Tensor:
        """The same as `grid`: no other library samples it."""
        return self.grid(steps)

    def event_mask(self, pad: Tensor) -> None:
        """Returns None: every action counts; after an episode's end its last one is held."""

    def times(self, uniform: Tensor) -> Tensor:
        """vp: one of the levels, all alike. flow: uniform on (.001, 1]: at 0 there is nothing to
        learn from x_t = x_0. gaussian: 1, where its only step begins.
        """
        if self.family == "vp":
            return ((uniform * LEVELS).floor() + 1) / LEVELS
        if self.family == "gaussian":
            return torch.ones_like(uniform)
        return 1 - 0.999 * uniform

    def encode(self, context: Context) -> Tensor:
        """Standardised vectors and encoders' features in the order of ``inputs``, oldest frame
        first in each: [B,C].

        Nothing is random here.
        """
        return self._sight.encode(context)

    def observations(self, standard: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of the standardisation, for values in which nothing is clamped."""
        return self._sight.observations(standard)

    @property
    def draws(self) -> int:
        """The count of uniform numbers that `supervised` takes per row."""
        return self._sight.draws

    def supervised(self, context: Context, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """The condition [B,C] to imitate from, and what the encoders' own losses add to each row's
        loss, [B].

        uniform [B,`draws`] in [0,1): where each row's pictures are moved to (all frames of a camera
        alike), and what its bottlenecks draw. Without shift, bottleneck and reconstruction it is
        `encode`, and 0.
        """
        return self._sight.supervised(context, uniform)

    def negative(self, condition: Tensor) -> Tensor:
        """Raises: it has no unconditional branch."""
        raise ValueError("policy mlp has no unconditional branch; set chain.guidance to 1")

    def denoise(self, x: Tensor, t: Tensor, condition: Tensor) -> Prediction:
        """One network evaluation of x [B,T,D] at t [B], counted."""
        seen, when = (
            (torch.zeros_like(x), torch.ones_like(t)) if self.family == "gaussian" else (x, t)
        )
        output = self._network(seen, self._time(when), condition)
        self.evaluations += len(x) * (2 if output.requires_grad else 1)
        return Prediction.of(
            self.parametrisation, output, x, self.schedule.alpha(t), self.schedule.sigma(t)
        )

    def _time(self, t: Tensor) -> Tensor:
        """[B,TIME]: the level's row of a table, or LEVELS * t embedded."""
        if self.family == "vp":
            return self._levels[(t * LEVELS).round().long().to(self.device) - 1]
        return networks.embed(t * LEVELS).float().to(self.device)

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


def squared_cosine(levels: int) -> Tensor:
    """alpha_bar [levels] with 1 - beta_i = f((i+1)/T) / f(i/T), f(u) = cos^2((u + .008)/1.008
    pi/2), beta_i at most .999 (arXiv 2102.09672 eq. 17; diffusers' "squaredcos_cap_v2"). fp64.
    """
    u = torch.linspace(0, 1, levels + 1, dtype=torch.float64)
    f = ((u + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    return (f[1:] / f[:-1]).clamp_min(1 - 0.999).cumprod(0)

"""diffusers' schedulers read as our schedules.

What stands in for one while the pipeline's loop runs for a single network evaluation, which of them
are Markov chains that can be scored, and their tables and times as ours.
"""

import inspect
import logging
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
import torch
from torch import Tensor

from genpolicy.chain import Linear, VariancePreserving
from genpolicy.chain.schedule import Schedule
from genpolicy.chain.values import Parametrisation
from genpolicy.models._head import VARIANCE_PRESERVING

log = logging.getLogger(__name__)

MARKOV = (
    "DDIMScheduler",
    "DDPMScheduler",
    "CogVideoXDDIMScheduler",
    "LCMScheduler",
    "FlowMatchEulerDiscreteScheduler",
)
"""Schedulers whose tables are used as they are: one step needs nothing but its own network
evaluation.
"""

EDGE = 1e-6
"""Uniform numbers are kept so far from 0 and 1 before they are made normal ones."""

Asked = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments that a pipeline passed to its scheduler's ``set_timesteps``."""


class OneStep:
    """Stands where a pipeline's scheduler stood: shows its loop ``timesteps`` and keeps the
    network's output.

    ``timesteps`` [] runs the loop not at all (dry calls, encoding, decoding), [1] once at one time,
    [1,B] once with a time per row (the loop's ``t`` is then [B]).
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, inner: Any, timesteps: Tensor) -> None:
        self._inner = inner
        self.config = inner.config
        self.timesteps = timesteps
        self.asked: Asked = ((), {})
        self.output: Tensor | None = None

        def set_timesteps(*args: Any, **kwargs: Any) -> None:
            self.asked = (args, kwargs)

        set_timesteps.__signature__ = _signature(type(inner))  # type: ignore[attr-defined]
        self.set_timesteps = set_timesteps

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_inner"], name)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Does nothing: there is only one step to begin at."""

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Flows and variance-preserving models see x_t as it is."""
        return sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep the output, and hand it back as the next sample: the pipeline returns it, nobody
        reads it.
        """
        self.output = model_output
        return model_output, model_output


@cache
def _signature(kind: type) -> inspect.Signature:
    """The signature in which diffusers' retrieve_timesteps looks for ``sigmas``."""
    return inspect.signature(kind.set_timesteps)  # type: ignore[attr-defined]


def markov(scheduler: Any) -> Any:
    """The scheduler itself if it is one of `MARKOV`, else the one of its family, with one logged
    line.

    Multistep solvers keep a history: their steps are no transition of x_t alone. Euler's are DDIM's
    anyway.
    """
    name = type(scheduler).__name__
    config = scheduler.config
    if config.get("thresholding"):
        raise ValueError(
            f"scheduler {name}: dynamic thresholding can't be scored; set thresholding false in its"
            " config"
        )
    if config.get("invert_sigmas"):
        raise ValueError(
            f"scheduler {name}: inverted sigmas (Mochi) are not supported; use another pipeline"
        )
    if name in MARKOV:
        return scheduler
    flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    if flow or name.startswith("FlowMatch"):
        shift = config.get("flow_shift", config.get("shift", 1.0))
        chosen = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config, shift=shift)
    elif name.startswith("CogVideoX"):
        chosen = diffusers.CogVideoXDDIMScheduler.from_config(config)
    elif config.get("beta_schedule") is not None:
        # DDIM clips by default, and the schedulers that it replaces here do not
        chosen = diffusers.DDIMScheduler.from_config(
            config, clip_sample=config.get("clip_sample", False)
        )
    else:
        raise ValueError(
            f"scheduler {name} is neither a flow nor variance preserving; valid are"
            f" {', '.join(MARKOV)}"
        )
    log.warning(
        "the steps of scheduler %s can't be scored; %s takes its place", name, type(chosen).__name__
    )
    return chosen


@dataclass(frozen=True)
class Times:
    """A Markov scheduler's times as ours.

    mu: what the pipeline passes to ``set_timesteps`` at this resolution ("dynamic" shifting), if
    anything.
    """

    scheduler: Any
    mu: float | None

    @property
    def flow(self) -> bool:
        """True of a flow, false of a variance-preserving family."""
        return not hasattr(self.scheduler, "alphas_cumprod")

    @property
    def levels(self) -> int:
        """num_train_timesteps: what the network calls noise time 1."""
        return self.scheduler.config.num_train_timesteps

    @property
    def parametrisation(self) -> Parametrisation:
        """The meaning of the network's output."""
        return "velocity" if self.flow else self.scheduler.config.prediction_type

    @property
    def heads(self) -> tuple[Parametrisation, ...]:
        """The heads that the scheduler can read. Where its table reaches alpha 0 (zero terminal
        SNR), epsilon says nothing of x0.
        """
        if self.flow:
            return ("velocity",)
        ends = float(self.scheduler.alphas_cumprod[-1]) == 0.0
        return tuple(head for head in VARIANCE_PRESERVING if head != "epsilon" or not ends)

    @property
    def clip(self) -> tuple[float, bool] | None:
        """(bound, whether eps is recomputed from the clipped x0), where the scheduler clips x0,
        which it does whatever the head.

        CogVideoX's never does, whatever its config says.
        """
        name = type(self.scheduler).__name__
        config = self.scheduler.config
        if name not in ("DDIMScheduler", "DDPMScheduler", "LCMScheduler") or not config.clip_sample:
            return None
        return config.clip_sample_range, name == "DDPMScheduler"

    def schedule(self) -> Schedule:
        """Linear with the family's shift at this resolution, or the table of alpha bars."""
        if self.flow:
            return Linear(self._shift())
        final = float(getattr(self.scheduler, "final_alpha_cumprod", 1.0))
        return VariancePreserving(self.scheduler.alphas_cumprod.double(), final)

    def _shift(self) -> float:
        config = self.scheduler.config
        if config.use_dynamic_shifting and self.mu is not None:
            return math.exp(self.mu) if config.time_shift_type == "exponential" else self.mu
        return self.scheduler.shift

    def network_time(self, t: Tensor) -> Tensor:
        """t [B] as the network is told it: fp32 t T for flows, else int64 levels round(t T) - 1."""
        if self.flow:
            return t.float() * self.levels
        return (t * self.levels).round().long() - 1

    def training(self, uniform: Tensor, lowest: float = 0.0) -> Tensor:
        """Noise times to train at from uniform numbers [B] in [0,1).

        Flows: SD3's logit-normal density (arXiv 2403.03206; mean 0, std 1, diffusers' default in
        training), t = sigmoid(z), z standard normal, and then the scheduler's shift at this
        resolution; given that t is at least ``lowest``. Others: one of the levels, all alike.
        """
        if not self.flow:
            return ((uniform * self.levels).floor() + 1) / self.levels
        shift, bound = self._shift(), torch.tensor(lowest, dtype=torch.float64)
        # the share of the density below the bound
        below = torch.special.ndtr((bound / (bound + (1 - bound) * shift)).logit())
        share = below + (1 - below) * uniform.double()
        t = torch.special.ndtri(share.clamp(EDGE, 1 - EDGE)).sigmoid()
        return (t / (t + (1 - t) / shift)).clamp_min(lowest)

    def grid(self, steps: int, start: float | None = None) -> Tensor:
        """K+1 noise times from ``start`` (None: the noisiest) to 0.

        Flows: K real steps with the family's shift, stretched so that the last begins at
        ``shift_terminal`` (LTX), where ``start`` is noisier than that. Others: the scheduler's own
        spacing, and from ``start`` the schedule's.
        """
        if not self.flow:
            return (
                self.native(((steps,), {})) if start is None else self.schedule().grid(steps, start)
            )
        grid = self.schedule().grid(steps, start)
        terminal = self.scheduler.config.shift_terminal
        if terminal and steps > 1 and terminal < grid[0]:
            inner = grid[0] - grid[:-1]
            stretched = grid[0] - inner * (grid[0] - terminal) / inner[-1]
            grid = torch.cat([stretched, grid[-1:]])
        return grid

    def native(self, asked: Asked) -> Tensor:
        """The scheduler's own K+1 noise times (fp64) for what the pipeline asks of it, ending at
        0: the sigmas of a flow, which its scheduler may have shifted twice (SD3's tenth step of ten
        begins at .0089), the levels of others in their ``timestep_spacing``.
        """
        args, kwargs = asked
        self.scheduler.set_timesteps(*args, **kwargs)
        if self.flow:
            return self.scheduler.sigmas.double().cpu()
        times = (self.scheduler.timesteps.double().cpu() + 1) / self.levels
        return torch.cat([times, times.new_zeros(1)])

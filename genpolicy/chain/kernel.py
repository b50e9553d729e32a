"""Transition kernels: (x_t, prediction, step) -> Gaussian over x_s.

Every kernel is affine in what the network says, so it is four scalars per row (`Coefficients`):

    mean = x * x_t + x0 * prediction.x0 + eps * prediction.eps
    gain = x0 * d_x0 + eps * d_eps = d mean / d output

from which both the transition and its gain follow; sampling and scoring can't disagree.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from genpolicy.chain.schedule import Step
from genpolicy.chain.values import Coefficients


class Kernel(Protocol):
    """One step of a chain, described by its coefficients."""

    def coefficients(self, step: Step) -> Coefficients: ...


def preserving(step: Step, std: Tensor) -> Coefficients:
    """mean = alpha_s x0 + sqrt(max(sigma_s^2 - std^2, 0)) eps: mean and noise together keep
    sigma_s.
    """
    direction = (step.sigma_s**2 - std**2).clamp_min(0).sqrt()
    return Coefficients(torch.zeros_like(std), step.alpha_s, direction, std)


@dataclass(frozen=True)
class DDIM:
    """DDIM (arXiv 2010.02502 eq. 12, 16): std = eta (sigma_s/sigma_t) sqrt(sigma_t^2 -
    (alpha_t/alpha_s)^2 sigma_s^2).

    eta 0 is DDIM, and the Euler ODE step of a flow; eta 1 is DDPM. Keeps the marginals on every
    schedule.
    """

    eta: float = 1.0

    def std(self, step: Step) -> Tensor:
        spread = step.sigma_t**2 - (step.alpha_t / step.alpha_s) ** 2 * step.sigma_s**2
        return self.eta * step.sigma_s / step.sigma_t * spread.clamp_min(0).sqrt()

    def coefficients(self, step: Step) -> Coefficients:
        return preserving(step, self.std(step))


@dataclass(frozen=True)
class CPS:
    """Coefficients-preserving sampling: std = sigma_s sin(a pi/2) (flow_grpo
    sd3_sde_with_logprob.py, sde_type='cps').

    The coefficients of x0 and noise stay on the schedule; the marginals do not (the samples are too
    narrow however many steps are taken).
    """

    a: float = 0.8

    def std(self, step: Step) -> Tensor:
        return step.sigma_s * math.sin(self.a * math.pi / 2)

    def coefficients(self, step: Step) -> Coefficients:
        return preserving(step, self.std(step))


@dataclass(frozen=True)
class SDE:
    """The reverse SDE of a linear schedule by Euler-Maruyama (Flow-GRPO, DanceGRPO).

    With v = eps - x0 and dt = s - t < 0, where x + (1-t) v = eps:

    mean = x + [v + g^2/(2t) (x + (1-t) v)] dt,  std = g sqrt(-dt).

    ``noise='flow_grpo'``: g = a sqrt(t/(1-t)), at t = 1 with the next grid time in the denominator
    (Flow-GRPO, arXiv 2505.05470; a = .7 is flow_grpo config/base.py's noise_level): the patched
    first step inflates the std of x_s. ``noise='constant'``: g = a (DanceGRPO, a = .3).
    """

    a: float = 0.7
    noise: str = "flow_grpo"

    def __post_init__(self) -> None:
        if self.noise not in ("flow_grpo", "constant"):
            raise ValueError(
                f"kernel sde: noise is {self.noise!r}; valid are 'flow_grpo', 'constant'"
            )

    def coefficients(self, step: Step) -> Coefficients:
        t, s = step.t, step.s
        linear = [
            (a + b - 1).abs().max() < 1e-9
            for a, b in ((step.alpha_t, step.sigma_t), (step.alpha_s, step.sigma_s))
        ]
        if not all(linear):
            raise ValueError(
                "kernel sde is derived for the linear (flow) schedule; use kernel ddim on this"
                " model"
            )
        if self.noise == "constant":
            g = torch.full_like(t, self.a)
        else:
            g = self.a * (t / (1 - torch.where(t < 1, t, s))).sqrt()
        dt = s - t
        one = torch.ones_like(t)
        return Coefficients(one, -dt, dt * (1 + g**2 / (2 * t)), g * (-dt).sqrt())


@dataclass(frozen=True)
class Consistency:
    """Multistep consistency sampling (arXiv 2303.01469 alg. 1): jump to x0, re-noise: mean alpha_s
    f, std sigma_s, and at the last step f itself, whatever alpha and sigma a family's data have.

    f = x0, or with a ``scaling`` diffusers' LCMScheduler's boundary c_skip x + c_out x0 (arXiv
    2310.04378 eq. 8 and its code): c_skip = d^2 / (n^2 + d^2), c_out = n / sqrt(n^2 + d^2), d =
    ``sigma_data``, n = scaling * (levels t - 1) at noise time t.
    """

    scaling: float | None = None  # LCMScheduler's timestep_scaling, whose default is 10; None: x0
    sigma_data: float = 0.5  # LCMScheduler's
    levels: int = 1000  # num_train_timesteps of the family, at whose last one t is 1

    def boundary(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """c_skip and c_out of f at noise times t [B], [B] each in fp64."""
        t = t.double()
        if self.scaling is None:
            return torch.zeros_like(t), torch.ones_like(t)
        number = self.scaling * (self.levels * t - 1)
        square = number**2 + self.sigma_data**2
        return self.sigma_data**2 / square, number / square.sqrt()

    def coefficients(self, step: Step) -> Coefficients:
        skip, out = self.boundary(step.t)
        ends = step.s == 0
        alpha = torch.where(ends, 1.0, step.alpha_s)
        sigma = torch.where(ends, 0.0, step.sigma_s)
        return Coefficients(alpha * skip, alpha * out, torch.zeros_like(alpha), sigma)


class StdKernel(Kernel, Protocol):
    """A kernel that is known by its std alone (DDIM, CPS): the wrappers below can change it
    consistently.
    """

    def std(self, step: Step) -> Tensor: ...


@dataclass(frozen=True)
class ClipStd:
    """Clip a kernel's std into [low, high] (RL-100) and recompute the direction term with it.

    ``consistent=False`` gives the published form, which keeps the direction term of the unclipped
    std.
    """

    kernel: StdKernel
    low: float = 0.0
    high: float = math.inf
    consistent: bool = True

    def std(self, step: Step) -> Tensor:
        clipped = self.kernel.std(step).clamp(self.low, self.high)
        return torch.minimum(clipped, step.sigma_s) if self.consistent else clipped

    def coefficients(self, step: Step) -> Coefficients:
        std = self.std(step)
        mean = preserving(step, std if self.consistent else self.kernel.std(step))
        return Coefficients(mean.x, mean.x0, mean.eps, std)


@dataclass(frozen=True)
class FloorStd:
    """Floor a kernel's std for exploration (DPPO, arXiv 2409.00588): std = max(kernel.std, floor).

    What exceeds sigma_s is exploration noise: it is added to the std and dropped at deployment; the
    direction term is recomputed with the part up to sigma_s. ``consistent=False`` gives the
    published form (direction of the unfloored std).
    """

    kernel: StdKernel
    floor: float
    consistent: bool = True

    def std(self, step: Step) -> Tensor:
        return self.kernel.std(step).clamp_min(self.floor)

    def coefficients(self, step: Step) -> Coefficients:
        std = self.std(step)
        mean = preserving(
            step, torch.minimum(std, step.sigma_s) if self.consistent else self.kernel.std(step)
        )
        return Coefficients(mean.x, mean.x0, mean.eps, std)


@dataclass(frozen=True)
class Mean:
    """The mean of a kernel without its noise: std 0, the direction term as if the noise were drawn.

    Reinforcement learning changes a network where the kernel that acts visits it. The ODE of the
    same network is another process: it goes through states that were never trained. The mean stays
    where the training was, and it is narrower than the data: right for actions, wrong for pictures.
    """

    kernel: Kernel

    def coefficients(self, step: Step) -> Coefficients:
        c = self.kernel.coefficients(step)
        return Coefficients(c.x, c.x0, c.eps, torch.zeros_like(c.std))

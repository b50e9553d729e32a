"""Common pieces of the chain's tests:
data with a known denoiser, its moments, a small condition and net.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from genpolicy.chain import EDM, Condition, Linear, Noise, Prediction, VariancePreserving
from genpolicy.chain.kernel import Kernel
from genpolicy.chain.schedule import Schedule, Step, step
from genpolicy.chain.solver import Solver
from genpolicy.chain.values import Gaussian

torch.set_num_threads(1)


@dataclass(frozen=True)
class Rows:
    """A condition that is one number per row, [B]."""

    value: Tensor

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, rows: Tensor | slice) -> "Rows":
        return Rows(self.value[rows])


def batch(groups: int, members: int, seed: int = 0) -> tuple[Rows, Noise]:
    """Conditions and noise of ``groups`` x ``members`` rows, group-major;
    a group has one condition.
    """
    value = torch.linspace(-1, 1, groups).repeat_interleave(members)
    return Rows(value), Noise.rows(seed, 0, torch.arange(groups), members)


def cosine(levels: int = 1024) -> VariancePreserving:
    """alpha = cos(pi t/2), sigma = sin(pi t/2):
    smooth at both ends, pure noise at t = 1 (zero SNR).
    """
    angle = torch.linspace(0, torch.pi / 2, levels + 1, dtype=torch.float64)[1:]
    return VariancePreserving(
        torch.cat([torch.cos(angle[:-1]) ** 2, torch.zeros(1, dtype=torch.float64)])
    )


SCHEDULES: dict[str, Schedule] = {
    "linear": Linear(),
    "shifted": Linear(3.0),
    "vp": cosine(),
    "edm": EDM(),
}


@dataclass(frozen=True)
class Data:
    """x_0 ~ N(mean, std^2): x_t is Gaussian too, and E[x_0 | x_t] = slope x_t + offset."""

    mean: float = 1.0
    std: float = 0.5

    def posterior(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(slope, offset) of E[x_0 | x_t]."""
        slope = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return slope, self.mean * (1 - slope * alpha)

    def marginal(self, schedule: Schedule, t: Tensor) -> tuple[float, float]:
        """The true (mean, std) of x_t."""
        alpha, sigma = schedule.alpha(t[None])[0], schedule.sigma(t[None])[0]
        return float(alpha * self.mean), float((alpha**2 * self.std**2 + sigma**2).sqrt())

    def denoiser(self, schedule: Schedule) -> Callable[[Tensor, Tensor, Condition], Prediction]:
        """The exact denoiser, elementwise in the dtype of x: a row does not depend on its batch."""

        def predict(x: Tensor, t: Tensor, condition: Condition) -> Prediction:
            shape = (*t.shape, *(1,) * (x.ndim - t.ndim))
            alpha, sigma = schedule.alpha(t).reshape(shape), schedule.sigma(t).reshape(shape)
            slope, offset = self.posterior(alpha, sigma)
            x0 = slope.to(x.dtype) * x + offset.to(x.dtype)
            return Prediction(x0, (x - alpha.to(x.dtype) * x0) / sigma.to(x.dtype))

        return predict


DATA = Data()


def moments(
    kernel: Kernel, schedule: Schedule, grid: Tensor, data: Data = DATA
) -> list[tuple[float, float]]:
    """Analytic (mean, std) at every time of ``grid``: exact denoiser, from the true marginal at
    grid[0] on.

    A transition is affine in x with the kernel's coefficients (one row a step), so that no sampling
    is needed.
    """
    here = step(schedule, grid[:-1], grid[1:])
    c = kernel.coefficients(here)
    slope, offset = data.posterior(here.alpha_t, here.sigma_t)
    a = c.x + c.x0 * slope + c.eps * (1 - here.alpha_t * slope) / here.sigma_t
    b = c.x0 * offset - c.eps * here.alpha_t * offset / here.sigma_t
    path = [data.marginal(schedule, grid[0])]
    for scale, shift, noise in zip(a.tolist(), b.tolist(), c.std.tolist(), strict=True):
        mean, std = path[-1]
        path.append((scale * mean + shift, math.hypot(scale * std, noise)))
    return path


def solved(
    solver: Solver, schedule: Schedule, grid: Tensor, data: Data = DATA
) -> tuple[float, float]:
    """Analytic (mean, std) at the end of a solver:
    it is affine in where it starts, so two points do.
    """
    denoiser = data.denoiser(schedule)
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    zero, one = solver.integrate(lambda x, t: denoiser(x, t, Rows(x[:, 0])), ends, schedule, grid)[
        :, 0
    ].tolist()
    mean, std = data.marginal(schedule, grid[0])
    return zero + (one - zero) * mean, abs(one - zero) * std


class Network(torch.nn.Module):
    """A small MLP over x, t and the condition that says a velocity on the linear schedule; counts
    its calls.

    ``rows`` are the batch sizes of its calls, ``times`` their t. In fp64 its Prediction stays fp64.
    """

    def __init__(self, event: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        size = torch.Size(event).numel()
        layers = [torch.nn.Linear(size + 2, 64), torch.nn.SiLU(), torch.nn.Linear(64, size)]
        self.body = torch.nn.Sequential(*layers).to(dtype)
        self.dtype = dtype
        self.rows: list[int] = []
        self.times: list[float] = []

    def forward(self, x: Tensor, t: Tensor, condition: Rows) -> Prediction:
        self.rows.append(len(x))
        self.times.append(float(t[0]))
        inputs = [x.flatten(1), t[:, None], condition.value[:, None]]
        velocity = self.body(torch.cat([v.to(self.dtype) for v in inputs], 1)).reshape(x.shape)
        if self.dtype == torch.float64:
            time = t.reshape(-1, *(1,) * (x.ndim - 1))
            return Prediction(x - time * velocity, x + (1 - time) * velocity)
        return Prediction.of("velocity", velocity, x, 1 - t, t)

    def gradient(self, loss: Tensor) -> Tensor:
        """d loss / d parameters, flattened."""
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(self.parameters()))])


def relative(ours: Tensor, reference: Tensor) -> float:
    """max |ours - reference| / max |reference|."""
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).abs().max() / reference.abs().max())


def transition(kernel: Kernel, x: Tensor, prediction: Prediction, step: Step) -> Gaussian:
    """The Gaussian over x_s of one step of a kernel."""
    return kernel.coefficients(step).gaussian(x, prediction)


def gain(kernel: Kernel, step: Step, d_x0: Tensor, d_eps: Tensor) -> Tensor:
    """d mean / d network output of one step of a kernel."""
    return kernel.coefficients(step).gain(d_x0, d_eps)

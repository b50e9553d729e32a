"""Common pieces of the chain's tests: data whose denoiser is known exactly, its moments, and small conditions and networks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from genpolicy.chain import Linear, Noise, Prediction
from genpolicy.chain.kernel import Kernel
from genpolicy.chain.schedule import Schedule, step
from genpolicy.chain.solver import Solver
from torch import Tensor

torch.set_num_threads(1)


@dataclass(frozen=True)
class Rows:
    """A condition that is only a number per row, [B]."""

    value: Tensor

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, rows: Tensor | slice) -> "Rows":
        return Rows(self.value[rows])


@dataclass(frozen=True)
class Data:
    """x_0 ~ N(mean, std^2): then x_t is Gaussian too, and E[x_0 | x_t] = slope x_t + offset."""

    mean: float = 1.0
    std: float = 0.5

    def posterior(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(slope, offset) of E[x_0 | x_t]: Gaussian conditioning."""
        slope = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return slope, self.mean * (1 - slope * alpha)

    def at(self, alpha: Tensor, sigma: Tensor) -> tuple[float, float]:
        """The true (mean, std) of x_t."""
        return float(alpha * self.mean), float((alpha**2 * self.std**2 + sigma**2).sqrt())

    def predict(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
        """The exact Prediction, in the dtype of x; alpha, sigma broadcast over x."""
        slope, offset = self.posterior(alpha, sigma)
        x0 = slope * x + offset
        return Prediction(x0, (x - alpha * x0) / sigma)


def moments(kernel: Kernel, schedule: Schedule, grid: Tensor, data: Data = Data()) -> list[tuple[float, float]]:  # noqa: B008
    """Analytic (mean, std) at every grid time of the chain with the exact denoiser, from the kernel's coefficients.

    Starts from the true marginal at grid[0]; the step is affine, mean = a x + b, so no sampling is needed.
    """
    mean, std = data.at(schedule.alpha(grid[:1])[0], schedule.sigma(grid[:1])[0])
    path = [(mean, std)]
    for k in range(len(grid) - 1):
        here = step(schedule, grid[k : k + 1], grid[k + 1 : k + 2])
        c = kernel.coefficients(here)
        slope, offset = data.posterior(here.alpha_t, here.sigma_t)
        a = float(c.x + c.x0 * slope + c.eps * (1 - here.alpha_t * slope) / here.sigma_t)
        b = float(c.x0 * offset - c.eps * here.alpha_t * offset / here.sigma_t)
        mean, std = a * mean + b, ((a * std) ** 2 + float(c.std) ** 2) ** 0.5
        path.append((mean, std))
    return path


def solved(solver: Solver, schedule: Schedule, grid: Tensor, data: Data = Data()) -> tuple[float, float]:  # noqa: B008
    """Analytic (mean, std) at the end of a solver, which is affine in where it starts: two points are enough."""

    def predict(x: Tensor, t: Tensor) -> Prediction:
        return data.predict(x, schedule.alpha(t)[:, None], schedule.sigma(t)[:, None])

    zero, one = solver.integrate(predict, torch.tensor([[0.0], [1.0]], dtype=torch.float64), schedule, grid)[:, 0].tolist()
    mean, std = data.at(schedule.alpha(grid[:1])[0], schedule.sigma(grid[:1])[0])
    return zero + (one - zero) * mean, abs(one - zero) * std


class Network(torch.nn.Module):
    """A small MLP that reads x, t and the condition, and says a velocity on ``schedule``. It counts what it evaluates."""

    def __init__(self, event: tuple[int, ...], schedule: Schedule | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.schedule = schedule or Linear()
        size = torch.Size(event).numel()
        self.body = torch.nn.Sequential(
            torch.nn.Linear(size + 2, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, size)
        ).to(dtype)
        self.rows: list[int] = []
        self.times: list[float] = []

    def forward(self, x: Tensor, t: Tensor, condition: Rows) -> Prediction:
        self.rows.append(len(x))
        self.times.append(float(t[0]))
        weight = self.body[0].weight
        inputs = torch.cat([x.flatten(1), t[:, None], condition.value[:, None]], 1) if False else [x.flatten(1), t[:, None], condition.value[:, None]]
        output = self.body(torch.cat([v.to(weight.dtype) for v in inputs], 1)).reshape(x.shape)
        return Prediction.of("velocity", output, x, self.schedule.alpha(t), self.schedule.sigma(t))


def batch(groups: int, members: int, seed: int = 0, iteration: int = 0) -> tuple[Rows, Noise]:
    """Conditions and noise of ``groups`` x ``members`` rows, group-major; a group has one condition."""
    value = torch.linspace(-1, 1, groups).repeat_interleave(members)
    return Rows(value), Noise.rows(seed, iteration, torch.arange(groups), members)


def relative(ours: Tensor, reference: Tensor) -> float:
    """max |ours - reference| / max |reference|."""
    return float((ours.double() - reference.double()).abs().max() / reference.double().abs().max())


def gradients(loss: Tensor, module: torch.nn.Module) -> Tensor:
    """The gradient of a loss, flattened over the parameters of ``module``."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])


Predict = Callable[[Tensor, Tensor], Prediction]

"""Solvers: deterministic samplers with several evaluations a step or a history. They have no
density.

They sample (evaluation, data for methods without likelihoods) and refuse to be scored.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from genpolicy.chain.schedule import Schedule
from genpolicy.chain.values import Prediction, expand

Predict = Callable[[Tensor, Tensor], Prediction]
"""(x_t [B,*E], t [B]) -> Prediction: a denoiser with its condition already given."""


@runtime_checkable
class Solver(Protocol):
    """integrate(predict, x at grid[0], schedule, grid [K+1]) -> x at grid[K]."""

    def integrate(
        self, predict: Predict, x: Tensor, schedule: Schedule, grid: Tensor
    ) -> Tensor: ...


def _rows(time: Tensor, x: Tensor) -> Tensor:
    return time.expand(len(x))


@dataclass(frozen=True)
class Heun:
    """Heun's method on the probability-flow ODE dx = x0 dalpha + eps dsigma, of second order on
    every schedule.

    x_s = x + (alpha_s - alpha_t)(x0_t + x0_s)/2 + (sigma_s - sigma_t)(eps_t + eps_s)/2, two
    evaluations a step, and one (Euler) for the last step. On EDM this is arXiv 2206.00364 alg. 1
    without churn, on flows Heun on the velocity.
    """

    def integrate(self, predict: Predict, x: Tensor, schedule: Schedule, grid: Tensor) -> Tensor:
        for k in range(len(grid) - 1):
            t, s = _rows(grid[k], x), _rows(grid[k + 1], x)
            d_alpha = expand(schedule.alpha(s) - schedule.alpha(t), x)
            d_sigma = expand(schedule.sigma(s) - schedule.sigma(t), x)
            here = predict(x, t)
            euler = x + d_alpha * here.x0 + d_sigma * here.eps
            if k == len(grid) - 2:
                x = euler
            else:
                there = predict(euler, s)
                x = x + d_alpha * (here.x0 + there.x0) / 2 + d_sigma * (here.eps + there.eps) / 2
        return x


@dataclass(frozen=True)
class DPMSolver:
    """DPM-Solver++(2M) (arXiv 2211.01095 alg. 2): second order, one evaluation a step, history of
    one prediction.

    With lambda = log(alpha/sigma), h = lambda_s - lambda_t, r = h_previous/h: x_s =
    (sigma_s/sigma_t) x - alpha_s expm1(-h) [(1 + 1/(2r)) x0 - x0_previous/(2r)]; first order where
    h or h_previous is infinite: the first two steps from alpha = 0, and a step to sigma = 0 (as
    diffusers does).
    """

    def integrate(self, predict: Predict, x: Tensor, schedule: Schedule, grid: Tensor) -> Tensor:
        previous: Prediction | None = None
        h_previous = math.inf
        for k in range(len(grid) - 1):
            t, s = _rows(grid[k], x), _rows(grid[k + 1], x)
            here = predict(x, t)
            alpha_s, sigma_s = expand(schedule.alpha(s), x), expand(schedule.sigma(s), x)
            h = _log_snr(schedule, grid[k + 1]) - _log_snr(schedule, grid[k])
            x0 = here.x0
            if previous is not None and math.isfinite(h) and math.isfinite(h_previous):
                x0 = x0 + (x0 - previous.x0) * h / (2 * h_previous)
            if math.isfinite(h):
                ratio = expand(schedule.sigma(s) / schedule.sigma(t), x)
                x = ratio * x - alpha_s * math.expm1(-h) * x0
            else:
                x = alpha_s * x0 + sigma_s * here.eps
            previous, h_previous = here, h
        return x


def _log_snr(schedule: Schedule, t: Tensor) -> float:
    alpha, sigma = float(schedule.alpha(t[None])[0]), float(schedule.sigma(t[None])[0])
    if sigma == 0:
        return math.inf
    return -math.inf if alpha == 0 else math.log(alpha / sigma)

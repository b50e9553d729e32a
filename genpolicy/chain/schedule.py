"""Noise schedules: alpha(t) and sigma(t) of x_t = alpha x_0 + sigma eps, and the grid of times a
chain visits.

One table is read by acting and by scoring. Coefficients are fp64 scalars per row on the CPU (some
devices have no fp64); only what multiplies x is fp32 and on its device.
"""

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """The coefficients of one denoising step from t to s < t, each [B] (or [B,T] per token) in
    fp64.
    """

    t: Tensor
    s: Tensor
    alpha_t: Tensor
    sigma_t: Tensor
    alpha_s: Tensor
    sigma_s: Tensor

    def __getitem__(self, rows: Tensor) -> "Step":
        """The rows of an index [b], as copies: a chain keeps the steps of its whole grid in one."""
        return Step(*(getattr(self, f.name).index_select(0, rows) for f in fields(self)))


class Schedule(Protocol):
    """alpha(t), sigma(t) for t [B] (or [B,T]), and grid(K, start): K+1 decreasing times ending at
    0.
    """

    def alpha(self, t: Tensor) -> Tensor: ...

    def sigma(self, t: Tensor) -> Tensor: ...

    def grid(self, steps: int, start: float | None = None) -> Tensor: ...


def step(schedule: Schedule, t: Tensor, s: Tensor) -> Step:
    """Look the coefficients of the step t -> s up once."""
    return Step(t, s, schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s))


def _check_start(start: float | None, top: float) -> None:
    if start is not None and not 0 < start <= top:
        raise ValueError(
            f"it starts at noise time {start}; start must lie above 0 and not above the schedule's"
            f" noisiest time {top:g}"
        )


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"a chain needs at least 1 step, got {steps}")


@dataclass(frozen=True)
class Linear:
    """Rectified flow: alpha = 1 - t, sigma = t on [0, 1].

    grid(K): u = 1, (K-1)/K, ..., 1/K, 0 mapped by ``shift`` u / (1 + (shift - 1) u): K *real* steps
    (diffusers' own uniform grid of K steps ends at t = .001, so that its last evaluation does
    nothing). Resolution-dependent ("dynamic") shifting is shift = exp(mu), see ``dynamic_shift``.
    """

    shift: float = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def grid(self, steps: int, start: float | None = None) -> Tensor:
        _check_steps(steps)
        _check_start(start, 1.0)
        u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        if start is not None:
            u = (
                u * start / (self.shift - (self.shift - 1) * start)
            )  # the u that the shift maps to `start`
        return u / (u + (1 - u) / self.shift)  # exactly 1 at u = 1


def dynamic_shift(
    tokens: int,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """exp(mu), mu linear in the number of latent tokens (Flux: diffusers
    pipeline_flux.calculate_shift).
    """
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return math.exp(base_shift + slope * (tokens - base_tokens))


@dataclass(frozen=True)
class VariancePreserving:
    """alpha^2 + sigma^2 = 1 from a table of cumulative products ``alpha_bar`` [T].

    Integer level i stands at t = (i + 1) / T; t = 0 is the family's own end, ``final_alpha_bar``
    (1, or alpha_bar[0] where the scheduler says ``set_alpha_to_one=False``). Times between levels
    are rounded to the nearest level.
    """

    alpha_bar: Tensor
    final_alpha_bar: float = 1.0

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor]:
        """alpha and sigma of every level, [T+1] each, data first: a lookup takes no root."""
        final = torch.tensor([self.final_alpha_bar], dtype=torch.float64)
        alpha_bar = torch.cat([final, self.alpha_bar.double().cpu()])
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def _level(self, t: Tensor) -> Tensor:
        return (t * len(self.alpha_bar)).round().long()

    def alpha(self, t: Tensor) -> Tensor:
        return self._tables[0].to(t.device).take(self._level(t))

    def sigma(self, t: Tensor) -> Tensor:
        return self._tables[1].to(t.device).take(self._level(t))

    def grid(self, steps: int, start: float | None = None) -> Tensor:
        """Trailing spacing: the first level is the noisiest, so that one step from pure noise is a
        real step.
        """
        _check_steps(steps)
        _check_start(start, 1.0)
        levels = len(self.alpha_bar)
        top = levels if start is None else max(1, round(start * levels))
        if steps > top:
            below = "" if start is None else f" below its start {start}"
            raise ValueError(f"{steps} steps do not fit into the schedule's {top} levels{below}")
        return (
            torch.linspace(top, 0, steps + 1, dtype=torch.float64).round() / levels
        )  # half to even at ties


@dataclass(frozen=True)
class EDM:
    """Variance exploding in Karras' form (arXiv 2206.00364): alpha = 1, sigma = t; grid is its eq.
    5 with rho.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def grid(self, steps: int, start: float | None = None) -> Tensor:
        _check_steps(steps)
        _check_start(start, self.sigma_max)
        top = (self.sigma_max if start is None else start) ** (1 / self.rho)
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
        sigmas = (top + ramp * (self.sigma_min ** (1 / self.rho) - top)) ** self.rho
        return torch.cat([sigmas, sigmas.new_zeros(1)])

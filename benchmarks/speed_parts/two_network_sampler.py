"""The arithmetic by which DPPO's public code acts, re-enacted in plain torch from its description
(arXiv 2409.00588; irom-princeton/dppo), with which `benchmarks.speed` compares sampling.

Nothing here is the public code's, and nothing here calls genpolicy.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

FREQUENCIES, LOWEST = 16, 1e-3
"""Sines, and cosines, of the embedding of time, at angular frequencies from 1 down to LOWEST."""


def embed(position: Tensor) -> Tensor:
    """Sines and cosines of ``position`` [B]: [B, 2 FREQUENCIES]."""
    exponents = torch.linspace(0, 1, FREQUENCIES, device=position.device)
    angles = position[:, None] * LOWEST**exponents
    return torch.cat([angles.sin(), angles.cos()], -1)


class Actor(nn.Module):
    """A residual MLP on x [B,*E], a position in time [B] and a condition [B,C]: epsilon [B,*E].

    It has the layers of genpolicy's own residual network, in the same order.
    """

    def __init__(self, event: int, condition: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.enter = nn.Linear(event + 2 * FREQUENCIES + condition, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(hidden),
                nn.SiLU(),
                nn.Linear(hidden, hidden),
                nn.SiLU(),
                nn.Linear(hidden, hidden),
            )
            for _ in range(blocks)
        )
        self.leave = nn.Linear(hidden, event)

    def forward(self, x: Tensor, position: Tensor, condition: Tensor) -> Tensor:
        hidden = self.enter(torch.cat([x.flatten(1), embed(position), condition], -1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.leave(nn.functional.silu(hidden)).view_as(x)


@dataclass(frozen=True)
class Tables:
    """Coefficients of the K levels, least noisy first, each [K] fp32: x0_hat = (x - sigma
    eps)/alpha, and the posterior N(of_x0 x0_hat + of_x x, exp(log_variance)). position: what the
    network is told of time.
    """

    inverse_alpha: Tensor
    sigma_over_alpha: Tensor
    of_x0: Tensor
    of_x: Tensor
    log_variance: Tensor
    position: Tensor

    @classmethod
    def of(cls, alpha_bar: Tensor, position: Tensor) -> "Tables":
        """alpha_bar [K+1] fp64 from 1 (no noise) down, position [K] of the levels 1 .. K."""
        after, before = alpha_bar[:-1], alpha_bar[1:]
        beta = 1 - before / after
        variance = beta * (1 - after) / (1 - before)
        values = (
            before.rsqrt(),
            (1 / before - 1).sqrt(),
            beta * after.sqrt() / (1 - before),
            (1 - after) * (1 - beta).sqrt() / (1 - before),
            variance.clamp_min(1e-20).log(),
            position,
        )
        return cls(*(value.float() for value in values))


def looked_up(table: Tensor, level: Tensor, like: Tensor) -> Tensor:
    """Entries ``level`` [B] of a table [K], shaped to broadcast over ``like`` [B,*E]."""
    return table.gather(0, level).view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class TwoNetworkSampler:
    """Two networks of one shape: the frozen one denoises every row at every level, and where the
    level is below ``tuned_levels`` the tuned one's output replaces it, so that a decision takes
    K + K' evaluations. Every step is stochastic: its std is floored, its noise clamped.
    """

    frozen: Actor
    tuned: Actor
    tables: Tables
    tuned_levels: int
    floor: float = 0.1
    noise_bound: float = 3.0
    x0_bound: float = 1.0

    def transition(self, x: Tensor, level: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B,*E] and std [B,*1] after the step at levels [B], 0 the least noisy."""
        tables = self.tables
        position = tables.position.gather(0, level)
        epsilon = self.frozen(x, position, condition)
        rows = torch.where(level < self.tuned_levels)[0]
        if len(rows):
            epsilon[rows] = self.tuned(x[rows], position[rows], condition[rows])
        x0 = looked_up(tables.inverse_alpha, level, x) * x
        x0 = x0 - looked_up(tables.sigma_over_alpha, level, x) * epsilon
        x0 = x0.clamp(-self.x0_bound, self.x0_bound)
        mean = looked_up(tables.of_x0, level, x) * x0 + looked_up(tables.of_x, level, x) * x
        std = (0.5 * looked_up(tables.log_variance, level, x)).exp()
        return mean, std.clamp_min(self.floor)

    @torch.no_grad()
    def sample(self, condition: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """x0 [B,*E], and the states around the tuned steps [B,K'+1,*E]."""
        rows, levels = len(condition), len(self.tables.position)
        x = torch.randn(rows, *shape)
        states = [x] if levels == self.tuned_levels else []
        for number in reversed(range(levels)):
            level = torch.full((rows,), number)
            mean, std = self.transition(x, level, condition)
            noise = torch.randn_like(x).clamp(-self.noise_bound, self.noise_bound)
            x = mean + std * noise
            if number <= self.tuned_levels:
                states.append(x)
        return x, torch.stack(states, 1)

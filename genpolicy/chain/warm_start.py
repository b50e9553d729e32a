"""Warm starts: a decision begins from the plan before it in the place of noise.

The plan is a whole event [B,T,D] of a policy that acts again and again on a little that has
changed. ``levels`` count the steps of the policy's own grid from the data's end: level l is step
K-1-l of the chain, level 0 the last one. On the K = 100 levels of a DDPM they are its integer
times.
"""

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from genpolicy.chain.chain import Chain, Trajectory
from genpolicy.chain.contraction import contraction
from genpolicy.chain.noise import PRIOR, Noise
from genpolicy.chain.solver import Solver
from genpolicy.chain.values import Condition, Denoiser, expand

FLAT = 1e-6
"""Tolerance of alpha^2 + sigma^2 = 1 on schedules that preserve the variance."""


def shifted(plan: Tensor, steps: int) -> Tensor:
    """The plan [B,T,D] once its first ``steps`` actions are carried out, the last one repeated."""
    return torch.cat([plan[:, steps:], plan[:, -1:].expand(-1, steps, -1)], 1)


class WarmStart(Protocol):
    """The way from a plan that was shifted to the next one."""

    @property
    def evaluations(self) -> int:
        """Network evaluations per decision, but for an episode's first one."""
        ...

    def require_fit(self, chain: Chain, event_shape: tuple[int, ...], best_of: int) -> None:
        """Raise `ValueError` where this warm start does not fit a policy's sampler."""
        ...

    def replan(
        self, chain: Chain, denoiser: Denoiser, condition: Condition, noise: Noise, guess: Tensor
    ) -> Trajectory:
        """The next plan from the shifted one, ``guess`` [B,T,D]: a pure function.

        The trajectory keeps no step.
        """
        ...

    def carried_out(self, plan: Tensor) -> Tensor:
        """The plan [B,T,D] as it is carried out."""
        ...

    def contraction(self, chain: Chain, spread: float) -> float:
        """J = d plan / d guess on Gaussian data of std ``spread`` (see `contraction`)."""
        ...


@dataclass(frozen=True)
class RTI:
    """Real-time iteration (RTI-DP, arXiv 2508.05396): the guess is called x at the first level.

    Nothing is noised. At each of ``levels`` in their order the chain's own step of that level is
    taken, and what comes of it is called x at the next level of the list: where the list skips
    levels that is another relabelling, and not a longer step (as DDIM's would be). Under the kernel
    ``ddim`` with eta 1 a step is DDPM's, its noise included, as in the published code; under
    ``mean`` around it, the same without noise.

    A discrete dim (a gripper) is carried out as 1 or -1 in event units, by its sign in the plan.
    "clip" writes that value, divided by ``factor``, into the guess as well; "scale" leaves the
    guess alone: for a policy that was trained with this column made small.
    """

    levels: list[int]  # noisier first, the last one 0
    discrete_dims: list[int] = field(default_factory=list[int])  # columns of an action
    discrete: Literal["clip", "scale"] = "clip"  # both are the paper's
    factor: float = 1.0  # of "clip"; the paper's code has 1 on states, 10 on images

    @property
    def evaluations(self) -> int:
        return len(self.levels)

    def require_fit(self, chain: Chain, event_shape: tuple[int, ...], best_of: int) -> None:
        falling = self.levels == sorted(set(self.levels), reverse=True)
        if not self.levels or not falling or self.levels[-1] != 0 or self.levels[0] >= chain.K:
            raise ValueError(
                f"warm start rti has levels {self.levels}; they must fall from at most"
                f" {chain.K - 1}, the noisiest level of a chain of {chain.K} steps, to 0"
            )
        if isinstance(chain.kernel, Solver):
            raise ValueError("warm start rti takes single steps of a kernel, and a solver has none")
        alpha, sigma = chain.steps.alpha_t, chain.steps.sigma_t
        if bool(((alpha**2 + sigma**2 - 1).abs() > FLAT).any()):
            raise ValueError(
                "warm start rti calls a plan as it is a noisy one, which on a flow, where x_t ="
                " (1-t) x_0 + t eps, is a plan of another size: use sdedit on this policy"
            )
        if best_of > 1:
            raise ValueError(
                f"best_of is {best_of}, and with warm start rti all candidates would begin as the"
                " same guess: use sdedit, which draws noise for each of them"
            )
        wrong = [dim for dim in self.discrete_dims if not 0 <= dim < event_shape[-1]]
        if wrong:
            raise ValueError(
                f"warm start rti has discrete dim {wrong[0]}; an action's dims are 0 to"
                f" {event_shape[-1] - 1}"
            )
        if not self.factor > 0:
            raise ValueError(f"warm start rti has factor {self.factor:g}; it must be above 0")

    def replan(
        self, chain: Chain, denoiser: Denoiser, condition: Condition, noise: Noise, guess: Tensor
    ) -> Trajectory:
        if self.discrete == "clip":
            guess = self._signs(guess, 1 / self.factor)
        steps = [chain.K - 1 - level for level in self.levels]
        return chain.relabelled(denoiser, condition, noise, guess, steps)

    def carried_out(self, plan: Tensor) -> Tensor:
        return self._signs(plan, 1.0)

    def contraction(self, chain: Chain, spread: float) -> float:
        return contraction(chain, self.levels, spread)

    def _signs(self, plan: Tensor, size: float) -> Tensor:
        """The plan with ``size`` or -``size`` in its discrete dims."""
        if not self.discrete_dims:
            return plan
        columns = torch.zeros(plan.shape[-1], dtype=torch.bool, device=plan.device)
        columns[self.discrete_dims] = True
        return torch.where(columns, torch.where(plan > 0, size, -size), plan)


@dataclass(frozen=True)
class SDEdit:
    """The guess with noise of its level: x_t = alpha_t guess + sigma_t eps (arXiv 2108.01073).

    From there the chain goes on as ever, through its last ``steps`` steps: with 0 the guess is the
    plan, with K it is forgotten as far as the schedule's noisiest level forgets.
    """

    steps: int  # of the chain's own grid, and network evaluations

    @property
    def evaluations(self) -> int:
        return self.steps

    def require_fit(self, chain: Chain, event_shape: tuple[int, ...], best_of: int) -> None:
        if not 0 <= self.steps <= chain.K:
            raise ValueError(
                f"warm start sdedit takes {self.steps} steps; a chain of {chain.K} steps has 0 to"
                f" {chain.K}"
            )

    def replan(
        self, chain: Chain, denoiser: Denoiser, condition: Condition, noise: Noise, guess: Tensor
    ) -> Trajectory:
        k = chain.K - self.steps
        t = chain.grid[k].expand(1)
        shape, none = tuple(guess.shape[1:]), (chain.K, chain.K)
        x = guess
        if self.steps:
            alpha, sigma = chain.schedule.alpha(t), chain.schedule.sigma(t)
            drawn = noise(PRIOR, shape, guess.device)
            x = expand(alpha, guess) * guess + expand(sigma, guess) * drawn
        return chain.sample(
            denoiser, condition, noise, shape, device=guess.device, start=(k, x), keep=none
        )

    def carried_out(self, plan: Tensor) -> Tensor:
        return plan

    def contraction(self, chain: Chain, spread: float) -> float:
        t = chain.grid[chain.K - self.steps].expand(1)
        return float(chain.schedule.alpha(t)) * contraction(chain, range(self.steps), spread)

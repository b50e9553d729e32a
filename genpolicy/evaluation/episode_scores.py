"""Evaluation of a policy's deployed sampler in environments, on fixed reset seeds and one fixed
noise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genpolicy.chain import Noise
from genpolicy.contracts.task import Environments
from genpolicy.evaluation.prompt_scores import EVALUATION
from genpolicy.evaluation.statistics import interval
from genpolicy.policy.policy import ChainPolicy
from genpolicy.rollout.episodes import Watch, play


@dataclass(frozen=True)
class ControlEvaluation:
    """The scores of E episodes."""

    success: Tensor  # [E] fp64, 1 or 0
    returns: Tensor  # [E] fp64, sums of rewards
    lengths: Tensor  # [E] fp64, environment steps
    decisions: float  # taken in all episodes together
    judged: bool  # the task says what success is

    @property
    def samples(self) -> int:
        return len(self.returns)

    def metrics(self) -> dict[str, Any]:
        """The success_rate (Wilson's 95 % interval), return (Student's), length, and n."""
        found: dict[str, Any] = {
            "return": float(self.returns.mean()),
            "ci95/return": list(interval(self.returns)),
        }
        if self.judged:
            found |= {
                "success_rate": float(self.success.mean()),
                "ci95/success_rate": list(interval(self.success)),
            }
        return {**found, "length": float(self.lengths.mean()), "n": self.samples}


def evaluate_control(
    policy: ChainPolicy,
    environments: Environments,
    *,
    episodes: int,
    seed: int,
    judged: bool = True,
    process: tuple[int, int] = (0, 1),
    gather: Callable[[Tensor], Tensor] = lambda value: value,
    watch: Watch | None = None,
) -> ControlEvaluation:
    """Plays ``episodes`` episodes: episode e begins from the reset seed ``seed`` + e, its noise is
    named by e alone, so that two policies meet the same starts and any number of processes
    (``process`` = (index, count)) plays the same.
    """
    index, count = process
    share = math.ceil(episodes / count)
    mine = torch.arange(episodes)[index * share : (index + 1) * share]
    noise = Noise(seed, EVALUATION, mine, torch.zeros_like(mine))
    success, returns, lengths = (torch.zeros(share, dtype=torch.float64) for _ in range(3))
    decided = torch.zeros(share, dtype=torch.float64)
    seeds = [seed + e for e in mine.tolist()]
    # the last processes may have fewer episodes than the others, or none
    played = play(policy, environments, seeds, noise, keep=(0, 0), watch=watch) if seeds else ()
    for decision in played:
        rows, step = decision.episode, decision.step
        success[rows] = step.success.double()
        returns[rows] += step.rewards.double().sum(1)
        lengths[rows] += step.executed.double()
        decided[rows] += 1
    success, returns, lengths, decided = (
        gather(v)[:episodes] for v in (success, returns, lengths, decided)
    )
    return ControlEvaluation(success, returns, lengths, float(decided.sum()), judged)

"""Scoring a stored rollout again under unchanged weights: how exact replay is, and the means of the training
forward.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from genpolicy.chain import Gaussian, Trajectory
from genpolicy.micro_batch import MicroBatches
from genpolicy.policy import ChainPolicy

LogRatio = Callable[[Gaussian, Gaussian, Tensor], Tensor]
"""(new, old, x) -> log-ratio [b], in the reduction of the objective it belongs to."""


def replay_gap(
    policy: ChainPolicy, trajectory: Trajectory, log_ratio: LogRatio, micro_batches: MicroBatches
) -> tuple[float, int]:
    """The largest |log-ratio| of the same weights over all rows and kept steps, and the step it is found at."""
    gaps = {}
    for k in trajectory.steps:

        def gap(rows: slice, k: int = k) -> float:
            part = trajectory[rows]
            with torch.enable_grad():
                new = policy.transition(part, k)
            now, acted = policy.scored(Gaussian(new.mean.detach(), new.std.detach())), policy.scored(part.acted(k))
            return float(log_ratio(now, acted, policy.model.scored(part.after(k))).abs().max())

        gaps[k] = max(micro_batches(gap, len(trajectory), trajectory.shared))
    worst = max(gaps, key=lambda k: gaps[k])
    return gaps[worst], worst


def scored_again(policy: ChainPolicy, trajectory: Trajectory, micro_batches: MicroBatches) -> Trajectory:
    """The trajectory with the means that the training forward gives: one more evaluation per row and kept step."""
    means = []
    for k in trajectory.steps:

        def mean(rows: slice, k: int = k) -> Tensor:
            return policy.transition(trajectory[rows], k).mean.detach()

        means.append(torch.cat(micro_batches(mean, len(trajectory), trajectory.shared)))
    return replace(trajectory, mean=torch.stack(means, 1))

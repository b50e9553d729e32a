"""PPO through a denoising chain: the loss of a transition, and passes over a rollout.

    loss = max(-A rho, -A clip(rho, 1-eps, 1+eps)),    log rho = log N_new(x) - log N_old(x)

with log-probabilities summed over the chunk.
"""

import math
from collections.abc import Iterator
from typing import Literal, cast

from torch import Tensor

from genpolicy.chain.values import Gaussian
from genpolicy.learning.objective import Scored, clip_metrics, clipped_surrogate, log_ratio
from genpolicy.rollout.minibatch import Batch
from genpolicy.rollout.rollout import Rollout
from genpolicy.training.run import Run

Update = Literal["pairs", "chain", "step"]
"""The rows of one optimiser step: random (decision, step) pairs, the whole chains of random
decisions, or random decisions at one step after the other.
"""


def chunk_log_ratio(new: Gaussian, old: Gaussian, x: Tensor) -> Tensor:
    """log rho of b transitions, summed over the chunk, [b]."""
    return log_ratio(new, old, x, reduce="sum")


def ppo_loss(step: Scored, clip: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of b transitions, [b], and its metrics [b]. clip: eps."""
    log_rho = chunk_log_ratio(step.new, step.old, step.x)
    surrogate = clipped_surrogate(log_rho, step.advantage, clip)
    return surrogate.loss, clip_metrics(log_rho, step.advantage, surrogate)


def batches(
    run: Run, rollout: Rollout, update: Update, minibatch: int, epoch: int
) -> Iterator[Batch]:
    """Yields every (decision, step) pair of a rollout once, about ``minibatch`` of all processes
    together at a time, in an order that is the epoch's own.
    """
    decisions = rollout.decisions.total
    steps = rollout.trajectory.steps
    if update == "pairs":
        yield from run.pairs(rollout, math.ceil(decisions * len(steps) / minibatch), epoch)
    elif update == "chain":
        yield from run.chains(rollout, math.ceil(decisions * len(steps) / minibatch), epoch)
    else:
        for chains in run.chains(rollout, math.ceil(decisions / minibatch), epoch):
            rows = cast(Tensor, chains.rows)[:: len(steps)]
            for k in steps:
                yield Batch(rows, rows.new_full(rows.shape, k))

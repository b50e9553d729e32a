"""Minibatches of a rollout: which rows and steps one update learns from, the same whatever the
number of processes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from genpolicy.rollout.rollout import Rollout


@dataclass(frozen=True)
class Batch:
    """Rows of a rollout to learn from: a stretch or an index [b], at all kept steps, or at ``k``
    [b], each at its own.

    whole: so many consecutive rows belong together (a chain's steps), and no micro-batch divides
    them.
    """

    rows: slice | Tensor
    k: Tensor | None = None
    whole: int = 1

    def __len__(self) -> int:
        """The number of rows."""
        return self.rows.stop - self.rows.start if isinstance(self.rows, slice) else len(self.rows)


Batches = Iterator[Batch]
"""The minibatches of a pass."""

Chosen = Tensor | None
"""The rows to pass over, bool [R], or of `pairs` the kept steps of each, bool [R,W]; None: all."""

Pass = Callable[[Rollout, int, np.random.Generator, Chosen], Batches]
"""(rollout, updates, order, chosen rows) -> the minibatches of a pass: one of those below."""

PASS = "pass over"
"""The purpose of the order in which the policy passes over a rollout."""


def rows(
    rollout: Rollout, updates: int, order: np.random.Generator, chosen: Chosen = None
) -> Batches:
    """A pass over the rows in ``updates`` minibatches, all kept steps of each row together: whole
    groups of prompts in their own order, decisions of episodes in a drawn ``order``.

    chosen: bool [R], the rows to pass over; without it all of them.
    """
    if rollout.ragged or (chosen is not None and rollout.trajectory.shared == 1):
        yield from (Batch(drawn) for drawn in _shuffled(rollout, 1, updates, order, chosen))
        return
    if chosen is not None:
        raise ValueError("rows can't be chosen where the members of a group share their start")
    # the rows stand in the order of their places
    update = rollout.decisions.place * updates // rollout.decisions.total
    for u in range(updates):
        begin = int((update < u).sum())
        yield Batch(slice(begin, begin + int((update == u).sum())))


def pairs(
    rollout: Rollout, updates: int, order: np.random.Generator, chosen: Chosen = None
) -> Batches:
    """A pass over the (row, kept step) pairs in ``updates`` minibatches."""
    steps = len(rollout.trajectory.steps)
    for drawn in _shuffled(rollout, steps, updates, order, chosen):
        yield Batch(drawn // steps, drawn % steps + rollout.trajectory.first)


def chains(
    rollout: Rollout, updates: int, order: np.random.Generator, chosen: Chosen = None
) -> Batches:
    """A pass over the rows in ``updates`` minibatches; a row's kept steps stand one after the other
    and are scored in one evaluation, for a loss that needs the likelihood of whole chains.
    """
    steps = torch.tensor(list(rollout.trajectory.steps))
    for drawn in _shuffled(rollout, 1, updates, order, chosen):
        yield Batch(drawn.repeat_interleave(len(steps)), steps.repeat(len(drawn)), len(steps))


def _shuffled(
    rollout: Rollout, each: int, updates: int, order: np.random.Generator, chosen: Chosen
) -> Iterator[Tensor]:
    """This process's share of minibatches of all processes' rows times ``each``.

    Rows that are not chosen leave gaps, so that minibatches may differ in size.
    """
    place = (rollout.decisions.place[:, None] * each + torch.arange(each)).flatten()
    total = rollout.decisions.total * each
    updates = min(updates, total)
    rank = torch.from_numpy(order.permutation(total))[place]
    sequence = rank.argsort()
    update = rank[sequence] * updates // total
    if chosen is not None:
        kept = chosen.cpu() if chosen.ndim == 2 else chosen.cpu().repeat_interleave(each)
        kept = kept.flatten()[sequence]
        sequence, update = sequence[kept], update[kept]
    yield from (sequence[update == u] for u in range(updates))

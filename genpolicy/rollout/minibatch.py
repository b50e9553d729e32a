"""Minibatches of a rollout: which rows and steps one update learns from, the same whatever the
number of processes.
"""

from collections.abc import Iterator, Sequence
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


def rows(rollout: Rollout, updates: int, order: Sequence[int]) -> Iterator[Batch]:
    """A pass over the rows in ``updates`` minibatches, all kept steps of each row together: whole
    groups of prompts in their own order, decisions of episodes in an order drawn from the seed
    ``order``.
    """
    if rollout.ragged:
        yield from (Batch(drawn) for drawn in _shuffled(rollout, 1, updates, order))
        return
    update = (
        rollout.decisions.place * updates // rollout.decisions.total
    )  # the rows stand in the order of their places
    for u in range(updates):
        begin = int((update < u).sum())
        yield Batch(slice(begin, begin + int((update == u).sum())))


def pairs(rollout: Rollout, updates: int, order: Sequence[int]) -> Iterator[Batch]:
    """A pass over the (row, kept step) pairs in ``updates`` minibatches."""
    steps = len(rollout.trajectory.steps)
    for drawn in _shuffled(rollout, steps, updates, order):
        yield Batch(drawn // steps, drawn % steps + rollout.trajectory.first)


def chains(rollout: Rollout, updates: int, order: Sequence[int]) -> Iterator[Batch]:
    """A pass over the rows in ``updates`` minibatches; a row's kept steps stand one after the other
    and are scored in one evaluation, for a loss that needs the likelihood of whole chains.
    """
    steps = torch.tensor(list(rollout.trajectory.steps))
    for drawn in _shuffled(rollout, 1, updates, order):
        yield Batch(drawn.repeat_interleave(len(steps)), steps.repeat(len(drawn)), len(steps))


def stand_in(rollout: Rollout, batch: Batch) -> Batch:
    """Some row in the place of a share that has none, to be scored for nothing: what it adds must
    be left out.
    """
    if batch.k is None:
        return Batch(slice(0, rollout.trajectory.shared))
    first = rollout.trajectory.first
    return Batch(
        torch.zeros(batch.whole, dtype=torch.long),
        torch.arange(first, first + batch.whole),
        batch.whole,
    )


def _shuffled(rollout: Rollout, each: int, updates: int, order: Sequence[int]) -> Iterator[Tensor]:
    """This process's share of minibatches of all processes' rows times ``each``: a pure function of
    ``order``.
    """
    place = (rollout.decisions.place[:, None] * each + torch.arange(each)).flatten()
    total = rollout.decisions.total * each
    updates = min(updates, total)
    rank = torch.from_numpy(np.random.default_rng([*order, each]).permutation(total))[place]
    sequence = rank.argsort()
    update = rank[sequence] * updates // total
    yield from (sequence[update == u] for u in range(updates))

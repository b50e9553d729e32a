"""Simulations as environments that take a chunk of actions at a time, in this process or in
several.

The same seed is the same episode whatever ran in a slot before, alone or beside others, in any
number of processes: a slot shares nothing with another, and a simulation is asked to
`reset(seed=...)` at every start.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genpolicy.contracts.task import Context, TaskStep
from genpolicy.tasks._slots import Simulation, Slots, Taken
from genpolicy.tasks._workers import Worker


class Environments:
    """The `genpolicy.contracts.task.Environments` of simulations that ``make`` makes.

    A decision is a chunk of actions, clipped to the action space and taken one by one until it or
    the episode ends; an episode of ``limit`` environment steps is truncated. history: of
    environment steps, not of decisions. workers: processes that share the slots (slot s belongs to
    s mod workers), so that a decision costs one message per process; 0 simulates here.
    gymnasium.vector steps every environment at once and one action at a time, a message each. With
    workers ``make`` must pickle, and an exception in one is raised here.
    """

    def __init__(
        self,
        make: Callable[[], Simulation],
        count: int,
        history: int,
        limit: int,
        instruction: str,
        workers: int = 0,
    ) -> None:
        self.count = count
        self._instruction = instruction
        self._shares: list[Slots | Worker]
        if workers == 0:
            self._shares = [Slots(make, count, history, limit)]
            return
        workers = min(workers, count)
        sizes = [len(range(share, count, workers)) for share in range(workers)]
        started = [Worker(partial(Slots, make, size, history, limit)) for size in sizes]
        self._shares = [*started]
        _answers([worker.ready for worker in started])

    def reset(self, slots: Sequence[int], seeds: Sequence[int]) -> Context:
        """Begins an episode in each of the slots."""
        order, seen = self._spread("reset", slots, [int(seed) for seed in seeds])
        return self._context(
            {name: _join([share[name] for share in seen], order) for name in seen[0]}
        )

    def step(self, slots: Sequence[int], actions: Tensor) -> TaskStep:
        """Takes the actions Float[n,T,D]. Raises `ValueError` for ones that are not finite, and for
        an episode's end.
        """
        chunks = actions.detach().to("cpu", torch.float32).numpy()
        if not np.isfinite(chunks).all():
            raise ValueError("an action is not a finite number: the policy has diverged")
        order, taken = self._spread("step", slots, chunks)
        seen = {name: _join([share.seen[name] for share in taken], order) for name in taken[0].seen}
        rest = {
            name: _join([getattr(share, name) for share in taken], order)
            for name in Taken._fields[1:]
        }
        return TaskStep(
            self._context(seen), **{name: torch.from_numpy(value) for name, value in rest.items()}
        )

    def render(self, slot: int) -> np.ndarray:
        """The picture that a camera sees, uint8 [H,W,3]."""
        share = slot % len(self._shares)
        place = slot // len(self._shares)
        return self._shares[share].ask("render", place)()

    def close(self) -> None:
        """Gives everything back."""
        for share in self._shares:
            share.close()

    def _spread(self, verb: str, slots: Sequence[int], rows: Any) -> tuple[np.ndarray, list[Any]]:
        """Asks every share for its rows; returns where each of the n rows stands in the answers'
        concatenation, and the answers.
        """
        shares = len(self._shares)
        mine = [
            [row for row, slot in enumerate(slots) if slot % shares == share]
            for share in range(shares)
        ]
        asked = [
            self._shares[share].ask(verb, [slots[row] // shares for row in own], _take(rows, own))
            for share, own in enumerate(mine)
            if own
        ]
        return np.argsort([row for own in mine for row in own]), _answers(asked)

    def _context(self, seen: dict[str, np.ndarray]) -> Context:
        rows = len(next(iter(seen.values())))
        return Context(
            [self._instruction] * rows, {name: raw(value) for name, value in seen.items()}
        )


def raw(values: np.ndarray) -> Tensor:
    """Frames' values as a `Context` has them: pictures' bytes as numbers in [0,1]."""
    found = torch.from_numpy(values)
    return found / 255 if found.dtype == torch.uint8 else found


def _take(rows: Any, own: list[int]) -> Any:
    return rows[own] if isinstance(rows, np.ndarray) else [rows[row] for row in own]


def _join(parts: Sequence[np.ndarray], order: np.ndarray) -> np.ndarray:
    return parts[0][order] if len(parts) == 1 else np.concatenate(parts)[order]


def _answers(asked: Sequence[Callable[[], Any]]) -> list[Any]:
    """Takes all answers, so that none stays in a pipe; then raises the first exception, if any."""
    answers: list[Any] = []
    failed: Exception | None = None
    for answer in asked:
        try:
            answers.append(answer())
        except Exception as error:
            failed = failed or error
    if failed is not None:
        raise failed
    return answers

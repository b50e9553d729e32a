"""Environments under guard: what can't be learned from is stopped where it arises, and named."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from genpolicy.config.outside import outside
from genpolicy.config.schema import Experiment
from genpolicy.contracts.task import Context, ControlTask, Environments, TaskError, TaskStep


class Guarded:
    """The same `genpolicy.contracts.task.Environments`, of which every answer is looked at.

    name: of the task, for the sentences. patience: seconds that one answer may take (see
    `genpolicy.config.outside`). Raises `TaskError` where a reward or an observation is not finite,
    before anybody acts on it or stores it, and where the environments hang or end the program.
    """

    def __init__(self, environments: Environments, name: str, patience: float | None) -> None:
        self.count = environments.count
        self._environments = environments
        self._name = name
        self._patience = patience
        # of the episode in each slot: its reset seed, and the environment steps that it has taken
        self._seed = [0] * self.count
        self._taken = [0] * self.count

    def reset(self, slots: Sequence[int], seeds: Sequence[int]) -> Context:
        with self._outside():
            context = self._environments.reset(slots, seeds)
        for slot, seed in zip(slots, seeds, strict=True):
            self._seed[slot] = seed
            self._taken[slot] = 0
        self._require_finite(slots, context)
        return context

    def step(self, slots: Sequence[int], actions: Tensor) -> TaskStep:
        with self._outside():
            step = self._environments.step(slots, actions)
        wrong = ~step.rewards.isfinite()
        if bool(wrong.any()):
            row, place = wrong.nonzero()[0].tolist()
            self._taken[slots[row]] += place + 1
            raise self._not_finite(slots[row], "its reward", step.rewards[row, place])
        for slot, executed in zip(slots, step.executed.tolist(), strict=True):
            self._taken[slot] += executed
        self._require_finite(slots, step.context)
        return step

    def render(self, slot: int) -> Any:
        with self._outside():
            return self._environments.render(slot)

    def close(self) -> None:
        self._environments.close()

    def _outside(self) -> AbstractContextManager[None]:
        return outside(f"task {self._name}", self._patience, TaskError)

    def _require_finite(self, slots: Sequence[int], context: Context) -> None:
        for name, value in context.observation.items():
            wrong = ~value.isfinite().flatten(1)
            if bool(wrong.any()):
                row = int(wrong.any(1).nonzero()[0])
                first = value.flatten(1)[row][wrong[row]][0]
                raise self._not_finite(slots[row], f"its observation {name}", first)

    def _not_finite(self, slot: int, what: str, value: Tensor) -> TaskError:
        return TaskError(
            f"task {self._name}, environment slot {slot}, step {self._taken[slot]} of the episode"
            f" from reset seed {self._seed[slot]}: {what} is {float(value)}; rewards and"
            " observations must be finite"
        )


def guarded(
    task: ControlTask,
    name: str,
    count: int,
    history: int,
    patience: float | None = Experiment.patience,
) -> Guarded:
    """``count`` environments of the task called ``name``, under guard from their making on."""
    with outside(f"task {name}", patience, TaskError):
        environments = task.environments(count, history)
    return Guarded(environments, name, patience)

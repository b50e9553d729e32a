"""The course of a method of several stages: which one it is in, saved and resumed with the run."""

from collections.abc import Sequence
from typing import Any


class Course:
    """Stages (name, iterations) in order; None iterations: until the budget is spent. hurried: a
    rehearsal gives one iteration to each.
    """

    def __init__(self, stages: Sequence[tuple[str, int | None]]) -> None:
        self.stages = list(stages)
        self.at, self.done, self.hurried = 0, 0, False

    @property
    def stage(self) -> str:
        return self.stages[self.at][0]

    @property
    def progress(self) -> float | None:
        """The share of the stage that is done; None where it has no end of its own."""
        length = self.stages[self.at][1]
        return None if length is None else self.done / length

    def advance(self, through: bool = False) -> bool:
        """An iteration is done (``through``: and with it the stage, early). True where the course
        goes on.
        """
        self.done += 1
        length = self.stages[self.at][1]
        if (
            through
            or (self.hurried and self.at + 1 < len(self.stages))
            or (length is not None and self.done >= length)
        ):
            self.at, self.done = self.at + 1, 0
        return self.at < len(self.stages)

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at, self.done = state["at"], state["done"]

"""The stages of a method: which one a run is in, how far it is, and the optimiser of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from genpolicy.config.schema import OptimizerConfig


@dataclass(frozen=True)
class Stage:
    """One stage of a method.

    name: unique within the method, unless its optimiser's settings are the same.
    iterations: its length; None: until the budget is spent.
    optimizer: the settings of the policy's optimiser, which begins fresh with every stage.
    """

    name: str
    iterations: int | None
    optimizer: OptimizerConfig


class Stages:
    """Stages in their order, and the place of a run among them; saved and resumed with the run.

    hurried: set by a rehearsal, which gives one iteration to each.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.all = list(stages)
        self.at = 0
        self.done = 0
        self.hurried = False

    @property
    def now(self) -> Stage:
        """The stage that the run is in."""
        return self.all[self.at]

    @property
    def progress(self) -> float | None:
        """The share of the stage that is done; None where it has no end of its own."""
        length = None if self.over else self.now.iterations
        return None if length is None else self.done / length

    def advance(self, through: bool = False) -> bool:
        """Count an iteration (``through``: it ended the stage early);
        True where a stage is left.
        """
        self.done += 1
        length = self.now.iterations
        hurried = self.hurried and self.at + 1 < len(self.all)
        if not (through or hurried or (length is not None and self.done >= length)):
            return False
        self.at, self.done = self.at + 1, 0
        return True

    @property
    def over(self) -> bool:
        """True when the last stage has been left."""
        return self.at >= len(self.all)

    def state_dict(self) -> dict[str, Any]:
        """Return the place among the stages."""
        return {"at": self.at, "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a place."""
        self.at, self.done = state["at"], state["done"]

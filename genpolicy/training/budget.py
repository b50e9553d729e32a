"""The budget of a run: what it has spent so far, and which share of its limits that is."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from genpolicy.config.schema import BudgetConfig

LIMITED = {
    "iterations": "iteration",
    "nfe": "evaluations",
    "env_decisions": "env_decisions",
    "env_steps": "env_steps",
    "seconds": "seconds",
}
"""The limit of `BudgetConfig` -> the counter of `Spent` that it bounds."""


@dataclass
class Spent:
    """Counters of training so far, evaluations of the policy aside; of all processes together."""

    iteration: int = 0  # the one that is running, or the last
    seconds: float = 0.0  # the main process's wall clock
    evaluations: float = 0.0  # of networks, in rows
    env_decisions: float = 0.0  # of policies in environments
    env_steps: float = 0.0  # of environments
    over: bool = False  # set by a method that has finished all its stages

    def add(self, seconds: float, evaluations: float, decisions: float, steps: float) -> None:
        """Add an iteration's cost."""
        self.seconds += seconds
        self.evaluations += evaluations
        self.env_decisions += decisions
        self.env_steps += steps

    def share(self, limits: BudgetConfig) -> float:
        """The share of the budget that is spent, by whichever limit is nearest; 1 when over."""
        if self.over:
            return 1.0
        bounds = {counter: getattr(limits, limit) for limit, counter in LIMITED.items()}
        return max(
            (getattr(self, counter) / bound for counter, bound in bounds.items() if bound),
            default=0.0,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return every counter."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set every counter; `KeyError` where one is missing."""
        for field in fields(self):
            setattr(self, field.name, state[field.name])

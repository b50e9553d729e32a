"""The policy that a stage begins with."""

from typing import Any

from genpolicy.training.run import Run


class Anchor:
    """The policy that a stage begins with, to which it is held, and what the one in force came to
    in real episodes (None: not tried): saved and resumed with the run.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.renew()
        run.register(anchor=self)

    def renew(self) -> None:
        """From now on the policy as it stands."""
        self.weights = self.run.weights()
        self.iteration = self.run.iteration
        self.rate: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": self.weights.state_dict(),
            "iteration": self.iteration,
            "rate": self.rate,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights.load_state_dict(state["weights"])
        self.iteration, self.rate = state["iteration"], state["rate"]

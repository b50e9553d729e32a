"""The policy that a stage begins with."""

from typing import Any

import torch

from genpolicy.chain import Trajectory
from genpolicy.learning.objective import mean_kl
from genpolicy.policy.weights import Weights
from genpolicy.training.run import Run


class Anchor:
    """The policy that a stage begins with, to which the stage's policies are held; saved and
    resumed with the run.

    weights: its weights. iteration: the one in which it was taken, which names the starts of real
    episodes. rate: success rate (or mean return) in real episodes of the policy in force; None
    where it has not played any.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.renew()
        run.register(anchor=self)

    def renew(self) -> None:
        """Takes the policy as it stands."""
        self.weights = self.run.weights()
        self.iteration = self.run.iteration
        self.rate: float | None = None

    @torch.no_grad()
    def distance(self, trajectory: Trajectory) -> float:
        """KL of chains that the policy as it stands has drawn from those of the anchor: the sum
        over steps and the chunk, the mean over the decisions of all processes, nats per decision.
        """
        policy = self.run.policy.along(trajectory)
        steps = trajectory.steps
        with self.weights.using():
            then = [policy.scored(policy.transition(trajectory, k)) for k in steps]
        now = [policy.scored(trajectory.acted(k)) for k in steps]
        total = sum(
            float(mean_kl(new, old, reduce="sum").double().sum())
            for new, old in zip(now, then, strict=True)
        )
        counted = torch.tensor([total, len(trajectory)], dtype=torch.float64)
        sums = self.run.processes.reduce(counted)
        return float(sums[0] / sums[1])

    def rate_of(self, in_force: Weights, episodes: int) -> float:
        """The rate of the policy in force, which plays its real ``episodes`` when it is first
        asked for.
        """
        if self.rate is None:
            with in_force.using():
                self.rate = self.run.try_out(episodes, self.iteration)
        return self.rate

    def surpassed(self, in_force: Weights, episodes: int) -> bool:
        """True where the policy as it stands succeeds more often than the one in force in real
        ``episodes``; its rate is then the one to surpass.

        All policies of a stage play from the same starts. Where both always succeed, nothing
        speaks for a change.
        """
        before = self.rate_of(in_force, episodes)
        rate = self.run.try_out(episodes, self.iteration)
        self.run.log("gate/real_gain", rate - before)
        if rate <= before:
            return False
        self.rate = rate
        return True

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": self.weights.state_dict(),
            "iteration": self.iteration,
            "rate": self.rate,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights.load_state_dict(state["weights"])
        self.iteration = state["iteration"]
        self.rate = state["rate"]

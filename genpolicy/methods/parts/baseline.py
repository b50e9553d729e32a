"""A state value learned beside a policy: the baseline of on-policy methods."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from genpolicy.chain import Condition
from genpolicy.config.schema import OptimizerConfig
from genpolicy.learning.advantage import gae
from genpolicy.learning.critic import StateValue
from genpolicy.rollout.rollout import Rollout
from genpolicy.training.run import Run

LEAST = {
    "episodes": 1,
    "epochs": 1,
    "minibatch": 1,
    "critic_epochs": 1,
    "critic_minibatch": 1,
    "warm_up": 0,
}
"""The smallest values of the settings that all methods with this baseline have, by their names."""

OWN_PASS = "the value's pass over"
"""The purpose of the order in which the value passes over a rollout: not the policy's."""


@dataclass(eq=False)
class DecisionValue:
    """V of what a decision sees, with its optimiser; both are saved and resumed with the run.

    sees: the numbers that V is a function of, condition -> [B,``inputs``]; None: the model's
    features alone.
    """

    run: Run
    gamma: float  # discount per environment step
    lam: float  # of GAE, in [0, 1]
    lr: float  # learning rate
    epochs: int  # passes over a rollout's decisions
    minibatch: int  # decisions per update
    sees: Callable[[Condition], Tensor] | None = None
    inputs: int = 0  # how many numbers that are

    def __post_init__(self) -> None:
        """Draws the network's weights from torch's global generator."""
        run = self.run
        inputs = run.features if self.sees is None else self.inputs
        self.value = StateValue(inputs).to(run.policy.model.device)
        self.optimizer = run.new_optimizer(
            self.value.parameters(), OptimizerConfig(lr=self.lr, weight_decay=0.0)
        )
        run.register(value=self.value, value_optimizer=self.optimizer)

    @torch.no_grad()
    def advantage(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """GAE of every decision, and the value's targets A + V; both [R]. Where an episode was cut,
        V of its final observation stands for the rewards after the cut.
        """
        model = self.run.policy.model
        decisions = rollout.decisions

        # V of what every decision saw, and of what came after it
        sees = self.sees or model.features
        now = self.value(sees(rollout.trajectory.condition)).double().cpu()
        after = now.roll(-1)
        if not bool(decisions.terminated[decisions.last].all()):
            final = sees(model.encode(decisions.final))
            after[decisions.last] = self.value(final).double().cpu()

        advantage = gae(
            decisions.rewards,
            decisions.executed,
            now,
            after,
            decisions.terminated,
            decisions.last,
            self.gamma,
            self.lam,
        )
        returns = advantage + now

        # the share of the returns' variance that V explains, over the rows of all processes
        _, variance = self.run.processes.moments(returns)
        _, unexplained = self.run.processes.moments(advantage)
        explained = 1 - unexplained / variance if variance else math.nan
        self.run.log("critic/explained", explained)
        return advantage, returns.float()

    def learn(self, rollout: Rollout, returns: Tensor) -> None:
        """Regresses V on ``returns`` [R]."""
        sees = self.sees or self.run.policy.model.features
        features = sees(rollout.trajectory.condition)
        returns = returns.to(features.device)
        updates = math.ceil(rollout.decisions.total / self.minibatch)
        for batch in self.run.minibatches(rollout, updates, self.epochs, of=OWN_PASS):
            seen = features[batch.rows]
            target = returns[batch.rows]

            def losses(part: slice, seen: Tensor = seen, target: Tensor = target) -> Tensor:
                return (self.value(seen[part]) - target[part]) ** 2

            self.run.descend(losses, len(seen), "critic", self.optimizer)

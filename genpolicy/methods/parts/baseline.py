"""A state value learned beside a policy: what on-policy methods subtract from what happened."""

import math

import torch
from torch import Tensor

from genpolicy.config.schema import OptimizerConfig
from genpolicy.learning.advantage import gae
from genpolicy.learning.critic import StateValue
from genpolicy.rollout.rollout import Rollout
from genpolicy.training.run import Run


class DecisionValue:
    """V of what a decision sees, with its optimiser; both are saved and resumed with the run.

    gamma: discount per environment step. lam: of GAE. lr: of Adam. epochs, minibatch: passes over a
    rollout's decisions, and decisions of one update.
    """

    def __init__(
        self, run: Run, gamma: float, lam: float, lr: float, epochs: int, minibatch: int
    ) -> None:
        self.run, self.gamma, self.lam, self.epochs, self.minibatch = (
            run,
            gamma,
            lam,
            epochs,
            minibatch,
        )
        self.value = StateValue(run.features).to(run.policy.model.device)
        self.optimizer = run.learner(
            self.value.parameters(), OptimizerConfig(lr=lr, weight_decay=0.0)
        )
        run.register(value=self.value, value_optimizer=self.optimizer)

    @torch.no_grad()
    def advantage(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """GAE of every decision, and what the value is to learn from it, A + V; both [R]. Where an
        episode was cut, V of its final observation stands for what would have come.
        """
        d, model = rollout.decisions, self.run.policy.model
        now = self.value(model.features(rollout.trajectory.condition)).double().cpu()
        after = now.roll(-1)
        if not bool(d.terminated[d.last].all()):
            after[d.last] = self.value(model.features(model.encode(d.final))).double().cpu()
        advantage = gae(
            d.rewards, d.executed, now, after, d.terminated, d.last, self.gamma, self.lam
        )
        returns = advantage + now
        spread = float(returns.var(correction=0))
        self.run.log(
            "critic/explained",
            1 - float(advantage.var(correction=0)) / spread if spread else math.nan,
        )
        return advantage, returns.float()

    def learn(self, rollout: Rollout, returns: Tensor) -> None:
        """Regress V on ``returns`` [R]."""
        features = self.run.policy.model.features(rollout.trajectory.condition)
        returns = returns.to(features.device)
        updates = math.ceil(rollout.decisions.total / self.minibatch)
        for batch in self.run.minibatches(rollout, updates, self.epochs):
            x, y = features[batch.rows], returns[batch.rows]
            losses = lambda part, x=x, y=y: (self.value(x[part]) - y[part]) ** 2  # noqa: E731
            self.run.descend(losses, len(x), "critic", self.optimizer)

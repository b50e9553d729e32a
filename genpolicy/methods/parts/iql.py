"""Values of actions, learned from a replay by implicit Q-learning."""

import copy
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from genpolicy.config.schema import OptimizerConfig
from genpolicy.learning.critic import (
    Critic,
    StateValue,
    Support,
    bellman_target,
    expectile_loss,
    pessimistic,
    polyak,
)
from genpolicy.rollout.replay import Replay
from genpolicy.training.run import Run


@dataclass(eq=False)
class ActionValue:
    """Implicit Q-learning (arXiv 2110.06169): Q of decisions and V of what is seen, learned from
    recorded decisions alone.

        V:  | expectile - 1{u < 0} | u^2,   u = lower(Q_target)(s, a) - V(s)
        Q:  ( (1 - w) y + w G - Q(s, a) )^2,
            y = sum_j gamma^j r_j + gamma^n V(s') (1 - terminated)

    lower = mean - pessimism * std over the members (of two members and pessimism 1: their minimum).
    G: the observed return from there to the episode's end, where that is known.

    Networks and optimiser are saved and resumed with the run.
    """

    run: Run
    # discount per environment step, so that a chunk of n steps is discounted by gamma^n and a
    # single step by gamma (the public code raised both to the chunk's length)
    gamma: float
    _: KW_ONLY
    expectile: float = 0.7  # in [0, 1]; RL-100
    members: int = 2  # networks of Q
    pessimism: float = 1.0  # stds that are taken off Q
    # rate per update at which Q_target follows Q. A value travels back one decision in 1 / polyak
    # updates: at the .005 of RL-100 (critic.py) 3000 updates bring a success at the end to the last
    # fifteen of an episode's thirty-odd decisions and leave the others without a value
    polyak: float = 0.05
    # w, the share of G; 0 in IQL. What follows from V alone drifts where observations are encoded
    # pictures and episodes few; G holds it to what happened, at the price of a lean towards the
    # policy that acted (docs/rl100.md)
    monte_carlo: float = 0.0
    lr: float = 3e-4  # learning rate of Q and V
    batch: int = 256  # decisions per update, of all processes together
    support: Support | None = None  # see `Critic`
    # True where Q becomes a part of the policy once it has learned; the part then has its state,
    # and what it begins with follows from the run's seed
    acts: bool = False

    def __post_init__(self) -> None:
        """Draws the networks' weights from torch's global generator."""
        run = self.run
        model = run.policy.model
        self.event_dims = model.scored(torch.zeros(1, *model.event_shape)).numel()
        critic = Critic(run.features, self.event_dims, self.members, support=self.support)
        self.q = critic.to(model.device)
        self.target = copy.deepcopy(self.q).requires_grad_(False)
        self.v = StateValue(run.features).to(model.device)
        parameters = [*self.q.parameters(), *self.v.parameters()]
        self.optimizer = run.new_optimizer(
            parameters, OptimizerConfig(lr=self.lr, weight_decay=0.0, max_grad_norm=10.0)
        )
        run.register(q_target=self.target, v=self.v, q_optimizer=self.optimizer)
        if not self.acts:
            run.register(q=self.q)

    def lower(self, critic: Critic, features: Tensor, event: Tensor) -> Tensor:
        """The pessimistic value of decisions, [B]: features [B,D], event [B,*E]."""
        return pessimistic(critic(features, self.run.policy.model.scored(event)), self.pessimism)

    @torch.no_grad()
    def advantage(self, features: Tensor, event: Tensor) -> Tensor:
        """The advantage lower(Q)(s, a) - V(s), [B]."""
        return self.lower(self.q, features, event) - self.v(features)

    def learn(self, replay: Replay, features: Tensor, updates: int) -> None:
        """Makes ``updates`` updates of Q and V on decisions of the replay, each drawn with the same
        probability.

        features [F,D]: of the replay's views; from now on the networks standardise by them.
        """
        scored = self.run.policy.model.scored
        for critic in (self.q, self.target, self.v):
            critic.scale.fit(features)

        # the observed returns; where an episode's end is not known, V alone tells
        returns = replay.returns(self.gamma).to(features)
        weight = self.monte_carlo * returns.isfinite()
        returns = returns.nan_to_num()

        for rows in self.run.rows(len(replay), (updates, self.batch), "critic"):
            now = features[replay.now[rows]]
            after = features[replay.after[rows]]
            event = replay.event[rows].to(now)

            # the targets of V and of Q
            with torch.no_grad():
                aim = self.lower(self.target, now, event)
                y = bellman_target(
                    replay.rewards[rows].to(now),
                    replay.executed[rows].to(now.device),
                    replay.terminated[rows].to(now.device),
                    self.v(after),
                    self.gamma,
                )
                y = torch.lerp(y, returns[rows], weight[rows])

            def losses(part: slice, now=now, event=event, aim=aim, y=y) -> Tensor:
                value = expectile_loss(aim[part] - self.v(now[part]), self.expectile)
                return value + self.q.loss(now[part], scored(event[part]), y[part]).sum(0)

            self.run.descend(losses, len(rows), "critic", self.optimizer)
            polyak(self.target, self.q, self.polyak)

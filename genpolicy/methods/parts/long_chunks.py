"""Values of what is carried out now, learned from chunks of several decisions (decoupled
Q-chunking, arXiv 2512.10926).
"""

import torch
from torch import Tensor

from genpolicy.config.errors import ConfigError
from genpolicy.config.schema import OptimizerConfig
from genpolicy.learning.critic import (
    Critic,
    StateValue,
    bellman_target,
    expectile_loss,
    polyak,
)
from genpolicy.methods.parts.chunk_critic import mixed_rows
from genpolicy.methods.parts.off_policy import OffPolicy
from genpolicy.training.run import Run


class LongChunks:
    """Q_L of ``length`` decisions together, V, and what they teach the critic of one decision:

        Q_L:  (Q_L(s, a_1 .. a_L) - y)^2,   y = sum_j gamma^j r_j + gamma^m (1 - end) V(s_{+L})
        Q:    | suffix - 1{u < 0} | u^2,    u = mean of Q_L(s, a_1 .. a_L) - Q(s, a_1)
        V:    | optimism - 1{u < 0} | u^2,      u = mean of Q_target(s, a_1) - V(s)

    suffix None: Q regresses on y itself, and there is no Q_L. Q_L, V and their optimiser are saved
    and resumed with the run; Q is the critic's own (`ChunkCritic`).
    """

    def __init__(
        self,
        run: Run,
        world: OffPolicy,
        *,
        length: int,
        gamma: float,
        suffix: float | None,
        optimism: float,
    ) -> None:
        """Draws the networks' weights from torch's global generator."""
        self.run, self.world = run, world
        self.length, self.gamma, self.suffix, self.optimism = length, gamma, suffix, optimism
        settings, model = world.critic.settings, run.policy.model
        if settings.kind != "rlpd" or settings.bins:
            raise ConfigError(
                "method q_chunking: a critic of several decisions (length above 1) has kind rlpd"
                " and no bins"
            )
        dims = length * model.scored(torch.zeros(1, *model.event_shape)).numel()
        self.q = Critic(run.features, dims, settings.members, settings.hidden).to(model.device)
        self.v = StateValue(run.features, settings.hidden).to(model.device)
        self.optimizer = run.new_optimizer(
            [*self.q.parameters(), *self.v.parameters()],
            OptimizerConfig(lr=settings.lr, weight_decay=0.0, max_grad_norm=10.0),
        )
        run.register(long_q=self.q, long_v=self.v, long_optimizer=self.optimizer)

    def learn(self) -> None:
        """Makes the iteration's updates of Q_L, V and Q."""
        run, world = self.run, self.world
        critic, settings = world.critic, world.critic.settings
        scored = run.policy.model.scored
        replay, features = world.experience.replay, world.experience.features
        if run.iteration == 1:
            self.q.scale.fit(features)
            self.v.scale.fit(features)
        long = replay.joined(self.length)
        share, batch, before = settings.offline, settings.batch, world.episodes.before
        batches = mixed_rows(run, len(replay), before, share, world.updates, batch, "critic")
        for rows in batches:
            now, after = features[replay.now[rows]], features[long.after[rows]]
            event = scored(replay.event[rows].to(features))
            chunks = long.event[rows].to(features)
            together = scored(chunks.flatten(0, 1)).reshape(len(rows), -1)
            device = features.device
            with torch.no_grad():
                y = bellman_target(
                    long.rewards[rows].to(features),
                    long.executed[rows].to(device),
                    long.terminated[rows].to(device),
                    self.v(after),
                    self.gamma,
                )
                y = settings.kept(y)
                worth = critic.target(now, event).mean(0)
                taught = y if self.suffix is None else self.q(now, together).mean(0)

            def long_losses(part: slice, now=now, together=together, y=y, worth=worth) -> Tensor:
                loss = expectile_loss(worth[part] - self.v(now[part]), self.optimism)
                if self.suffix is not None:
                    loss = loss + self.q.loss(now[part], together[part], y[part]).sum(0)
                return loss

            def losses(part: slice, now=now, event=event, taught=taught) -> Tensor:
                error = taught[part] - critic.q(now[part], event[part])
                return 2 * expectile_loss(error, 0.5 if self.suffix is None else self.suffix).sum(0)

            run.descend(long_losses, len(rows), "long", self.optimizer)
            run.descend(losses, len(rows), "critic", critic.optimizer)
            polyak(critic.target, critic.q, settings.polyak)

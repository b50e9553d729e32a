"""DSRL (arXiv 2506.15799), diffusion steering: the policy stays as it is, and an actor says from
which noise each decision begins.

    acting   z = bound tanh(N(mean(s), std(s)^2)),   a = g(s, z), the policy's own sampler
    NA       Q(s, a)   -> sum_j gamma^j r_j + gamma^n min_S Q_target(s', g(s', z')),  z' ~ actor
             Q_z(s, z) -> min_m Q_m(s, g(s, z)),   z from N(0, I) and from the actor
    SAC      Q_z(s, z) -> sum_j gamma^j r_j + gamma^n min_S Q_z_target(s', z')
    actor    min E[ alpha log p(z | s) - min_m Q_z(s, z) ],   alpha kept so that H is near target

NA, noise aliasing: many z give the same action, and the critic of actions learns once what is worth
for all of them; it learns from any recorded chunk, while SAC needs the z of each, which
demonstrations do not have. The sampler must draw no noise of its own: a is then a function of z.
What no noise brings out the actor can't find (best of 64 says beforehand what there is).

Differs from the public code (ajwagen/dsrl; its class of NA could not be read): ``bound`` holds in
both forms (there NA is reported to ignore it); what the actor says is drawn, as in training, where
the policy is deployed.
"""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from genpolicy.chain import StandardNormal
from genpolicy.config.errors import ConfigError, at_least, choice, positive, share, unread
from genpolicy.config.schema import OptimizerConfig
from genpolicy.learning.critic import Critic
from genpolicy.learning.squashed import EntropyWeight
from genpolicy.methods.parts.chunk_critic import Valuing, mixed_rows
from genpolicy.methods.parts.off_policy import OffPolicy
from genpolicy.methods.parts.practice import Practice
from genpolicy.policy.parts.noise_actor import NoiseActor
from genpolicy.policy.policy import ChainPolicy
from genpolicy.rollout.replay import Replay
from genpolicy.training.requirements import Needs
from genpolicy.training.run import Run


@dataclass
class DSRL:
    """The settings of DSRL. Defaults without a source are ours; cfg is the public code's folder."""

    form: Literal["na", "sac"] = "na"
    gamma: float = 0.99  # discount per environment step; cfg
    cut_fails: bool = True  # True: nothing comes after an episode that its time limit cut
    bound: float = 1.5  # of every number of z; cfg
    # noises per view whose actions are kept, half of what Q_z of NA learns from
    samples: int = 8
    lr: float = 3e-4  # of the actor and of Q_z in form NA; cfg
    alpha: float = 0.01  # weight of the entropy at first
    # entropy of z, nats; None: d (log bound - 1/2), half of SAC's -d and in units of the bound
    target: float | None = None
    batch: int = 256  # decisions per update; cfg
    practice: Practice = field(default_factory=Practice)  # the episodes
    critic: Valuing = field(default_factory=Valuing)  # Q of NA, Q_z of SAC

    needs: ClassVar[Needs] = Needs(("robots",), split=())

    def __post_init__(self) -> None:
        choice("method dsrl: form", self.form, ("na", "sac"))
        at_least("method dsrl", self, samples=1, batch=2)
        positive("method dsrl", self, "bound", "lr", "alpha")
        share("method dsrl", self, "gamma")
        if self.target is not None and not math.isfinite(self.target):
            raise ConfigError(f"method dsrl: target is {self.target}; it must be finite")
        unread("method dsrl: critic", self.critic, "with the least of the networks", "pessimism")
        if self.form == "sac" and self.critic.kind != "cal_ql":
            unread("method dsrl", self, f"with form sac and kind {self.critic.kind}", "samples")

    def train(self, run: Run) -> None:
        _Steering(self, run).train()


class _Steering:
    """The loop of DSRL, in the verbs of a run."""

    def __init__(self, settings: DSRL, run: Run) -> None:
        self.settings, self.run = settings, run
        if run.policy.chain.noisy:
            raise ConfigError(
                "method dsrl: the chain draws noise of its own, and an action must be a function of"
                " the noise that it begins with: take chain.kernel {name: ddim, eta: 0.0}, or a"
                " solver"
            )
        self.world = OffPolicy(run, settings, ("start",), draws=self._plain)
        if settings.form == "sac" and not settings.practice.first:
            self._noises(self.world.experience.replay)
        model = run.policy.model
        found = run.policy.parts.get("start")
        if found is not None and not isinstance(found, NoiseActor):
            raise ConfigError(
                f"method dsrl: the policy came with a {found.kind}, and a noise_actor can't take"
                " its place: begin with another policy"
            )
        if found is not None and found.settings.bound != settings.bound:
            raise ConfigError(
                f"method dsrl: bound is {settings.bound:g}, and the policy's noise_actor has"
                f" {found.settings.bound:g}: take that, or begin with another policy"
            )
        self.fresh = found is None
        self.actor = found or NoiseActor(run.features, model.event_shape, settings.bound)
        self.actor.to(model.device).requires_grad_(True)
        dims = model.scored(torch.zeros(1, *model.event_shape)).numel()
        usual = dims * (math.log(settings.bound) - 0.5)
        target = usual if settings.target is None else settings.target
        self.entropy = EntropyWeight(settings.alpha, target).to(model.device)
        self.optimizer = run.new_optimizer(
            [*self.actor.parameters(), *self.entropy.parameters()],
            OptimizerConfig(lr=settings.lr, weight_decay=0.0),
        )
        run.register(actor_optimizer=self.optimizer, entropy=self.entropy)
        self.q_z = self.world.critic.q
        if settings.form == "na":
            critic = settings.critic
            self.q_z = Critic(run.features, dims, critic.members, critic.hidden).to(model.device)
            self.q_z_optimizer = run.new_optimizer(
                self.q_z.parameters(), OptimizerConfig(lr=settings.lr, weight_decay=0.0)
            )
            run.register(q_z=self.q_z, q_z_optimizer=self.q_z_optimizer)
        self.asked = 0  # times in this iteration that z' was drawn, which names its noise

    def train(self) -> None:
        learn = self._learn_actions if self.settings.form == "na" else self._learn_noise
        self.world.train(self._begin, lambda: None, learn)

    def _begin(self) -> None:
        """From now on chains begin where the actor says."""
        run, features = self.run, self.world.experience.features
        if run.iteration == 1:
            self.q_z.scale.fit(features)
            if self.fresh:
                self.actor.actor.scale.fit(features)
        run.attach(start=self.actor)

    def _plain(self) -> ChainPolicy:
        """The policy as it came: its chain begins with N(0, I)."""
        policy = self.run.policy
        return replace(policy, chain=replace(policy.chain, prior=StandardNormal()))

    # NA

    def _learn_actions(self) -> None:
        """Updates of Q, and then of Q_z and the actor."""
        self.asked = 0
        self.world.learn(self._carried_out)
        self._steer()

    def _places(self) -> Tensor:
        """The places of this process's rows in a batch of the critic, [b]."""
        return self.run.mine(np.arange(self.settings.critic.batch))

    def _carried_out(self, views: Tensor, features: Tensor) -> Tensor:
        """g(s', z') at views [b], [b,*E]."""
        self.asked += 1
        noise = self.run.noise("z of the targets", self._places(), self.asked)
        conditions = self.world.experience.conditions[views]
        return self.run.policy.sample(conditions, noise, keep=(0, 0)).x0

    def _aliased(self, rows: Tensor, update: int) -> tuple[Tensor, Tensor]:
        """Noises at recorded decisions [b], and what Q says of the actions that they bring, [b,*E]
        and [b]: half of them N(0, I), kept, and half drawn by the actor.
        """
        run, world = self.run, self.world
        views = world.experience.replay.now[rows]
        seen, which = world.experience.seen(rows), (update + rows) % self.settings.samples
        row, place = torch.arange(len(rows)), run.mine(np.arange(self.settings.batch))
        z, a = (of(views)[row, which] for of in (world.samples.starts, world.samples.at))
        fresh = (place % 2 == 0).nonzero().flatten()
        noise = run.noise("z of the actor", place[fresh], update)
        drawn = run.policy.sample(world.experience.conditions[views[fresh]], noise, keep=(0, 0))
        assert drawn.start is not None
        z[fresh], a[fresh] = drawn.start / run.policy.chain.scale, drawn.x0
        return z, world.critic.q(seen, run.policy.model.scored(a)).amin(0)

    # SAC

    def _learn_noise(self) -> None:
        """Updates of Q_z on recorded noises, and then of the actor."""
        world, scale = self.world, self.run.policy.chain.scale
        self.asked = 0
        replay, before = world.experience.replay, world.episodes.before
        known = self._noises(replay)
        noises = replace(replay, event=replay.start / scale)[known.nonzero().flatten()]
        early = int(known[:before].sum())
        world.critic.learn(
            noises,
            world.experience.features,
            early,
            world.updates,
            self._begun,
            world.samples.starts,
        )
        self._steer()

    def _noises(self, replay: Replay) -> Tensor:
        """True for the decisions whose noise is known, [R]. Raises `ConfigError` if none is."""
        known = replay.start.flatten(1).isfinite().all(1)
        if not bool(known.any()):
            raise ConfigError(
                "method dsrl: form sac learns from recorded noises, and what is recorded has none:"
                " let episodes be played first (practice.first), or take form na"
            )
        return known

    @torch.no_grad()
    def _begun(self, views: Tensor, features: Tensor) -> Tensor:
        """z' ~ actor at views [b], [b,*E]."""
        self.asked += 1
        noise = self.run.noise("z of the targets", self._places(), self.asked)
        return self.actor.z(features).sample(noise(0, self.actor.shape).to(features))

    # The actor

    def _steer(self) -> None:
        """Updates of the actor, and of Q_z in form NA."""
        run, settings, world = self.run, self.settings, self.world
        experience, scored = world.experience, run.policy.model.scored
        replay, critic = experience.replay, world.critic
        share, batch = critic.settings.offline, settings.batch
        batches = mixed_rows(
            run, len(replay), world.episodes.before, share, world.updates, batch, "steered"
        )
        for update, rows in enumerate(batches):
            seen = experience.seen(rows)
            if settings.form == "na":
                with torch.no_grad():
                    z, worth = self._aliased(rows, update)

                def noise_losses(part: slice, seen=seen, z=z, worth=worth) -> Tensor:
                    return self.q_z.loss(seen[part], scored(z[part]), worth[part]).sum(0)

                run.descend(noise_losses, len(rows), "noise_critic", self.q_z_optimizer)
            place = run.mine(np.arange(batch))
            eps = run.noise("z that is judged", place, update)(0, self.actor.shape).to(seen)

            def losses(part: slice, seen=seen, eps=eps) -> tuple[Tensor, dict[str, Tensor]]:
                z, log_prob = self.actor.z(seen[part]).drawn(eps[part])
                worth = self.q_z(seen[part], scored(z)).amin(0)
                return self.entropy.loss(scored(log_prob).flatten(1).sum(1), worth)

            run.descend(losses, len(rows), "actor", self.optimizer)
        critic.optimizer.zero_grad()  # the actor's loss reached the critics' networks too

"""Offline evaluation: the gate's score of a policy, computed from recorded decisions alone.

The world is a `TransitionModel` of the features that critics see. A policy is scored there by the Q
of its decisions (AM-Q, RL-100 arXiv 2510.14830), with the sampler that would be deployed.
"""

from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from genpolicy.config.errors import ConfigError
from genpolicy.config.schema import OptimizerConfig
from genpolicy.learning.critic import Critic
from genpolicy.learning.dynamics import TransitionModel, imagined
from genpolicy.methods.parts.iql import ActionValue
from genpolicy.rollout.replay import Replay
from genpolicy.training.run import Run

HELD_OUT = 0.1
"""Share of the episodes by which the model's elites are chosen."""


@dataclass(eq=False)
class OfflineEvaluation:
    """AM-Q of the deployed sampler: the sum over ``horizon`` decisions from ``starts`` recorded
    views of

        Q_low(f_h, a_h) - caution * disagreement(f_h, a_h)

    An imagined episode that succeeds counts from there on what success pays; a second network tells
    when it does. Every comparison is on the same starts and the same luck.
    """

    run: Run
    value: ActionValue  # Q
    _: KW_ONLY
    horizon: int  # decisions per imagined episode
    starts: int  # imagined episodes
    # weight of the disagreement of the model's elites about where a decision leads, in stds of a
    # decision's change; above 0 a policy is not praised for going where the world is unknown
    caution: float
    batch: int = 256  # decisions per update of the model, of all processes together

    def __post_init__(self) -> None:
        """Draws the networks' weights from torch's global generator. Raises `ConfigError` where the
        policy is not conditioned on a vector of features.
        """
        run = self.run
        model = run.policy.model
        with torch.no_grad():
            condition = model.encode(run.collector.example())
            features = model.features(condition)
        if not isinstance(condition, Tensor) or condition.shape != features.shape:
            raise ConfigError(
                "the gate imagines what a policy will see: it needs one that is conditioned on a"
                f" vector of features, and {run.experiment.policy['name']} is not"
            )
        event = self.value.event_dims
        self.model = TransitionModel(run.features, event).to(model.device)
        # the logit of a decision's success
        self.end = Critic(run.features, event).to(model.device)
        settings = OptimizerConfig(lr=1e-3, weight_decay=1e-5, max_grad_norm=10.0)
        self.optimizer = run.new_optimizer(
            [*self.model.parameters(), *self.end.parameters()], settings
        )
        run.register(world=self.model, end=self.end, world_optimizer=self.optimizer)

    def learn(self, replay: Replay, features: Tensor, updates: int) -> None:
        """Fits the model to recorded decisions, each member to its own resampling of them, and logs
        its error on episodes that it has not learned from.

        Where a decision leads is learned from those that something comes after; which decision ends
        an episode by success, from all decisions of the same episodes, the last ones too. features
        [F,D]: of the replay's views.
        """
        scored = self.run.policy.model.scored

        # after an episode's last decision nothing was seen of where a whole chunk leads
        known = ~replay.terminated
        apart = replay.episode[known].unique()[:: round(1 / HELD_OUT)]
        held = torch.isin(replay.episode, apart)
        learn = (known & ~held).nonzero().flatten()
        test = (known & held).nonzero().flatten()
        lived = (~held).nonzero().flatten()
        if not len(learn) or not len(test):
            raise ConfigError(
                "the gate's model needs at least two episodes: one to learn from and one to be"
                " tested on"
            )
        self.model.fit_scale(features[replay.now[learn]], features[replay.after[learn]])
        self.end.scale.fit(features[replay.now[lived]])
        size = updates, self.batch
        drawn = self.run.rows(len(learn), size, "world model")
        ends = self.run.rows(len(lived), size, "ends of episodes")
        bootstrap = self.run.generator("world model bootstrap")
        for rows, decisions in zip(learn[drawn], lived[ends], strict=True):
            # a bootstrap by weights: how often each member draws a row
            weight = self.run.mine(bootstrap.poisson(1.0, (self.model.members, self.batch)))
            now = features[replay.now[rows]]
            after = features[replay.after[rows]]
            event = scored(replay.event[rows].to(now))
            weight = weight.to(now)
            there = features[replay.now[decisions]]
            done = scored(replay.event[decisions].to(now))
            over = (replay.terminated & replay.success)[decisions].to(now)

            def losses(
                part: slice,
                now=now,
                event=event,
                after=after,
                weight=weight,
                there=there,
                done=done,
                over=over,
            ) -> Tensor:
                moving = self.model.loss(now[part], event[part], after[part]) * weight[:, part]
                logit = self.end(there[part], done[part])[0]
                ending = binary_cross_entropy_with_logits(logit, over[part], reduction="none")
                return moving.sum(0) + ending

            self.run.descend(losses, len(rows), "world", self.optimizer)

        now = features[replay.now[test]]
        errors = self.model.hold_out(
            now, scored(replay.event[test].to(now)), features[replay.after[test]]
        )
        agreed = torch.tensor(self.run.processes.agreed(errors.tolist()))
        self.model.choose_elites(agreed)
        self.run.log("world/held_out", float(agreed.min()))

    @torch.no_grad()
    def __call__(self, replay: Replay, features: Tensor) -> Tensor:
        """The score of the policy as it stands from every start, [S], divided by the horizon, so
        that it reads like a value. Each process imagines its share of the starts.
        """
        run = self.run
        deployed = run.deployed
        rows = replay.now[run.rows(len(replay), self.starts, "imagined starts")]
        place = run.mine(np.arange(self.starts))
        noise = run.noise("imagination", place)

        def actor(seen: Tensor, h: int) -> Tensor:
            chain = deployed.sample(seen, noise.at(torch.full_like(place, h)), keep=(0, 0))
            return run.policy.model.scored(chain.x0)

        def score(seen: Tensor, event: Tensor) -> Tensor:
            value = self.value.lower(self.value.q, seen, event)
            return value - self.caution * self.model.disagreement(seen, event)

        def ends(seen: Tensor, event: Tensor) -> Tensor:
            return self.end(seen, event)[0].sigmoid()

        # what success pays, and the sum along the way
        over = replay.terminated & replay.success
        pays = float(replay.rewards[over].sum(1).mean()) if bool(over.any()) else 0.0
        totals = features.new_zeros(self.starts)
        if len(place):
            starts = features[rows]
            mine = imagined(actor, score, self.model, starts, self.horizon, noise, ends, pays)
            totals[place.to(totals.device)] = mine

        # every start is 0 but in the process that imagined it
        return run.processes.reduce(totals) / self.horizon

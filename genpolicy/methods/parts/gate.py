"""Offline evaluation: is a policy better than the one in force, as far as recorded experience can
tell?

The world is a `TransitionModel` of the features that critics see; a policy is judged there by what
Q says along the way (AM-Q, RL-100 arXiv 2510.14830), with the sampler that would be deployed.
"""

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

GATE = 1 << 40
"""Added to the iteration in the names of noise here: no rollout has these."""
HELD_OUT = 0.1
"""Share of the episodes by which the model's elites are chosen."""


class OfflineEvaluation:
    """AM-Q of the deployed sampler: sum over ``horizon`` decisions from ``starts`` recorded views
    of

        Q_low(f_h, a_h) - caution * disagreement(f_h, a_h)

    disagreement: of the model's elites about where the decision leads, in stds of a decision's
    change: a policy is not to be praised for going where the world is unknown. An imagined episode
    that succeeds counts from there on what success pays: a second network says when. Every
    comparison is on the same starts and the same luck.
    """

    def __init__(
        self,
        run: Run,
        value: ActionValue,
        *,
        horizon: int,
        starts: int,
        caution: float,
        batch: int = 256,
    ) -> None:
        self.run, self.value, self.horizon, self.starts, self.caution = (
            run,
            value,
            horizon,
            starts,
            caution,
        )
        self.batch = batch
        with torch.no_grad():
            condition = run.policy.model.encode(run.collector.example())
            if (
                not isinstance(condition, Tensor)
                or condition.shape != run.policy.model.features(condition).shape
            ):
                raise ConfigError(
                    "the gate imagines what a policy will see: it needs one that is conditioned on a vector of features, and"
                    f" {run.experiment.policy['name']} is not"
                )
        event = run.policy.model.scored(torch.zeros(1, *run.policy.model.event_shape)).numel()
        self.model = TransitionModel(run.features, event).to(run.policy.model.device)
        self.end = Critic(run.features, event).to(
            run.policy.model.device
        )  # the logit of a decision's success
        settings = OptimizerConfig(lr=1e-3, weight_decay=1e-5, max_grad_norm=10.0)
        self.optimizer = run.learner([*self.model.parameters(), *self.end.parameters()], settings)
        run.register(world=self.model, end=self.end, world_optimizer=self.optimizer)

    def learn(self, replay: Replay, features: Tensor, updates: int) -> None:
        """Fit the model to decisions; each member is shown its own resampling of them. Logs its
        held-out error.
        """
        scored = self.run.policy.model.scored
        known = (
            (~replay.terminated).nonzero().flatten()
        )  # of the others, what a whole chunk leads to was not seen
        held = replay.episode[known].unique(return_inverse=True)[1] % round(1 / HELD_OUT) == 0
        learn, test = known[~held], known[held]
        if not len(learn) or not len(test):
            raise ConfigError(
                "the gate's model needs at least two episodes: one to learn from and one to be tested on"
            )
        self.model.fit_scale(features[replay.now[learn]], features[replay.after[learn]])
        self.end.scale.fit(features[replay.now[learn]])
        drawn = self.run.rows(len(learn), (updates, self.batch), "world model")
        bootstrap = self.run.generator("world model bootstrap")
        for rows in learn[drawn]:
            # a bootstrap by weights: how often each member draws a row
            weight = self.run.mine(bootstrap.poisson(1.0, (self.model.members, self.batch)))
            now, after = features[replay.now[rows]], features[replay.after[rows]]
            event, weight = scored(replay.event[rows].to(now)), weight.to(now)
            over = (replay.terminated & replay.success)[rows].to(now)

            def losses(
                part: slice, now=now, event=event, after=after, weight=weight, over=over
            ) -> Tensor:
                ending = binary_cross_entropy_with_logits(
                    self.end(now[part], event[part])[0], over[part], reduction="none"
                )
                return (self.model.loss(now[part], event[part], after[part]) * weight[:, part]).sum(
                    0
                ) + ending

            self.run.descend(losses, len(rows), "world", self.optimizer)
        now, after = features[replay.now[test]], features[replay.after[test]]
        errors = self.model.hold_out(now, scored(replay.event[test].to(now)), after)
        self.model.choose_elites(errors)
        self.run.log("world/held_out", float(errors.min()))

    @torch.no_grad()
    def __call__(self, replay: Replay, features: Tensor) -> Tensor:
        """The policy as it stands, from every start, [S]; per decision, so that it reads like a
        value.
        """
        run, deployed = self.run, self.run.deployed
        drawn = run.generator("imagined starts").integers(len(replay), size=self.starts)
        rows = replay.now[torch.from_numpy(drawn)]
        name = torch.arange(self.starts)
        noise = run.noise("imagination", name)

        def actor(seen: Tensor, h: int) -> Tensor:
            chain = deployed.sample(seen, noise.at(torch.full_like(name, h)), keep=(0, 0))
            return run.policy.model.scored(chain.x0)

        def score(seen: Tensor, event: Tensor) -> Tensor:
            value = self.value.lower(self.value.q, seen, event)
            return value - self.caution * self.model.disagreement(seen, event)

        def ends(seen: Tensor, event: Tensor) -> Tensor:
            return self.end(seen, event)[0].sigmoid()

        over = replay.terminated & replay.success
        pays = float(replay.rewards[over].sum(1).mean()) if bool(over.any()) else 0.0
        starts = features[rows]
        return (
            imagined(actor, score, self.model, starts, self.horizon, noise, ends, pays)
            / self.horizon
        )

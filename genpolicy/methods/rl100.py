"""RL-100 (arXiv 2510.14830): imitation, offline RL behind a gate, online RL; PPO through the
denoising chain throughout.

    imitation   pi <- IL(demonstrations)
    offline     D <- D + episodes of pi;  [pi <- IL(D)]
                Q, V <- IQL(D);  T <- transition model(D)
                candidate <- PPO(pi, A = Q - mean of Q at other samples, or Q - V) at recorded states
                pi <- candidate where the gate lets it through
    online      pi <- PPO(pi, A = GAE);  V goes on from the offline one

    loss = mean over the K' steps of  max(-A rho_k, -A clip(rho_k, 1-eps, 1+eps)) + beta KL(pi || pi at the stage's start)

rho_k: ratio of step k's transition, log-probabilities summed over the chunk; one advantage for all
steps of a chain, not discounted over them. Gate: J = E sum_h Q(s_h, a_h) in imagination
(`genpolicy.methods.parts.gate`), with the sampler that is deployed; a candidate that is refused is
undone to the bit. Clip the kernel's std with chain.kernel {name: floorstd, floor: 0.1, kernel:
{name: clipstd, high: 0.8, kernel: {name: ddim, eta: 1.0}}}: the direction term of the mean goes
with it. A decision is a chunk, or with policy.chunk 1 a single action, discounted by gamma to the
number of steps it took.

Differs from the public code (hesic73/RL-100): its gate never undoes a candidate; scores TD
residuals, which telescope, in the place of Q; and samples there with the unclipped std. Here the KL
holds the policy to where Q was learned: without it the gate's score rises while success falls
(docs/rl100.md), because both believe the same Q.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor

from genpolicy.chain.values import Gaussian
from genpolicy.config.errors import ConfigError, at_least, positive, share
from genpolicy.config.schema import OptimizerConfig
from genpolicy.contracts.model import ControlModel
from genpolicy.learning.acceptance import Comparison, compare
from genpolicy.learning.advantage import leave_one_out
from genpolicy.learning.objective import Scored, clip_metrics, clipped_surrogate, log_ratio, mean_kl
from genpolicy.methods.parts.anchor import Anchor
from genpolicy.methods.parts.gate import OfflineEvaluation
from genpolicy.methods.parts.imitation import Cloning, Imitation, recorded
from genpolicy.methods.parts.iql import ActionValue
from genpolicy.methods.parts.offline_data import Experience
from genpolicy.methods.parts.online import Online, OnPolicy
from genpolicy.policy.parts.best_of import BestOf
from genpolicy.policy.weights import Weights
from genpolicy.rollout.minibatch import Batch
from genpolicy.rollout.rollout import Rollout
from genpolicy.training.requirements import Needs
from genpolicy.training.run import Loss, Run
from genpolicy.training.stages import Stage

AT_ONCE = 100
"""Updates of one iteration of recloning."""


@dataclass
class Offline:
    """rounds: times that data is collected and learned from (M). episodes: of the policy, per
    round; 0 learns from the data section alone. demonstrations: whether the data section counts for
    Q; where there is much of it and all succeeds, Q learns that to act like it is what succeeds
    (docs/rl100.md). recloning: updates of imitation on everything that succeeded, in every round
    (0: none), in hundreds. critic_updates: of Q and V (IQL: ``expectile`` .7; ``polyak``, .005
    there, and ``monte_carlo``: see `ActionValue`), with ``members`` of Q read as mean -
    ``pessimism`` * std (2 and 1: their minimum). model_updates: of the gate's model.

    candidates: of a round, at most. sweeps: of a candidate, each ``states`` recorded decisions, at
    which ``samples`` chains are drawn anew and passed over ``epochs`` times in minibatches of
    ``minibatch`` (decision, step) pairs. One sample learns from A = Q - V as published; of several
    each is held against the others, A_i = Q_i - mean of the others: what two networks make of a
    state varies twice as much as what actions change there, and does not repeat from one critic to
    the next (docs/rl100.md). lr, clip (.2 to .25). kl: beta. far: a candidate whose chains' KL from
    the stage's first policy (nats a decision, summed over the steps) exceeds this is refused, and
    the round ends.

    delta: what a candidate must gain, as a share of |J| (RL-100's .05 refuses candidates that are
    twice as good: docs/rl100.md); -1 asks for nothing, where the score is not to be trusted and
    real episodes decide. z: standard errors that are taken off its gain. horizon: imagined
    decisions; starts: imagined episodes. caution: per std of the model's disagreement. check: real
    episodes of every candidate that is let through, and of the policy in force, from the same
    starts (0: the person does not allow it); the one that succeeds more often stays.

    best_of: N of the sampler that picks the best of N samples by Q, evaluated beside the others: it
    needs no training.
    """

    rounds: int = 1
    episodes: int = 200
    demonstrations: bool = True
    recloning: int = 0
    critic_updates: int = 3000
    expectile: float = 0.7
    polyak: float = 0.05
    monte_carlo: float = 0.0
    members: int = 2
    pessimism: float = 1.0
    model_updates: int = 1000
    candidates: int = 2
    sweeps: int = 10
    states: int = 256
    samples: int = 4
    epochs: int = 2
    minibatch: int = 1024
    lr: float = 1e-4
    clip: float = 0.2
    kl: float = 0.1
    far: float = 10.0
    delta: float = 0.0
    z: float = 2.0
    horizon: int = 20
    starts: int = 512
    caution: float = 0.0
    check: int = 0
    best_of: int = 16

    def __post_init__(self) -> None:
        least = {
            "rounds": 1,
            "episodes": 0,
            "recloning": 0,
            "critic_updates": 1,
            "members": 1,
            "model_updates": 1,
        }
        least |= {
            "pessimism": 0,
            "candidates": 1,
            "sweeps": 1,
            "states": 2,
            "samples": 1,
            "epochs": 1,
            "minibatch": 1,
            "kl": 0,
        }
        least |= {
            "delta": -1,
            "z": 0,
            "horizon": 1,
            "starts": 2,
            "caution": 0,
            "check": 0,
            "best_of": 1,
        }
        at_least("method rl100: offline", self, **least)
        positive("method rl100: offline", self, "lr", "clip", "far", "polyak")
        share("method rl100: offline", self, "expectile", "polyak", "monte_carlo")
        if not (self.demonstrations or self.episodes):
            raise ConfigError(
                "method rl100: offline: without demonstrations and episodes there is nothing to learn from"
            )


@dataclass
class RL100:
    """stage: "all", or one of the three on what the policy and data sections name.

    gamma: per environment step (.99 there). cut_fails: nothing comes after an episode that its time
    limit cut, so that values are the chance of success within it. With both defaults a decision is
    worth what it adds to that chance; with .99 and a value after the cut, haste is worth more than
    success (docs/rl100.md).

    update: what one optimiser step sees: "pairs" of random decisions and steps, whole "chain"s of
    random decisions, or random decisions at one "step" after the other (the public code). The
    budget is of the whole run; online RL goes on until it is spent. Policies of the stages' ends
    are kept in stages/, each evaluated as it was deployed.
    """

    stage: Literal["all", "imitation", "offline", "online"] = "all"
    gamma: float = 0.999
    cut_fails: bool = True
    update: Literal["pairs", "chain", "step"] = "pairs"
    imitation: Cloning = field(default_factory=Cloning)
    offline: Offline = field(default_factory=Offline)
    online: Online = field(default_factory=Online)

    def __post_init__(self) -> None:
        share("method rl100", self, "gamma")

    @property
    def needs(self) -> Needs:
        """Robots; demonstrations to imitate; likelihoods for PPO."""
        imitates, improves = self.stage in ("all", "imitation"), self.stage != "imitation"
        return Needs(("robots",), data=imitates, likelihoods=improves)

    def train(self, run: Run) -> None:
        _Pipeline(self, run).train()


class _Pipeline:
    """The stages, in the verbs of a run."""

    def __init__(self, settings: RL100, run: Run) -> None:
        self.s, self.run = settings, run
        self.model = cast(ControlModel, run.policy.model)
        stages = self._stages()
        run.plan(stages)
        names = [stage.name for stage in stages]
        self.anchor = Anchor(run)
        if "improve" in names:
            o = settings.offline
            self.experience = Experience(run, settings.cut_fails, own=not o.demonstrations)
            self.value = ActionValue(
                run,
                settings.gamma,
                expectile=o.expectile,
                polyak=o.polyak,
                monte_carlo=o.monte_carlo,
                members=o.members,
                pessimism=o.pessimism,
            )
            self.evaluation = OfflineEvaluation(
                run, self.value, horizon=o.horizon, starts=o.starts, caution=o.caution
            )
            self.critic = BestOf(self.value.q, o.pessimism)
        if "online" in names:
            self.on_policy = OnPolicy(
                run, settings.online, settings.gamma, settings.cut_fails, self.anchor
            )

    def _stages(self) -> list[Stage]:
        """The stages in order, each with its optimiser."""
        s, o = self.s, self.s.offline
        course: list[tuple[str, int | None]] = []
        if s.stage in ("all", "imitation"):
            course.append(("imitate", s.imitation.iterations))
        if s.stage in ("all", "offline"):
            for _ in range(o.rounds):
                course += [("collect", 1)] if o.episodes else []
                course += [("reclone", math.ceil(o.recloning / AT_ONCE))] if o.recloning else []
                course += [("criticise", 1), ("improve", o.candidates)]
        if s.stage in ("all", "online"):
            course.append(("online", None))
        optimizers = self._optimizers()
        return [Stage(name, iterations, optimizers[name]) for name, iterations in course]

    def _optimizers(self) -> dict[str, OptimizerConfig]:
        """Each stage's, with the experiment's own betas, eps, decay and norm."""
        common = self.run.experiment.optimizer
        plain = replace(common, warmup=0, final=1.0, ema=0.0)
        return {
            **dict.fromkeys(("imitate", "reclone"), self.s.imitation.optimizer(common)),
            **dict.fromkeys(("collect", "criticise"), plain),
            "improve": replace(plain, lr=self.s.offline.lr),
            "online": self.s.online.optimizer(common),
        }

    def train(self) -> None:
        run = self.run
        for _ in run.iterations():
            stage = run.stages.now.name
            # a resumed run takes its critic up before a stage changes it
            there = "best_of" in run.state.unclaimed
            if there or (stage in ("improve", "online") and self.s.stage != "online"):
                run.attach(best_of=self.critic)
            run.advance(getattr(self, stage)(), self._leave)

    def _leave(self, stage: str) -> None:
        """End a stage."""
        run = self.run
        if stage in ("imitate", "reclone"):
            run.milestone("imitation" if stage == "imitate" else "recloned")
        if stage == "criticise":
            self.anchor.renew()
            run.attach(best_of=self.critic)
            run.milestone(f"best_of_{self.s.offline.best_of}", self.s.offline.best_of)
        if stage == "improve":
            run.milestone("offline")
            self.anchor.renew()
            if self.s.stage == "all":
                self.on_policy.critic.value.load_state_dict(self.value.v.state_dict())

    # Imitation

    def imitate(self) -> bool:
        """pi <- IL(demonstrations); the encoder learns here, and nowhere else."""
        run, i = self.run, self.s.imitation
        assert run.data is not None
        Imitation(run, recorded(run.data, self.model), len(run.data), i.batch)(i.updates)
        return False

    def reclone(self) -> bool:
        """pi <- IL(everything that succeeded), from where it stands; the encoder learns again, and
        then rests.
        """
        rows = int(self.experience.everything.success.sum())
        if rows:
            Imitation(self.run, self.experience.imitable, rows, self.s.imitation.batch)(AT_ONCE)
            self.experience.renew()
        return False

    # Offline

    def collect(self) -> bool:
        """D <- D + episodes of pi, noise and all."""
        self.run.collect(self.s.offline.episodes, 1, keep=True)
        self.experience.add(self.run.iteration)
        return False

    def criticise(self) -> bool:
        """Q, V <- IQL(D);  T <- transition model(D)."""
        e, o = self.experience, self.s.offline
        self.value.learn(e.replay, e.features, o.critic_updates)
        self.evaluation.learn(e.replay, e.features, o.model_updates)
        return False

    def improve(self) -> bool:
        """candidate <- PPO(pi, A); pi <- candidate, or as it was. True: the stage is through before
        its time.
        """
        run, o, point = self.run, self.s.offline, self.run.save_point()
        for sweep in range(o.sweeps):
            rollout, index = self.experience.redraw(o.states, sweep, o.samples)
            rollout = run.verified(rollout, self.log_ratio, o.clip / 10)
            advantage = self.value.advantage(self.experience.seen(index), rollout.trajectory.x0)
            if o.samples > 1:
                advantage = leave_one_out(advantage.view(-1, o.samples)).flatten()
            loss = partial(self.loss, clip=o.clip, kl=o.kl)
            self._learn(
                rollout,
                run.normalised(advantage.cpu()),
                o.epochs,
                o.minibatch,
                loss,
                self.anchor.weights,
            )
        run.keep(f"candidate-{run.iteration}")
        away = self._distance()
        verdict = self._verdict(point)
        far, better = away > o.far, verdict.accepts(o.delta, o.z)
        kept = better and not far and (not o.check or self._checked(point))
        run.log("gate/gain", verdict.difference)
        run.log("gate/error", verdict.error)
        run.log("gate/value", verdict.old)
        run.log("gate/distance", away)
        run.log("gate/accepted", float(kept))
        if not kept:
            run.rewind(point)
        return far

    def _verdict(self, point: tuple[Weights, Any]) -> Comparison:
        """The candidate against the policy in force, in imagination."""
        e = self.experience
        new = self.evaluation(e.replay, e.features)
        with point[0].using():
            old = self.evaluation(e.replay, e.features)
        return compare(new, old)

    @torch.no_grad()
    def _distance(self) -> float:
        """KL of pi's chains from those of the stage's first policy, nats a decision: sum_k KL, at
        recorded decisions.
        """
        run = self.run
        trajectory = self.experience.redraw(self.s.offline.states, self.s.offline.sweeps)[
            0
        ].trajectory
        with self.anchor.weights.using():
            then = [
                run.policy.scored(run.policy.transition(trajectory, k)) for k in trajectory.steps
            ]
        now = [run.policy.scored(trajectory.acted(k)) for k in trajectory.steps]
        total = sum(
            float(mean_kl(a, b, reduce="sum").double().sum())
            for a, b in zip(now, then, strict=True)
        )
        sums = run.processes.reduce(torch.tensor([total, len(trajectory)], dtype=torch.float64))
        return float(sums[0] / sums[1])

    def _checked(self, point: tuple[Weights, Any]) -> bool:
        """Real episodes, from the same starts for every policy of the stage: the candidate succeeds
        more often than the policy in force; where both always do, nothing speaks for a change.
        """
        run, anchor, episodes = self.run, self.anchor, self.s.offline.check
        if anchor.rate is None:
            with point[0].using():
                anchor.rate = run.try_out(episodes, anchor.iteration)
        rate = run.try_out(episodes, anchor.iteration)
        run.log("gate/real_gain", rate - anchor.rate)
        if rate <= anchor.rate:
            return False
        anchor.rate = rate
        return True

    # Online

    def online(self) -> bool:
        """pi <- PPO(pi, A = GAE), and V."""
        run, o = self.run, self.s.online
        rollout, advantage, returns = self.on_policy.rollout(self.log_ratio)
        if self.run.stages.done >= o.warm_up:
            loss = partial(self.loss, clip=o.clip, kl=0.0)
            self._learn(rollout, run.normalised(advantage), o.epochs, o.minibatch, loss, None)
        self.on_policy.critic.learn(rollout, returns)
        return False

    # PPO through the chain

    def _learn(
        self,
        rollout: Rollout,
        advantage: Tensor,
        epochs: int,
        minibatch: int,
        loss: Loss,
        reference: Weights | None,
    ) -> None:
        """``epochs`` passes over a rollout."""
        for epoch in range(epochs):
            for batch in self._batches(rollout, minibatch, epoch):
                self.run.update(rollout, batch, advantage, loss, reference)

    def _batches(self, rollout: Rollout, minibatch: int, epoch: int) -> Iterator[Batch]:
        """What each optimiser step of a pass sees: ``minibatch`` (decision, step) pairs."""
        run, decisions, steps = self.run, rollout.decisions.total, rollout.trajectory.steps
        if self.s.update == "pairs":
            yield from run.pairs(rollout, math.ceil(decisions * len(steps) / minibatch), epoch)
        elif self.s.update == "chain":
            yield from run.chains(rollout, math.ceil(decisions * len(steps) / minibatch), epoch)
        else:
            for chains in run.chains(rollout, math.ceil(decisions / minibatch), epoch):
                rows = cast(Tensor, chains.rows)[:: len(steps)]
                for k in steps:
                    yield Batch(rows, torch.full_like(rows, k))

    def log_ratio(self, new: Gaussian, old: Gaussian, x: Tensor) -> Tensor:
        """Summed over the chunk: the ratio of the transition's densities."""
        return log_ratio(new, old, x, reduce="sum")

    def loss(self, step: Scored, clip: float, kl: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of b pairs, [b], and its metrics [b]."""
        log_rho = self.log_ratio(step.new, step.old, step.x)
        surrogate = clipped_surrogate(log_rho, step.advantage, clip)
        metrics = clip_metrics(log_rho, step.advantage, surrogate)
        if step.reference is None:
            return surrogate.loss, metrics
        away = mean_kl(step.new, step.reference, reduce="sum")
        return surrogate.loss + kl * away, {**metrics, "kl": away.detach()}

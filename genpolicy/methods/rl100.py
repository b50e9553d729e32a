"""RL-100 (arXiv 2510.14830): imitation, offline RL behind a gate, online RL; PPO through the
denoising chain throughout.

    imitation   pi <- IL(demonstrations)
    offline     D <- D + episodes of pi;  [pi <- IL(D)]
                Q, V <- IQL(D);  T <- transition model(D)
                candidate <- PPO(pi, A) at recorded states,
                    A = Q - mean of Q at other samples, or Q - V
                pi <- candidate where the gate lets it through
    online      pi <- PPO(pi, A = GAE);  V goes on from the offline one
                [student <- regression on pi]

    loss = mean over the K' steps of
               max(-A rho_k, -A clip(rho_k, 1-eps, 1+eps)) + beta KL(pi || pi at the stage's start)

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
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from torch import Tensor

from genpolicy.config.errors import ConfigError, share
from genpolicy.learning.advantage import leave_one_out
from genpolicy.learning.objective import Scored, mean_kl
from genpolicy.methods.parts.anchor import Anchor
from genpolicy.methods.parts.follower import Follower, Following
from genpolicy.methods.parts.imitation import Cloning, Imitation, recorded
from genpolicy.methods.parts.online import Online, OnPolicy
from genpolicy.methods.parts.pipeline import constant, train_stages
from genpolicy.methods.parts.ppo import Update, batches, chunk_log_ratio, ppo_loss
from genpolicy.methods.parts.rl100_settings import Offline
from genpolicy.policy.parts.best_of import BestOf
from genpolicy.policy.policy import Part
from genpolicy.policy.weights import Weights
from genpolicy.rollout.rollout import Rollout
from genpolicy.training.requirements import Needs
from genpolicy.training.run import Run
from genpolicy.training.stages import Stage

AT_ONCE = 100
"""Updates per iteration of recloning."""


@dataclass
class RL100:
    """The settings of RL-100. Defaults without a source are ours.

    The budget is of the whole run; online RL goes on until it is spent. Policies of the stages'
    ends are kept in stages/, each evaluated as it was deployed.
    """

    # "all", or one of the three on what the policy and data sections name
    stage: Literal["all", "imitation", "offline", "online"] = "all"
    # discount per environment step; with the .99 of RL-100 haste is worth more than success
    # (docs/rl100.md)
    gamma: float = 0.999
    # True: nothing comes after an episode that its time limit cut, so that a decision is worth what
    # it adds to the chance of success within the limit
    cut_fails: bool = True
    # what one optimiser step sees: "pairs" of random decisions and steps, whole "chain"s of random
    # decisions, or random decisions at one "step" after the other (the public code)
    update: Update = "pairs"
    imitation: Cloning = field(default_factory=Cloning)  # the first stage
    offline: Offline = field(default_factory=Offline)  # the second
    online: Online = field(default_factory=Online)  # the third
    # a student of one step that follows the policy through it, kept as stages/student
    student: Following = field(default_factory=Following)

    def __post_init__(self) -> None:
        share("method rl100", self, "gamma")
        if self.student.updates and self.stage not in ("all", "online"):
            raise ConfigError(
                f"method rl100: student.updates is {self.student.updates}, and stage {self.stage}"
                " has no online iterations in which it could follow: leave it out, and distil what"
                " the stage returns with method consistency"
            )

    @property
    def needs(self) -> Needs:
        """Robots; demonstrations to imitate; likelihoods for PPO."""
        imitates = self.stage in ("all", "imitation")
        improves = self.stage != "imitation"
        return Needs(("robots",), data=imitates, likelihoods=improves)

    def train(self, run: Run) -> None:
        _Pipeline(self, run).train()


class _Pipeline:
    """The stages, in the verbs of a run."""

    def __init__(self, settings: RL100, run: Run) -> None:
        self.settings = settings
        self.run = run
        stages = self._stages()
        run.plan(stages)
        names = [stage.name for stage in stages]
        if "collect" in names:
            run.require_split("method: offline.episodes", settings.offline.episodes)
        # under a floor the stage's first policy plays what is left over
        if "online" in names and not settings.online.floor:
            run.require_split("method: online.episodes", settings.online.episodes)
        self.anchor = Anchor(run)
        self.follower = Follower(run, settings.student) if settings.student.updates else None
        self.parts: dict[str, Part] = {}
        if "improve" in names:
            self.offline = settings.offline.learner(run, settings.gamma, settings.cut_fails)
            self.critic = BestOf(self.offline.value.q, settings.offline.pessimism)
            self.parts = {"best_of": self.critic}
        if "online" in names:
            self.on_policy = OnPolicy(
                run, settings.online, settings.gamma, settings.cut_fails, self.anchor
            )

    def _stages(self) -> list[Stage]:
        """The stages in order; each has the experiment's optimiser at its own learning rate."""
        settings = self.settings
        offline = settings.offline
        common = self.run.experiment.optimizer
        cloning = settings.imitation.optimizer(common)
        plain = constant(common)
        stages: list[Stage] = []
        if settings.stage in ("all", "imitation"):
            stages.append(Stage("imitate", settings.imitation.iterations, cloning))
        for _ in range(offline.rounds if settings.stage in ("all", "offline") else 0):
            if offline.episodes:
                stages.append(Stage("collect", 1, plain))
            if offline.recloning:
                stages.append(Stage("reclone", math.ceil(offline.recloning / AT_ONCE), cloning))
            stages.append(Stage("criticise", 1, plain))
            stages.append(Stage("improve", offline.candidates, replace(plain, lr=offline.lr)))
        if settings.stage in ("all", "online"):
            stages.append(Stage("online", None, settings.online.optimizer(common)))
        return stages

    def train(self) -> None:
        acts = {
            "imitate": self.imitate,
            "collect": self.collect,
            "reclone": self.reclone,
            "criticise": self.criticise,
            "improve": self.improve,
            "online": self.online,
        }
        train_stages(self.run, acts, self._leave, self.parts, self._ready)
        if self.follower is not None:
            self.follower.keep()

    def _ready(self) -> None:
        """Refuses data that can't be valued beside the task's rewards."""
        if self.parts:
            self.offline.experience.require_one_reward()

    def _leave(self, stage: str) -> None:
        """Ends a stage."""
        run = self.run
        best_of = self.settings.offline.best_of
        if stage in ("imitate", "reclone"):
            run.milestone("imitation" if stage == "imitate" else "recloned")
        if stage == "criticise":
            self.anchor.renew()
            run.attach(best_of=self.critic)
            run.milestone(f"best_of_{best_of}", best_of)
        if stage == "improve":
            run.milestone("offline")
            self.anchor.renew()
            if self.settings.stage == "all":
                self.on_policy.begin_with(self.offline.value.v)

    # Imitation

    def imitate(self) -> None:
        """pi <- IL(demonstrations); the encoder learns here, and nowhere else."""
        run = self.run
        settings = self.settings.imitation
        assert run.data is not None
        source = recorded(run.data, run.policy.model)
        Imitation(run, source, len(run.data), settings.batch)(settings.updates)

    def reclone(self) -> None:
        """pi <- IL(everything that succeeded), from where it stands; the encoder learns again, and
        then rests.
        """
        experience = self.offline.experience
        rows = int(experience.everything.success.sum())
        if rows:
            Imitation(self.run, experience.imitable, rows, self.settings.imitation.batch)(AT_ONCE)
            experience.renew()

    # Offline

    def collect(self) -> None:
        """D <- D + episodes of pi, noise and all."""
        self.run.collect(self.settings.offline.episodes, 1, keep=True)
        self.offline.experience.add(self.run.iteration)

    def criticise(self) -> None:
        """Q, V <- IQL(D);  T <- transition model(D)."""
        settings = self.settings.offline
        self.offline.learn(settings.critic_updates, settings.model_updates)

    def improve(self) -> bool:
        """candidate <- PPO(pi, A); pi <- candidate, or as it was. True: the stage is through before
        its time.
        """
        run = self.run
        settings = self.settings.offline
        point = run.save_point()

        # the candidate
        states = settings.states
        samples = settings.samples
        tolerance = settings.clip / 10
        for sweep in range(settings.sweeps):
            rollout, advantage = self.offline.redraw(states, sweep, samples, tolerance)
            if samples > 1:
                advantage = leave_one_out(advantage.view(-1, samples)).flatten()
            better = run.normalised(advantage.cpu())
            self._learn(rollout, better, settings, self.anchor.weights, sweep)
        run.keep(f"candidate-{run.iteration}")

        # the gate
        distance = self._distance()
        too_far = distance > settings.far
        verdict = self.offline.verdict(point[0])
        kept = verdict.accepts(settings.delta, settings.z) and not too_far
        if kept and settings.check:
            kept = self.anchor.surpassed(point[0], settings.check)
        run.log("gate/gain", verdict.difference)
        run.log("gate/error", verdict.error)
        run.log("gate/value", verdict.old)
        run.log("gate/distance", distance)
        run.log("gate/accepted", float(kept))
        if not kept:
            run.rewind(point)
        return too_far

    def _distance(self) -> float:
        """KL from the stage's first policy at recorded decisions, nats per decision."""
        settings = self.settings.offline
        rollout, _ = self.offline.experience.redraw(settings.states, settings.sweeps)
        return self.anchor.distance(rollout.trajectory)

    # Online

    def online(self) -> None:
        """pi <- PPO(pi, A = GAE), and V."""
        run = self.run
        settings = self.settings.online
        rollout, advantage, returns = self.on_policy.rollout(chunk_log_ratio)
        if run.stages.done >= settings.warm_up:
            self._learn(rollout, run.normalised(advantage), settings)
        self.on_policy.critic.learn(rollout, returns)
        if self.follower is not None:
            decisions = rollout.decisions
            self.follower.follow(rollout.trajectory.condition, decisions.place, decisions.total)

    # PPO through the chain

    def _learn(
        self,
        rollout: Rollout,
        advantage: Tensor,
        settings: Offline | Online,
        reference: Weights | None = None,
        sweep: int = 0,
    ) -> None:
        """Passes over a rollout; advantage [R]. reference: what the KL holds the policy to. sweep:
        the rollout's number in its iteration.
        """
        loss = partial(self.loss, clip=settings.clip, kl=self.settings.offline.kl)
        update = self.settings.update
        for epoch in range(sweep * settings.epochs, (sweep + 1) * settings.epochs):
            for batch in batches(self.run, rollout, update, settings.minibatch, epoch):
                self.run.update(rollout, batch, advantage, loss, reference)

    def loss(self, step: Scored, clip: float, kl: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of b pairs, [b], and its metrics [b]."""
        loss, metrics = ppo_loss(step, clip)
        if step.reference is None:
            return loss, metrics
        divergence = mean_kl(step.new, step.reference, reduce="sum")
        return loss + kl * divergence, {**metrics, "kl": divergence.detach()}

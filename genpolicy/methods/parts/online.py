"""Online RL of a control policy: episodes that it plays itself, advantages by GAE, and a value that
learns beside it.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from genpolicy.config.errors import ConfigError, at_least, positive, share
from genpolicy.config.schema import OptimizerConfig
from genpolicy.contracts.task import ControlTask
from genpolicy.evaluation.statistics import lower_bound
from genpolicy.learning.acceptance import safe_share
from genpolicy.learning.critic import StateValue
from genpolicy.methods.parts.anchor import Anchor
from genpolicy.methods.parts.baseline import LEAST, DecisionValue
from genpolicy.methods.parts.failures import Failures
from genpolicy.rollout.rollout import Rollout
from genpolicy.training.replay_check import LogRatio
from genpolicy.training.run import Run

LEAST_PLAYED = 2
"""The episodes of the latest policy in an iteration under a floor, at least: of a single one
nothing can be claimed.
"""


@dataclass
class Online:
    """The online stage of a method of several stages. Defaults without a source are ours."""

    episodes: int = 48  # per iteration, all processes together
    lam: float = 0.95  # of GAE, in [0, 1]; RL-100
    epochs: int = 5  # passes over the rollout; RL-100 has 5 to 10
    minibatch: int = 1024  # (decision, step) pairs, or decisions of uni_o4, per update
    lr: float = 1e-4  # peak learning rate, which falls along a cosine as the budget is spent
    final: float = 0.1  # share of lr at which the cosine ends
    clip: float = 0.2  # eps of the chunk's ratio; RL-100
    # decay per update of the averaged weights, which are evaluated and saved: near the ceiling what
    # single batches teach is noise
    ema: float = 0.998
    # share of the episodes that begin where an earlier one failed, as far as there are such starts:
    # they are rare, and without it they are hardly ever met again
    retry: float = 0.25
    # for hardware: share of the success (of a task that does not judge, the return) of the policy
    # that the stage began with, as it is deployed; that policy plays as many of the episodes as
    # keep what is expected of all at that share. 0 is no floor; at 1 nothing may be lost, and the
    # policy that learns plays two episodes until it is surely as good
    floor: float = 0.0
    critic_lr: float = 1e-3  # learning rate of the value
    critic_epochs: int = 10  # passes of the value over the rollout
    critic_minibatch: int = 256  # decisions per update of the value
    warm_up: int = 1  # iterations that train the value alone

    def __post_init__(self) -> None:
        at_least("method: online", self, **LEAST)
        positive("method: online", self, "lr", "clip", "critic_lr")
        share("method: online", self, "lam", "final", "ema", "retry", "floor")
        if self.floor and self.episodes < LEAST_PLAYED:
            raise ConfigError(
                f"method: online: episodes is {self.episodes}; under a floor it must be at least"
                f" {LEAST_PLAYED}, because nothing can be claimed of a single episode"
            )

    def optimizer(self, common: OptimizerConfig) -> OptimizerConfig:
        """The stage's optimiser, with the experiment's own betas, eps, decay and norm."""
        return replace(common, lr=self.lr, warmup=0, final=self.final, ema=self.ema)


class OnPolicy:
    """The episodes of an on-policy stage and the value that learns from them; all of it is saved
    and resumed with the run.

    gamma: discount per environment step. cut_fails: True where nothing comes after an episode that
    its time limit cut. anchor: the policy that the stage began with, for `Online.floor`.
    """

    def __init__(
        self, run: Run, settings: Online, gamma: float, cut_fails: bool, anchor: Anchor
    ) -> None:
        self.run = run
        self.settings = settings
        self.cut_fails = cut_fails
        self.critic = DecisionValue(
            run,
            gamma,
            settings.lam,
            settings.critic_lr,
            settings.critic_epochs,
            settings.critic_minibatch,
        )
        self.failures = Failures(run)
        self.floor = Floor(run, settings.floor, anchor)

    def begin_with(self, value: StateValue) -> None:
        """Sets V to a copy of ``value``."""
        self.critic.value.load_state_dict(value.state_dict())

    def rollout(self, log_ratio: LogRatio) -> tuple[Rollout, Tensor, Tensor]:
        """Plays the iteration's episodes; returns them with every decision's advantage and the
        value's target, both [R].
        """
        run = self.run
        settings = self.settings

        # the episodes
        episodes = settings.episodes
        if settings.floor:
            episodes = self.floor.episodes(episodes)
        starts = self.failures.mixed(run.starts(episodes), settings.retry)
        rollout = run.collect(episodes, 1, keep=True, starts=starts)
        self.failures.note(starts, rollout.success)
        self.floor.note(rollout)

        # their advantages
        rollout = run.verified(rollout, log_ratio, settings.clip / 10)
        if self.cut_fails:
            decisions = replace(rollout.decisions, terminated=rollout.decisions.last)
            rollout = replace(rollout, decisions=decisions)
        advantage, returns = self.critic.advantage(rollout)
        return rollout, advantage, returns


class Floor:
    """A floor under what comes of the collected episodes: their success, or where the task does not
    judge their return. Saved and resumed with the run.

    The policy that the stage began with, with the sampler that is deployed, plays so many of the
    episodes that the expected outcome of all stays at least its own, less the share 1 - ``share``
    of its size (`safe_share`).

    baseline [n]: outcomes of its episodes in this stage. lower: a lower bound of the outcome of the
    latest policy with the noise that it collects with; nothing is known of it before it has played,
    whatever its weights are. worst: the lowest outcome of any episode of this stage.
    """

    def __init__(self, run: Run, share: float, anchor: Anchor) -> None:
        self.run = run
        self.share = share
        self.anchor = anchor
        judged = cast(ControlTask, run.task).has_success
        self.least = 0.0 if judged else -math.inf  # what a lower bound is where nothing is known
        self.baseline = torch.zeros(0, dtype=torch.float64)
        self.lower = self.least
        self.worst = 0.0 if judged else math.inf
        run.register(floor=self)

    def episodes(self, wanted: int) -> int:
        """Returns how many of the ``wanted`` episodes the latest policy may play, equally many in
        each process and at least two in all, without which nothing would be learned of it; plays
        the others.
        """
        run = self.run
        if not len(self.baseline):
            self._play(wanted, self.anchor.iteration)
        rate = float(self.baseline.mean())
        processes = run.processes.count
        (share,) = run.processes.agreed([safe_share(self.share, rate, self.lower)])
        allowed = math.floor(share * wanted + 1e-9)  # 7.999 is 8
        mine = max(allowed // processes, math.ceil(LEAST_PLAYED / processes)) * processes
        if wanted > mine:
            self._play(wanted - mine, run.iteration)
        run.log("floor/baseline", rate)
        run.log("floor/lower", self.lower)
        run.log("floor/share", mine / wanted)
        return mine

    def _play(self, episodes: int, name: int) -> None:
        """Adds ``episodes`` of the policy that the stage began with; name: of their starts."""
        with self.anchor.weights.using():
            outcomes = self.run.outcomes(episodes, name)
        self.baseline = torch.cat([self.baseline, outcomes])
        self.worst = min(self.worst, float(outcomes.min()))

    def note(self, rollout: Rollout) -> None:
        """Notes the outcomes of the latest policy's episodes."""
        success = rollout.success
        outcomes = (rollout.rewards if success is None else success).flatten()
        self.worst = min(self.worst, float(outcomes.min()))
        self.lower = lower_bound(outcomes, self.least, self.worst)

    def state_dict(self) -> dict[str, Any]:
        return {"baseline": self.baseline, "lower": self.lower, "worst": self.worst}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.baseline = state["baseline"]
        self.lower = state["lower"]
        self.worst = state["worst"]

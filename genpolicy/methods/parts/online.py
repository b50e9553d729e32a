"""Online RL of a control policy: episodes that it plays itself, advantages by GAE, and a value that
learns beside it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from genpolicy.config.errors import at_least, positive, share
from genpolicy.config.schema import OptimizerConfig
from genpolicy.evaluation.statistics import interval
from genpolicy.learning.acceptance import safe_share
from genpolicy.learning.critic import StateValue
from genpolicy.methods.parts.anchor import Anchor
from genpolicy.methods.parts.baseline import DecisionValue
from genpolicy.rollout.rollout import Rollout
from genpolicy.training.replay_check import LogRatio
from genpolicy.training.run import Run


@dataclass
class Online:
    """episodes: of an iteration. lam: of GAE (.95). epochs: passes over the rollout (5 to 10).
    minibatch: what one update sees. lr falls along a cosine to its ``final`` share as the budget is
    spent; clip (.2). critic_lr, critic_epochs, critic_minibatch: of the value. warm_up: iterations
    that train the value alone.

    ema: decay of the averaged weights, which are what is evaluated and saved: near the ceiling what
    single batches teach is noise. retry: share of the episodes that begin where an earlier one
    failed, if there are such starts: they are rare, and without it they are hardly ever met again.
    floor: for hardware, a share of the return of the policy that the stage began with; it plays as
    many of the episodes as keep the expected return of all above that (0: none).
    """

    episodes: int = 48
    lam: float = 0.95
    epochs: int = 5
    minibatch: int = 1024
    lr: float = 1e-4
    final: float = 0.1
    clip: float = 0.2
    ema: float = 0.998
    retry: float = 0.25
    floor: float = 0.0
    critic_lr: float = 1e-3
    critic_epochs: int = 10
    critic_minibatch: int = 256
    warm_up: int = 1

    def __post_init__(self) -> None:
        least = {
            "episodes": 1,
            "epochs": 1,
            "minibatch": 1,
            "critic_epochs": 1,
            "critic_minibatch": 1,
            "warm_up": 0,
        }
        at_least("method: online", self, **least)
        positive("method: online", self, "lr", "clip", "critic_lr")
        share("method: online", self, "lam", "final", "ema", "retry", "floor")

    def optimizer(self, common: OptimizerConfig) -> OptimizerConfig:
        """Its optimiser, with the experiment's own betas, eps, decay and norm."""
        return replace(common, lr=self.lr, warmup=0, final=self.final, ema=self.ema)


class OnPolicy:
    """What an on-policy stage plays and learns its value from; all of it is saved and resumed with
    the run.

    gamma: discount per environment step. cut_fails: nothing comes after an episode that its time
    limit cut. anchor: the policy that the stage began with, which `Online.floor` goes by.
    """

    def __init__(
        self, run: Run, settings: Online, gamma: float, cut_fails: bool, anchor: Anchor
    ) -> None:
        self.run, self.s, self.cut_fails = run, settings, cut_fails
        s = settings
        self.critic = DecisionValue(
            run, gamma, s.lam, s.critic_lr, s.critic_epochs, s.critic_minibatch
        )
        self.failures, self.floor = Failures(run), Floor(run, s.floor, anchor)

    def begin_with(self, value: StateValue) -> None:
        """Sets V to a copy of ``value``."""
        self.critic.value.load_state_dict(value.state_dict())

    def rollout(self, log_ratio: LogRatio) -> tuple[Rollout, Tensor, Tensor]:
        """The iteration's episodes, every decision's advantage, and what the value is to learn from
        it; both [R].
        """
        run, s = self.run, self.s
        episodes = self.floor.episodes(s.episodes) if s.floor else s.episodes
        starts = self.failures.mixed(run.starts(episodes), s.retry)
        rollout = run.collect(episodes, 1, keep=True, starts=starts)
        self.failures.note(starts, rollout.success)
        self.floor.note(rollout.rewards)
        rollout = run.verified(rollout, log_ratio, s.clip / 10)
        if self.cut_fails:
            rollout = replace(
                rollout, decisions=replace(rollout.decisions, terminated=rollout.decisions.last)
            )
        return rollout, *self.critic.advantage(rollout)


class Failures:
    """Starts from which an episode failed and none has succeeded since; saved and resumed with the
    run.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.seeds: list[int] = []
        run.register(failures=self)

    def mixed(self, fresh: Sequence[int], share: float) -> list[int]:
        """``fresh`` reset seeds, the last ``share`` of them replaced by failures as far as there
        are any.
        """
        count = min(round(share * len(fresh)), len(self.seeds))
        drawn = self.run.generator("failures").permutation(len(self.seeds))[:count]
        return [*fresh[: len(fresh) - count], *(self.seeds[number] for number in drawn)]

    def note(self, starts: Sequence[int], success: Tensor | None) -> None:
        """What came of episodes from ``starts``; success [M,N] (None: the task does not judge)."""
        if success is None:
            return
        for seed, good in zip(starts, success.mean(1).tolist(), strict=True):
            if seed in self.seeds and good == 1:
                self.seeds.remove(seed)
            elif seed not in self.seeds and good < 1:
                self.seeds.append(seed)

    def state_dict(self) -> dict[str, list[int]]:
        return {"seeds": list(self.seeds)}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        self.seeds = list(state["seeds"])


class Floor:
    """A floor under what is collected: the policy that a stage began with plays so many of the
    episodes that their expected return stays at least ``share`` of its own (`safe_share`), by the
    lower 95 % bound of what the new one did last.
    """

    def __init__(self, run: Run, share: float, anchor: "Anchor") -> None:
        self.run, self.share, self.anchor = run, share, anchor
        self.lower = (
            math.inf
        )  # the first iteration is played by the policy that the stage began with anyway
        run.register(floor=self)

    def episodes(self, wanted: int) -> int:
        """How many of the ``wanted`` the new policy may play, at least one in each process and
        equally many; the others are played here and now.
        """
        anchor, processes = self.anchor, self.run.processes.count
        rate = anchor.rate_of(anchor.weights, wanted)
        allowed = math.floor(safe_share(self.share, rate, self.lower) * wanted + 1e-9)  # 7.999 is 8
        mine = max(allowed // processes, 1) * processes
        if wanted - mine:
            with anchor.weights.using():
                self.run.log("floor/baseline", self.run.try_out(wanted - mine, self.run.iteration))
        return mine

    def note(self, returns: Tensor) -> None:
        """What the new policy's episodes came to."""
        self.lower = interval(returns.flatten())[0]

    def state_dict(self) -> dict[str, float]:
        return {"lower": self.lower}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.lower = state["lower"]

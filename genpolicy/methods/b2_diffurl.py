"""B²-DiffuRL (arXiv 2503.11240): backward progressive training and branch-based sampling.

Of a chain whose window has W steps only the last L are trained. L grows as the budget is spent,
from those near the sample, whose credit is short, to those where it is decided what the sample
shows:

    L = L_first + floor(progress (L_last - L_first + 1)),  at most L_last

A trunk, the steps before these, is drawn once, and at its end N branches go on with noise of their
own: they differ in what is trained and in nothing else. The score z of a sample is its reward in
stds of its prompt, (R - mean_p) / (std_p + 1e-8), over this iteration and the ``history`` before.
Of each branching the best branch is learned from where z >= threshold, the worst where
z < -threshold, with

    selection "prompt"  A = z, as released: what a branch is worth among all of its prompt
    selection "branch"  A = +-(z_best - z_worst) / 2, as described: what the branching decided;
                        both are learned from, where they lie ``threshold`` apart

    objective "gradient"    mean over kept rows and steps of
                                max(-A rho, -A clip(rho, 1-eps, 1+eps))
    objective "preference"  mean over branchings of which both are kept, and over steps, of
                                -log sigmoid(temperature (log rho_best - log rho_worst))

The second is a preference loss (Diffusion-DPO, arXiv 2311.12908) on transitions, whose reference
is the policy that drew them; the paper says that its sampling helps such losses too, and releases
none.

On a robot a branching is a recorded decision whose last denoising steps are drawn N times, carried
out by nobody and judged by a critic (implicit Q-learning on all episodes so far): R = Q - V, whose
std is that of all decisions.

Differs from the public code (hu-zijing/B2-DiffuRL): no count of pictures has to divide by eight; an
iteration of which nothing is kept is no update (it crashed); the clip range stands beside its
``reduce`` (theirs, .1 of a mean over all dims, never acts); the last step, whose std may be 0, is
not trained; weights of the interval are shares of the window, so that it fits a chain of any
length.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from genpolicy.chain.values import Gaussian, Reduce
from genpolicy.config.errors import ConfigError, at_least, choice, positive, share
from genpolicy.learning.advantage import StageHistory
from genpolicy.learning.objective import Scored, clip_metrics, clipped_surrogate, log_ratio
from genpolicy.methods.parts.judged_decisions import Judge, JudgedDecisions
from genpolicy.rollout.minibatch import Batch
from genpolicy.rollout.rollout import Rollout
from genpolicy.training.requirements import Needs
from genpolicy.training.run import Run


@dataclass
class B2DiffuRL:
    """The settings of B²-DiffuRL. Defaults are those of B2-DiffuRL's run_process.sh unless a line
    says otherwise.
    """

    groups: int = 256  # trunks per iteration; of robots recorded decisions
    group: int = 5  # branches per trunk, N
    first: float = 0.7  # L_first as a share of the window's steps; 14 of 20
    last: float = 1.0  # L_last as a share of them; 20 of 20
    # False: each sample draws its whole chain, and the members of a group take a branching's place
    branching: bool = True
    selection: Literal["prompt", "branch"] = "prompt"
    threshold: float = 0.5  # of z, in stds; .7 in config/stage_process.py
    history: int = 8  # iterations before this one whose rewards enter a prompt's mean and std
    positive: float = 1.0  # weight of A > 0
    negative: float = 1.0  # weight of A < 0
    objective: Literal["gradient", "preference"] = "gradient"
    updates: int = 2  # optimiser steps per pass; ours
    epochs: int = 2  # passes over a rollout
    clip: float = 0.2  # eps, range of the ratio, for reduce "sum", ours; .1 there with "mean"
    reduce: Reduce = "sum"  # of the log-ratio over the event's dims; ours
    temperature: float = 1.0  # of objective preference; ours
    bound: float = 5.0  # of |z|
    judge: Judge = field(default_factory=Judge)  # robots: the critic

    needs: ClassVar[Needs] = Needs(likelihoods=True, split=("groups",))

    def __post_init__(self) -> None:
        choice("method b2_diffurl: reduce", self.reduce, ("sum", "mean"))
        choice("method b2_diffurl: selection", self.selection, ("prompt", "branch"))
        choice("method b2_diffurl: objective", self.objective, ("gradient", "preference"))
        at_least("method b2_diffurl", self, groups=1, group=2, updates=1, epochs=1)
        at_least("method b2_diffurl", self, threshold=0, history=0, positive=0, negative=0)
        positive("method b2_diffurl", self, "first", "last", "clip", "temperature", "bound")
        share("method b2_diffurl", self, "first", "last")
        if self.objective == "preference" and (self.positive, self.negative) != (1.0, 1.0):
            raise ConfigError(
                "method b2_diffurl: objective preference compares the best branch with the worst"
                " and weighs neither: leave positive and negative at 1"
            )
        if self.first > self.last:
            raise ConfigError(
                f"method b2_diffurl: first is {self.first:g} and last is {self.last:g}; the trained"
                " interval grows, so that first must not be larger"
            )

    def train(self, run: Run) -> None:
        robots = run.policy.model.acts
        source = _Decisions(self, run) if robots else _Samples(self, run)
        for _ in run.iterations():
            interval = self.interval(run.window, run.progress)
            rollout, z = source(interval)
            rollout = rollout.ungrouped()
            advantage = self.selected(z.view(-1, self.group))
            run.log("b2/steps", len(interval))
            run.log("b2/kept", run.processes.moments((advantage != 0).double().flatten())[0])
            for epoch in range(self.epochs):
                for batch in self.batches(run, rollout, advantage, epoch):
                    run.update(rollout, batch, advantage.flatten(), self.loss)

    def interval(self, window: range, progress: float) -> range:
        """The last L steps of the window, at least one. progress: the spent share of the budget."""
        first, last = (max(1, round(share * len(window))) for share in (self.first, self.last))
        length = min(first + int(progress * (last - first + 1)), last)
        return range(window.stop - length, window.stop)

    def selected(self, z: Tensor) -> Tensor:
        """The advantages of branchings, z [G,N] -> [G,N], 0 where a branch is not learned from."""
        best, worst = z.argmax(1, keepdim=True), z.argmin(1, keepdim=True)
        highest, lowest = z.gather(1, best), z.gather(1, worst)
        if self.selection == "prompt":
            above = torch.where(highest >= self.threshold, highest, 0.0)
            below = torch.where(lowest < -self.threshold, lowest, 0.0)
        else:
            half = (highest - lowest) / 2
            above = torch.where(2 * half >= self.threshold, half, 0.0)
            below = -above
        advantage = torch.zeros_like(z)
        advantage.scatter_add_(1, best, self._weighted(above))
        # where all branches are worth the same, the best is the worst, and only one side is not 0
        return advantage.scatter_add_(1, worst, self._weighted(below))

    def _weighted(self, advantage: Tensor) -> Tensor:
        weight = torch.where(advantage > 0, self.positive, self.negative)
        return weight * advantage

    def batches(self, run: Run, rollout: Rollout, advantage: Tensor, epoch: int) -> Iterator[Batch]:
        """The (row, step) pairs of what is kept, in random order; of objective preference the best
        branch and the worst one after the other, at the same step. advantage [G,N].
        """
        if self.objective == "gradient":
            yield from run.pairs(rollout, self.updates, epoch, (advantage != 0).flatten())
            return
        both = ((advantage > 0).any(1) & (advantage < 0).any(1))[:, None]
        place = torch.arange(advantage.shape[1], device=advantage.device)
        best = both & (place == advantage.argmax(1, keepdim=True))
        away = (advantage.argmin(1) - advantage.argmax(1)).repeat_interleave(self.group).cpu()
        for batch in run.pairs(rollout, self.updates, epoch, best.flatten()):
            assert isinstance(batch.rows, Tensor)
            assert batch.k is not None
            rows = torch.stack([batch.rows, batch.rows + away[batch.rows]], 1).flatten()
            yield Batch(rows, batch.k.repeat_interleave(2), whole=2)

    def log_ratio(self, new: Gaussian, old: Gaussian, x: Tensor) -> Tensor:
        """log rho of b transitions, [b]."""
        return log_ratio(new, old, x, reduce=self.reduce)

    def loss(self, step: Scored) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of b transitions, [b], and its metrics [b]."""
        log_rho = self.log_ratio(step.new, step.old, step.x)
        surrogate = clipped_surrogate(log_rho, step.advantage, self.clip)
        metrics = clip_metrics(log_rho, step.advantage, surrogate)
        if self.objective == "gradient":
            return surrogate.loss, metrics
        margin = log_rho[0::2] - log_rho[1::2]
        loss = softplus(-self.temperature * margin).repeat_interleave(2)
        right = (margin > 0).float().repeat_interleave(2)
        ratio = {name: metrics[name] for name in ("ratio_mean", "log_ratio_square")}
        return loss, {**ratio, "preferred": right}


class _Samples:
    """Branchings of prompts, judged by their rewards."""

    def __init__(self, settings: B2DiffuRL, run: Run) -> None:
        self.settings, self.run = settings, run
        self.history = StageHistory(settings.history)
        run.register(history=self.history)

    def __call__(self, interval: range) -> tuple[Rollout, Tensor]:
        """An iteration's samples at the kept steps ``interval``, and their z [R]."""
        settings, run = self.settings, self.run
        if settings.branching:
            rollout = run.collect(settings.groups, settings.group, branch_at=interval.start)
        else:
            rollout = run.collect(settings.groups, settings.group)
            rollout = replace(rollout, trajectory=rollout.trajectory.only(interval))
        rollout = run.verified(rollout, settings.log_ratio, settings.clip / 10)
        z = self.history(rollout.rewards, rollout.prompts, run.iteration)
        z = z.clamp(-settings.bound, settings.bound)
        run.show(rollout, z)
        return rollout, rollout.rows(z)


class _Decisions:
    """Branchings of recorded decisions of a robot, judged by a critic."""

    def __init__(self, settings: B2DiffuRL, run: Run) -> None:
        self.settings, self.run = settings, run
        self.decisions = JudgedDecisions(run, settings.judge)

    def __call__(self, interval: range) -> tuple[Rollout, Tensor]:
        """New decisions at the kept steps ``interval``, and their z [R]."""
        settings, run = self.settings, self.run
        self.decisions.gather()
        branch = interval.start if settings.branching else 0
        rollout, better = self.decisions.redraw(settings.groups, settings.group, branch)
        rollout = replace(rollout, trajectory=rollout.trajectory.only(interval))
        rollout = run.verified(rollout, settings.log_ratio, settings.clip / 10)
        z = run.normalised(better.cpu()).clamp(-settings.bound, settings.bound)
        return rollout, z.to(rollout.trajectory.x0)

"""DanceGRPO (arXiv 2505.07818): group-relative policy gradients from one initial noise per prompt,
on a random part of the steps, with a loss for each reward.

A group of N samples answers one prompt from the same initial noise: what differs is drawn on the
way (kernel {name: sde, noise: constant, a: eta} on flows, ddim with eta 1 on diffusion). Each
reward is scored by itself in its group and has a loss of its own,

    A_m  = (R_m - mean of the group) / (std + 1e-8),  std with ddof 1
    loss = mean over rows and steps of
               sum_m w_m max(-A_m rho, -A_m clip(rho, 1-eps, 1+eps))

so that a row may be clipped for one reward and learn from another. Each row learns at a random
``fraction`` of the window's steps. With ``best_of`` n, the n/2 best and the n/2 worst of a group by
sum_m w_m A_m are learned from, and the others are drawn and judged alone.

Differs from the public code (XueZeyue/DanceGRPO): the best and the worst are those of each group
(theirs are those of a rank's whole batch); an odd n keeps one more of the best; the network sees
the very times of the kernel (theirs are cut to thousandths).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from genpolicy.chain.values import Gaussian, Reduce
from genpolicy.config.errors import ConfigError, at_least, choice, positive, share
from genpolicy.learning.advantage import group_relative
from genpolicy.learning.objective import Scored, clip_metrics, clipped_surrogate, log_ratio
from genpolicy.rollout.rollout import Rollout
from genpolicy.training.requirements import Needs
from genpolicy.training.run import Run


@dataclass
class DanceGRPO:
    """The settings of DanceGRPO. Defaults are those of scripts/finetune/finetune_flux_grpo.sh
    unless a line says otherwise.
    """

    groups: int = 8  # prompts per iteration; one per GPU there
    group: int = 12  # samples per prompt, N
    shared_noise: bool = True  # a group shares its initial noise (prompts only)
    fraction: float = 0.6  # of the window's steps, that each row is trained at
    best_of: int | None = None  # rows of a group that are learned from; 8 of 24 for HunyuanVideo
    updates: int = 3  # optimiser steps per pass over a rollout: N/4 there
    epochs: int = 1  # passes over a rollout
    clip: float = 1e-4  # eps, range of the ratio, read beside ``reduce``
    reduce: Reduce = "mean"  # of the log-ratio over the event's dims
    advantage_clip: float = 5.0  # bound of |A|

    needs: ClassVar[Needs] = Needs(likelihoods=True)

    def __post_init__(self) -> None:
        choice("method dance_grpo: reduce", self.reduce, ("sum", "mean"))
        at_least("method dance_grpo", self, groups=1, group=2, updates=1, epochs=1, best_of=2)
        positive("method dance_grpo", self, "fraction", "clip", "advantage_clip")
        share("method dance_grpo", self, "fraction")
        if self.best_of is not None and self.best_of > self.group:
            raise ConfigError(
                f"method dance_grpo: best_of is {self.best_of}; a group has {self.group} rows"
            )

    def train(self, run: Run) -> None:
        shared = self.shared_noise and not run.policy.model.acts
        for _ in run.iterations():
            rollout = run.collect(self.groups, self.group, branch_at=0 if shared else None)
            rollout = run.verified(rollout, self.log_ratio, self.clip / 10).ungrouped()
            advantage = self.advantages(rollout)
            total = advantage.sum(2)
            run.show(rollout, total)
            kept = rollout.rows(self.kept(total)).bool().cpu()
            chosen = self.steps(run, rollout) & kept[:, None]
            for epoch in range(self.epochs):
                for batch in run.pairs(rollout, self.updates, epoch, chosen):
                    run.update(rollout, batch, advantage, self.loss)

    def advantages(self, rollout: Rollout) -> Tensor:
        """w_m A_m of every reward that has a weight, [M,N,m]."""
        weighted: list[Tensor] = []
        if not any(rollout.weights.values()):
            raise ConfigError(
                "method dance_grpo has a loss for each reward that has a weight, and all weights"
                " are 0: give one of reward a weight"
            )
        for name, weight in rollout.weights.items():
            if weight:
                scored = group_relative(rollout.parts[name], eps=1e-8, correction=1)
                weighted.append(weight * scored.clamp(-self.advantage_clip, self.advantage_clip))
        return torch.stack(weighted, 2)

    def kept(self, total: Tensor) -> Tensor:
        """1 for the rows of each group that are learned from, [M,N] -> [M,N]."""
        if self.best_of is None:
            return torch.ones_like(total)
        rank = (-total).argsort(dim=1, stable=True).argsort(1)
        best, worst = (self.best_of + 1) // 2, self.best_of // 2
        return ((rank < best) | (rank >= total.shape[1] - worst)).to(total)

    def steps(self, run: Run, rollout: Rollout) -> Tensor:
        """The kept steps at which each row is trained, bool [R,W]."""
        width = len(rollout.trajectory.steps)
        drawn = run.generator("trained steps").random((rollout.decisions.total, width))
        rank = torch.from_numpy(drawn)[rollout.decisions.place].argsort(1).argsort(1)
        return rank < max(1, int(self.fraction * width))

    def log_ratio(self, new: Gaussian, old: Gaussian, x: Tensor) -> Tensor:
        """log rho of b transitions, [b]."""
        return log_ratio(new, old, x, reduce=self.reduce)

    def loss(self, step: Scored) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of b transitions, whose advantage is [b,m], and its metrics [b]."""
        log_rho = self.log_ratio(step.new, step.old, step.x)
        losses: list[Tensor] = []
        metrics: list[dict[str, Tensor]] = []
        for advantage in step.advantage.unbind(1):
            surrogate = clipped_surrogate(log_rho, advantage, self.clip)
            losses.append(surrogate.loss)
            metrics.append(clip_metrics(log_rho, advantage, surrogate))
        means = {name: torch.stack([m[name] for m in metrics]).mean(0) for name in metrics[0]}
        return torch.stack(losses).sum(0), means

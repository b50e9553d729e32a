"""GRPO-Guard (arXiv 2510.22319): GRPO with a centred ratio and gradients that are flat over the
denoising steps.

Under the policy that acted, the plain log-ratio has mean -r^2/2 with r = rms(D)/s, D = mean_new -
mean_old: it depends on the step and lies below 0, so that rows with A > 0 hardly ever meet the
upper clip. RatioNorm removes the bias and the 1/s,

    log rho_hat = s (log rho + D^2/(2 s^2)) = mean over E of noise D,
    noise = (x_s - mean_old) / s

and the gradient reweight divides each step's loss by how much the step amplifies the network,
|kappa| = |d mean / d output|:

    loss = mean over rows and steps of
               1/|kappa_k| max(-A rho_hat, -A clip(rho_hat, 1-eps, 1+eps)) + beta KL

Differs from Flow-GRPO in these two places. Differs from the public code (yifan123/flow_grpo
train_sd3_GRPO_Guard.py): the bias is each row's own, not the batch's mean; s is the total std, so
that it holds for every kernel; the published weight 1/dt is ``weight: 1/dt`` (for the flow SDE
kappa is proportional to dt except at the first step).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from genpolicy.chain.values import Gaussian, Reduce
from genpolicy.config.errors import at_least, choice, divides, positive
from genpolicy.learning.advantage import Advantage, Combine, Kind
from genpolicy.learning.objective import (
    Scored,
    clip_metrics,
    clipped_surrogate,
    guard_log_ratio,
    mean_kl,
)
from genpolicy.training.requirements import Needs
from genpolicy.training.run import Run


@dataclass
class GRPOGuard:
    """The settings of GRPO-Guard. Defaults are those of flow_grpo's config/grpo_guard.py unless a
    line says otherwise.
    """

    groups: int = 48  # prompts per iteration
    group: int = 24  # samples per prompt, N
    updates: int = 2  # optimiser steps per pass over a rollout; divides groups
    epochs: int = 1  # passes over a rollout
    # eps, range of rho_hat, read beside ``reduce``; OCR and GenEval, 4e-6 for PickScore, with
    # "mean"; aim at clipping 10 to 30 % of the rows
    clip: float = 2e-6
    reduce: Reduce = "mean"  # of log rho_hat over the event's dims
    # baseline and scale of the rewards: "group" (global_std=False), "all", "none",
    # "leave_one_out", "prompt_history" (see `Advantage`)
    advantage: Kind = "group"
    combine: Combine = "sum"  # of several rewards: "sum" or "z_sum" (see `Advantage`)
    advantage_clip: float = 5.0  # bound of |A|
    beta: float = 0.0  # weight of the KL to the policy at step 0
    weight: str = "1/gain"  # of a step's loss: "1/gain", ours, or the published "1/dt"
    shared_prefix: bool = False  # True: a group shares its chain before the window

    needs: ClassVar[Needs] = Needs(likelihoods=True, whole_updates=True)

    def __post_init__(self) -> None:
        choice("method grpo_guard: weight", self.weight, ("1/gain", "1/dt"))
        at_least("method grpo_guard", self, groups=1, group=2, updates=1, epochs=1, beta=0)
        positive("method grpo_guard", self, "clip", "advantage_clip")
        divides("method grpo_guard", self, "updates", "groups")

    def train(self, run: Run) -> None:
        reference = run.weights() if self.beta else None
        estimate = Advantage(self.advantage, self.combine, self.advantage_clip)
        run.register(advantage=estimate)
        for _ in run.iterations():
            rollout = run.collect(
                self.groups, self.group, updates=self.updates, shared_prefix=self.shared_prefix
            )
            rollout = run.verified(rollout, self.log_ratio, self.clip / 10)
            advantage = estimate(rollout.parts, rollout.weights, rollout.prompts)
            run.show(rollout, advantage)
            for batch in run.minibatches(rollout, self.updates, self.epochs):
                run.update(rollout, batch, advantage, self.loss, reference)

    def log_ratio(self, new: Gaussian, old: Gaussian, x: Tensor) -> Tensor:
        """log rho_hat of b transitions, [b]."""
        return guard_log_ratio(new, old, x, reduce=self.reduce)

    def loss(self, step: Scored) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of b transitions, [b], and its metrics [b]."""
        log_rho = self.log_ratio(step.new, step.old, step.x)
        surrogate = clipped_surrogate(log_rho, step.advantage, self.clip)
        loss = surrogate.loss / (step.dt if self.weight == "1/dt" else abs(step.gain))
        metrics = clip_metrics(log_rho, step.advantage, surrogate)
        if step.reference is not None:
            kl = mean_kl(step.new, step.reference, reduce=self.reduce)
            loss = loss + self.beta * kl
            metrics["kl"] = kl
        return loss, metrics

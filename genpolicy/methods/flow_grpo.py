"""Flow-GRPO (arXiv 2505.05470): group-relative policy gradients through a stochastic sampler.

A group of N samples answers one prompt; its rewards, relative to the group, weigh the clipped
likelihood ratios of the denoising steps in the window:

    rho  = p_new(x_s | x_t) / p_old(x_s | x_t)
    loss = mean over rows and steps of
               max(-A rho, -A clip(rho, 1-eps, 1+eps)) + beta KL(new || reference)

With chain.window and chain.window_size it is Flow-GRPO-Fast; on epsilon models with kernel ddim,
group-relative DDPO.

Differs from the public code (yifan123/flow_grpo): the KL is the true one (theirs drops dt;
``kl_form: published`` restores it), the log-ratio is computed without cancellation, the last step
is never stochastic, and the unconditional branch is outside the graph.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from genpolicy.chain.values import Gaussian, Reduce
from genpolicy.config.errors import at_least, choice, divides, positive
from genpolicy.learning.advantage import Advantage, Combine, Kind
from genpolicy.learning.objective import Scored, clip_metrics, clipped_surrogate, log_ratio, mean_kl
from genpolicy.training.requirements import Needs
from genpolicy.training.run import Run


@dataclass
class FlowGRPO:
    """The settings of Flow-GRPO. Defaults are those of flow_grpo's SD3.5-M configuration
    (config/grpo.py, config/base.py) unless a line says otherwise.
    """

    groups: int = 48  # prompts per iteration
    group: int = 24  # samples per prompt, N
    updates: int = 2  # optimiser steps per pass over a rollout; divides groups
    epochs: int = 1  # passes over a rollout
    clip: float = 1e-4  # eps, range of the ratio, read beside ``reduce``
    # of the log-ratio over the event's dims; "mean" as in every public repository; "sum" is the
    # textbook likelihood, with clip .1 to .3
    reduce: Reduce = "mean"
    # baseline and scale of the rewards: "all" (global_std), "group", "none", "leave_one_out",
    # "prompt_history" (see `Advantage`)
    advantage: Kind = "all"
    combine: Combine = "sum"  # of several rewards: "sum" or "z_sum" (see `Advantage`)
    advantage_clip: float = 5.0  # bound of |A|
    # weight of the KL to the policy at step 0; .04 GenEval and OCR, .01 PickScore, 0 in the Fast
    # configurations
    beta: float = 0.0
    kl_form: str = "true"  # "true", ours, or "published" (times dt)
    # of a step's loss: "none", or "std/dt", which is what GRPO-Guard's first update amounts to
    weight: str = "none"
    shared_prefix: bool = False  # True: a group shares its chain before the window (Fast)

    needs: ClassVar[Needs] = Needs(likelihoods=True, whole_updates=True)

    def __post_init__(self) -> None:
        choice("method flow_grpo: kl_form", self.kl_form, ("true", "published"))
        choice("method flow_grpo: weight", self.weight, ("none", "std/dt"))
        at_least("method flow_grpo", self, groups=1, group=2, updates=1, epochs=1, beta=0)
        positive("method flow_grpo", self, "clip", "advantage_clip")
        divides("method flow_grpo", self, "updates", "groups")

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
        """log rho of b transitions, [b]."""
        return log_ratio(new, old, x, reduce=self.reduce)

    def loss(self, step: Scored) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of b transitions, [b], and its metrics [b]."""
        log_rho = self.log_ratio(step.new, step.old, step.x)
        surrogate = clipped_surrogate(log_rho, step.advantage, self.clip)
        loss = surrogate.loss * (step.std / step.dt if self.weight == "std/dt" else 1.0)
        metrics = clip_metrics(log_rho, step.advantage, surrogate)
        if step.reference is not None:
            kl = mean_kl(step.new, step.reference, reduce=self.reduce)
            loss = loss + self.beta * kl * (step.dt if self.kl_form == "published" else 1.0)
            metrics["kl"] = kl
        return loss, metrics

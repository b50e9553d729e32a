"""DPPO (arXiv 2409.00588): PPO over the two-level decision process of denoising inside an
environment.

Every denoising step of every decision is an action with a Gaussian likelihood; the environment's
reward comes at the end of the chain. There is one state value per decision, and generalised
advantage estimation over decisions. For denoising step i = 0 (noisiest) .. K'-1 of the window's K'
steps

    A_i   = gamma_den^(K'-1-i) A
    eps_i = e0 + (e1 - e0) (exp(rate i/(K'-1)) - 1) / (exp(rate) - 1)
    loss  = mean over random (decision, step) pairs of
                max(-A_i rho_i, -A_i clip(rho_i, 1-eps_i, 1+eps_i))

so that noisy steps are discounted, and clipped more tightly. K' < K: set chain.window to the last
K' steps; the others belong to the base policy, frozen, and take its ODE. Kernel: {name: floorstd,
kernel: {name: ddim, eta: 1.0}, floor: 0.1} explores as published. A prompt is an episode of one
decision: the same file then is PPO with a value of the prompt. With chain.window_size 1 one random
step per iteration is noisy and trained, the two-layer process of pi_RL (arXiv 2510.25889) that
makes large flow policies affordable.

Differs from the public code (irom-princeton/dppo): the trace ends where an episode is cut and
bootstraps from its final observation (theirs runs on through the reset); K' = 1 is finite; the
noise is not clamped at 3 std under an unclamped density; log-probabilities are not clamped at 2
(which zeroes gradients where std < .054); the direction term of the mean uses the floored std.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from genpolicy.chain.values import Gaussian, Reduce
from genpolicy.config.errors import at_least, positive, share
from genpolicy.learning.objective import (
    Scored,
    clip_metrics,
    clipped_surrogate,
    divergence,
    log_ratio,
)
from genpolicy.methods.parts.baseline import LEAST, DecisionValue
from genpolicy.methods.parts.frozen_base import freeze_base
from genpolicy.rollout.rollout import Rollout
from genpolicy.training.requirements import Needs
from genpolicy.training.run import Run


@dataclass
class DPPO:
    """The settings of DPPO. Defaults are those of the repository's gym configurations (cfg/gym)
    unless a line says otherwise.
    """

    episodes: int = 48  # per iteration, all processes together; ours
    gamma: float = 0.99  # discount per environment step
    lam: float = 0.95  # of GAE, in [0, 1]
    gamma_den: float = 0.99  # discount per denoising step; .9 in furniture; 1 is no discount
    # e1, range of the ratio at the last step; ours, for reduce "sum"; .01 there with "mean"
    clip: float = 0.2
    clip_first: float | None = None  # e0, range at the first step; None: e1, ours; .01 there
    clip_rate: float = 3.0  # rate of the rise from e0 to e1
    # of the log-ratio over the event's dims; "sum", ours, is the textbook ratio; "mean" there
    reduce: Reduce = "sum"
    epochs: int = 5  # passes over the pairs
    minibatch: int = 1024  # (decision, step) pairs per update; ours
    # an epoch is the last when its mean of rho - 1 - log rho (nats) exceeds this; 1 there; None,
    # ours: none is
    target_kl: float | None = None
    critic_lr: float = 1e-3  # learning rate of the value
    critic_epochs: int = 10  # passes of the value over the decisions; ours
    critic_minibatch: int = 256  # decisions per update of the value; ours
    warm_up: int = 2  # iterations that train the value alone; 0 to 2 there

    needs: ClassVar[Needs] = Needs(likelihoods=True)

    def __post_init__(self) -> None:
        at_least("method dppo", self, **LEAST)
        positive("method dppo", self, "clip", "clip_first", "clip_rate", "target_kl", "critic_lr")
        share("method dppo", self, "gamma", "lam", "gamma_den")

    def train(self, run: Run) -> None:
        freeze_base(run)
        value = DecisionValue(
            run, self.gamma, self.lam, self.critic_lr, self.critic_epochs, self.critic_minibatch
        )
        for iteration in run.iterations():
            rollout = run.collect(self.episodes, 1)
            rollout = run.verified(rollout, self.log_ratio, self.clip / 10)
            advantage, returns = value.advantage(rollout)
            run.show(rollout, rollout.rewards)
            if iteration > self.warm_up:
                self.improve(run, rollout, run.normalised(advantage))
            value.learn(rollout, returns)

    def improve(self, run: Run, rollout: Rollout, advantage: Tensor) -> None:
        """Passes ``epochs`` times over all (decision, step) pairs in random minibatches; advantage
        [R].
        """
        pairs = rollout.decisions.total * len(rollout.trajectory.steps)
        updates = math.ceil(pairs / self.minibatch)
        for epoch in range(self.epochs):
            divergences = [
                run.update(rollout, batch, advantage, self.loss)["kl"]
                for batch in run.pairs(rollout, updates, epoch)
            ]
            mean = sum(divergences) / len(divergences)
            if self.target_kl is not None and mean > self.target_kl:
                break

    def log_ratio(self, new: Gaussian, old: Gaussian, x: Tensor) -> Tensor:
        """log rho of b transitions, [b]."""
        return log_ratio(new, old, x, reduce=self.reduce)

    def loss(self, step: Scored) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of b (decision, step) pairs, [b], and its metrics [b]."""
        advantage = step.advantage * self.discount(step.index, step.steps).to(step.advantage)
        log_rho = self.log_ratio(step.new, step.old, step.x)
        surrogate = clipped_surrogate(log_rho, advantage, self.clip_range(step.index, step.steps))
        metrics = clip_metrics(log_rho, advantage, surrogate)
        metrics["kl"] = divergence(log_rho)
        return surrogate.loss, metrics

    def discount(self, index: int | Tensor, steps: int) -> Tensor:
        """The discount gamma_den^(K'-1-i). index: i. steps: K'."""
        return self.gamma_den ** (steps - 1 - torch.as_tensor(index)).float()

    def clip_range(self, index: int | Tensor, steps: int) -> Tensor:
        """eps_i; it is e1 where there is one step only, or no e0."""
        first = self.clip if self.clip_first is None or steps == 1 else self.clip_first
        place = torch.as_tensor(index).float() / max(steps - 1, 1)
        rise = torch.expm1(self.clip_rate * place) / math.expm1(self.clip_rate)
        return first + (self.clip - first) * rise

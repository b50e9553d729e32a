"""ReinFlow (arXiv 2505.22094): online RL of a flow policy whose sampling noise is learned, and
dropped at deployment.

A small network gives every denoising step a std per event dim, from the time and what is seen:

    x_s ~ N( x_t + v (s - t), std(t, o)^2 ),    log std^2 = low + (high - low) (tanh(MLP) + 1) / 2

The likelihood of the whole chain makes one ratio per decision, averaged over steps and event dims:

    loss = max(-A rho, -A clip(rho, 1-eps, 1+eps)) - entropy * mean over steps, dims of log std

The prior's term is the same under every policy and cancels. Kernel: {name: ddim, eta: 0.0} with
chain.window over the steps that explore; the deployed sampler is the ODE.

Differs from the public code (ReinFlow/ReinFlow): acting and scoring read one time grid (theirs are
linspace(0, 1, K) and linspace(0, 1-1/K, K)); what was sampled is not clamped under an unclamped
density, and log-probabilities are not clamped to [-1, 1].
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from genpolicy.chain.values import Gaussian, Reduce
from genpolicy.config.errors import ConfigError, at_least, positive, share
from genpolicy.config.schema import OptimizerConfig
from genpolicy.learning.objective import (
    Scored,
    clip_metrics,
    clipped_surrogate,
    log_ratio_unequal,
)
from genpolicy.methods.parts.baseline import DecisionValue
from genpolicy.policy.parts.learned_std import LearnedStd
from genpolicy.training.requirements import Needs
from genpolicy.training.run import Run


@dataclass
class ReinFlow:
    """Hyper-parameters; sources are the repository's gym configurations (hopper) unless said.

    episodes: per iteration. gamma, lam: per environment step (.99, .95). std_low, std_high: range
    of the learned std (.10, .24). clip: eps, beside ``reduce`` over steps and event dims (.01 with
    "mean"; "sum" is the chain's joint ratio). entropy: weight of the mean log std (.03). noise_lr:
    of the noise network (4.5e-5, the actor's). epochs (5), minibatch: decisions of one update.
    target_kl: an epoch is the last when the mean of rho - 1 - log rho exceeds it. critic_*,
    warm_up: as in DPPO.
    """

    episodes: int = 48
    gamma: float = 0.99
    lam: float = 0.95
    std_low: float = 0.1
    std_high: float = 0.24
    clip: float = 0.01
    reduce: Reduce = "mean"
    entropy: float = 0.03
    noise_lr: float = 4.5e-5
    epochs: int = 5
    minibatch: int = 128
    target_kl: float | None = None
    critic_lr: float = 1e-3
    critic_epochs: int = 10
    critic_minibatch: int = 256
    warm_up: int = 2

    needs: ClassVar[Needs] = Needs(("robots",), window=True)

    def __post_init__(self) -> None:
        least = {
            "episodes": 1,
            "epochs": 1,
            "minibatch": 1,
            "critic_epochs": 1,
            "critic_minibatch": 1,
            "warm_up": 0,
        }
        at_least("method reinflow", self, entropy=0, **least)
        positive(
            "method reinflow",
            self,
            "std_low",
            "std_high",
            "clip",
            "noise_lr",
            "target_kl",
            "critic_lr",
        )
        share("method reinflow", self, "gamma", "lam")
        if self.std_low >= self.std_high:
            raise ConfigError(
                f"method reinflow: std_low {self.std_low} must be below std_high {self.std_high}"
            )

    def train(self, run: Run) -> None:
        if run.policy.model.parametrisation != "velocity":
            raise ConfigError(
                "method reinflow is derived for flow policies: this one does not predict a velocity"
            )
        dims = math.prod(run.policy.model.event_shape)
        noise = LearnedStd(run.features, dims, self.std_low, self.std_high)
        noise.to(run.policy.model.device)
        before = run.policy.parts.get("std")
        if isinstance(before, LearnedStd):  # the policy that the run goes on from has learned one
            if before.settings != noise.settings:
                raise ConfigError(
                    f"method reinflow: the policy's learned std was made with {before.settings};"
                    f" std_low, std_high and the policy give {noise.settings}"
                )
            noise.load_state_dict(before.state_dict())
        noise_optimizer = run.learner(
            noise.parameters(), OptimizerConfig(lr=self.noise_lr, weight_decay=0.0)
        )
        run.attach(std=noise)
        run.register(noise_optimizer=noise_optimizer)
        value = DecisionValue(
            run, self.gamma, self.lam, self.critic_lr, self.critic_epochs, self.critic_minibatch
        )
        for iteration in run.iterations():
            rollout = run.collect(self.episodes, 1)
            rollout = run.verified(rollout, self.log_ratio, self.clip / 10)
            advantage, returns = value.advantage(rollout)
            updates = math.ceil(rollout.decisions.total / self.minibatch)
            for epoch in range(self.epochs if iteration > self.warm_up else 0):
                batches = run.chains(rollout, updates, epoch)
                better = run.normalised(advantage)
                kl = [
                    run.update(rollout, b, better, self.loss, also=[noise_optimizer])["kl"]
                    for b in batches
                ]
                if self.target_kl is not None and sum(kl) / len(kl) > self.target_kl:
                    break
            value.learn(rollout, returns)

    def log_ratio(self, new: Gaussian, old: Gaussian, x: Tensor) -> Tensor:
        """Of one step; the std is learned too, so that the densities themselves are compared."""
        return log_ratio_unequal(new, old, x, reduce=self.reduce)

    def loss(self, step: Scored) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of whole chains, W consecutive rows each: [b], every row of a chain the chain's
        loss; metrics [b].
        """
        chains = self.log_ratio(step.new, step.old, step.x).view(-1, step.steps)
        joint = chains.sum(1) if self.reduce == "sum" else chains.mean(1)
        log_rho = joint.repeat_interleave(step.steps)
        surrogate = clipped_surrogate(log_rho, step.advantage, self.clip)
        spread = step.new.std.expand_as(step.new.mean).flatten(1).log().mean(1)
        metrics = clip_metrics(log_rho, step.advantage, surrogate)
        metrics |= {"kl": (log_rho.exp() - 1 - log_rho).detach(), "log_std": spread.detach()}
        return surrogate.loss - self.entropy * spread, metrics

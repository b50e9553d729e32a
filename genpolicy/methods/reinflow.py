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
    divergence,
    log_ratio_unequal,
)
from genpolicy.methods.parts.baseline import LEAST, DecisionValue
from genpolicy.policy.parts.learned_std import LearnedStd
from genpolicy.rollout.rollout import Rollout
from genpolicy.training.optimizer import Optimizer
from genpolicy.training.requirements import Needs
from genpolicy.training.run import Run


@dataclass
class ReinFlow:
    """The settings of ReinFlow. Defaults are those of the repository's gym configurations (hopper)
    unless a line says otherwise.
    """

    episodes: int = 48  # per iteration, all processes together; ours
    gamma: float = 0.99  # discount per environment step
    lam: float = 0.95  # of GAE, in [0, 1]
    std_low: float = 0.1  # smallest learned std, in the chain's units
    std_high: float = 0.24  # largest learned std, in the chain's units
    clip: float = 0.01  # eps, range of the ratio, read beside ``reduce``
    # of the log-ratio over steps and the event's dims; "sum" is the chain's joint ratio
    reduce: Reduce = "mean"
    entropy: float = 0.03  # weight of the mean log std
    noise_lr: float = 4.5e-5  # learning rate of the noise network; the actor's
    epochs: int = 5  # passes over the rollout
    minibatch: int = 128  # decisions per update; ours
    # an epoch is the last when its mean of rho - 1 - log rho (nats) exceeds this; None, ours: none
    # is
    target_kl: float | None = None
    critic_lr: float = 1e-3  # learning rate of the value; as in dppo
    critic_epochs: int = 10  # passes of the value over the decisions; as in dppo
    critic_minibatch: int = 256  # decisions per update of the value; as in dppo
    warm_up: int = 2  # iterations that train the value alone; as in dppo

    needs: ClassVar[Needs] = Needs(("robots",), window=True)

    def __post_init__(self) -> None:
        at_least("method reinflow", self, entropy=0, **LEAST)
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
        if run.policy.chain.noisy:
            raise ConfigError(
                f"method reinflow learns the noise of its steps, and kernel"
                f" {run.policy.chain.kernel} draws its own: take {{name: ddim, eta: 0.0}}"
            )
        noise = self._noise(run)
        noise_optimizer = run.new_optimizer(
            noise.parameters(), OptimizerConfig(lr=self.noise_lr, weight_decay=0.0)
        )
        run.attach(std=noise)
        if run.policy.noise is None:
            raise ConfigError(
                f"method reinflow explores nowhere under kernel {run.policy.chain.kernel}: take"
                " {name: ddim, eta: 0.0}, and name the steps that explore in chain.window"
            )
        run.register(noise_optimizer=noise_optimizer)
        value = DecisionValue(
            run, self.gamma, self.lam, self.critic_lr, self.critic_epochs, self.critic_minibatch
        )
        for iteration in run.iterations():
            rollout = run.collect(self.episodes, 1)
            rollout = run.verified(rollout, self.log_ratio, self.clip / 10)
            advantage, returns = value.advantage(rollout)
            if iteration > self.warm_up:
                self.improve(run, rollout, run.normalised(advantage), noise_optimizer)
            value.learn(rollout, returns)

    def _noise(self, run: Run) -> LearnedStd:
        """Makes the network of the std, which goes on from the one that the policy has learned
        before, if any.
        """
        dims = math.prod(run.policy.model.event_shape)
        noise = LearnedStd(run.features, dims, self.std_low, self.std_high)
        noise.to(run.policy.model.device)
        before = run.policy.parts.get("std")
        if before is not None and before.kind == noise.kind:
            settings = getattr(before, "settings", None)
            if settings != noise.settings:
                raise ConfigError(
                    f"method reinflow: the policy's learned std was made with {settings};"
                    f" std_low, std_high and the policy give {noise.settings}"
                )
            noise.load_state_dict(before.state_dict())
        return noise

    def improve(
        self, run: Run, rollout: Rollout, advantage: Tensor, noise_optimizer: Optimizer
    ) -> None:
        """Passes ``epochs`` times over the chains of a rollout in random minibatches; advantage
        [R].
        """
        updates = math.ceil(rollout.decisions.total / self.minibatch)
        for epoch in range(self.epochs):
            divergences = [
                run.update(rollout, batch, advantage, self.loss, also=[noise_optimizer])["kl"]
                for batch in run.chains(rollout, updates, epoch)
            ]
            mean = sum(divergences) / len(divergences)
            if self.target_kl is not None and mean > self.target_kl:
                break

    def log_ratio(self, new: Gaussian, old: Gaussian, x: Tensor) -> Tensor:
        """The log-ratio of b transitions whose std has changed too, [b]."""
        return log_ratio_unequal(new, old, x, reduce=self.reduce)

    def loss(self, step: Scored) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of whole chains, of K' consecutive rows each, and its metrics: [b], every row of
        a chain has the chain's loss.
        """
        chains = self.log_ratio(step.new, step.old, step.x).view(-1, step.steps)
        joint = chains.sum(1) if self.reduce == "sum" else chains.mean(1)
        log_rho = joint.repeat_interleave(step.steps)
        surrogate = clipped_surrogate(log_rho, step.advantage, self.clip)
        spread = step.new.std.expand_as(step.new.mean).flatten(1).log().mean(1)
        metrics = clip_metrics(log_rho, step.advantage, surrogate)
        metrics |= {"kl": divergence(log_rho), "log_std": spread.detach()}
        return surrogate.loss - self.entropy * spread, metrics

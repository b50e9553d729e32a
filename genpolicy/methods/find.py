"""FIND (arXiv 2407.19453): the distribution of the chain's first noise is learned, and the network
stays as it is.

One decision: what is seen, a prompt c or an observation, to z ~ pi(z | c) = N(mu, diag(sigma^2)),
the chain's first state; the rest of the chain belongs to the environment, and its reward comes
back. Dynamic reward calibration: a network g(mu, sigma, c), fitted in every iteration, says what
the distribution as it is now is worth, and

    r*   = r - g(mu, sigma, c)
    rho  = pi(z) / pi_then(z),  pi_then the distribution that drew this z
    loss = max(-r* rho, -r* clip(rho, 1-eps, 1+eps)) + beta KL(pi || N(0, 1))

over the draws of this iteration and those of the last ones whose distribution is still near. The
updates of an iteration end when the exact KL(pi || pi_then) of its own draws exceeds ``far``.
mu and log sigma are linear in the features of what is seen, so that they answer prompts that nobody
trained; or, with ``prompts``, a table has a row for each of the task's first prompts, and others
start from N(0, 1). Two bounds keep what is drawn like noise: the mean over the dims of mu^2 +
sigma^2 lies in 1 +- ``band`` (the typical set), and no sigma lies below ``least_std`` (so that the
entropy per dim is at least log least_std + 1.42 nats).

On a robot policy the same is noise steering: z of each decision, conditioned on the observation,
the return in the reward's place and GAE with g as its value. Take a deterministic sampler, {name:
ddim, eta: 0}: noise of its steps makes the reward a noisy function of z.

Differs from the public code (vpx-ecnu/FIND): a draw's reward is its own (theirs is the buffer's
oldest row, beside the newest z); the ratio is to the distribution that drew it (theirs to N(0, 1)
for ever), and of the sum over the dims (``reduce: mean`` is theirs); PPO's min; the true KL (theirs
is mu^2 + (sigma - 1)^2); log sigma, which can't turn negative; g is asked before it learns a draw's
reward, and learns old rewards at the distribution that drew them, without weights.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from genpolicy.chain import Condition
from genpolicy.chain.prior import Bounds
from genpolicy.chain.values import Gaussian, Reduce
from genpolicy.config.errors import ConfigError, at_least, at_most, choice, positive, share
from genpolicy.config.schema import OptimizerConfig
from genpolicy.contracts.task import Context
from genpolicy.learning.critic import Standard
from genpolicy.learning.objective import clip_metrics, clipped_surrogate, log_ratio_unequal
from genpolicy.methods.parts.baseline import DecisionValue
from genpolicy.methods.parts.drawn_starts import DrawnStarts, History
from genpolicy.policy.parts.learned_start import LearnedStart
from genpolicy.policy.parts.table_start import TableStart
from genpolicy.rollout.rollout import Rollout
from genpolicy.training.requirements import Needs, world_of
from genpolicy.training.run import Run

ENTROPY = 0.5 * math.log(2 * math.pi * math.e)
"""The entropy of N(0, 1), nats."""
LARGEST = 10.0
"""Bound of |log rho|: exp of more is as clipped, and not finite at last."""


@dataclass
class FIND:
    """The settings of FIND. Defaults are those of the public code's command line unless a line says
    otherwise.
    """

    groups: int = 4  # prompts or start states per iteration; 1 there
    group: int = 8  # samples or episodes of each; 1 there
    # the first so many prompts of the task have a start of their own, as there, where it is one
    # prompt; None, ours, is one start for all, conditioned on what is seen
    prompts: int | None = None
    # eps, range of the ratio, for reduce "sum"; ours: .2, theirs beside "mean", clips four draws of
    # five (docs/methods/find.md)
    clip: float = 1.0
    # of log-ratio and KL over the noise's dims; "sum", ours, is the textbook ratio; "mean" there
    reduce: Reduce = "sum"
    beta: float = 0.01  # weight of KL(pi || N(0, 1)), beside advantages of std 1
    far: float = 0.5  # nats between pi and what drew, at which an iteration's updates end; ours
    band: float = 0.1  # of the mean of mu^2 + sigma^2 around 1; ours
    least_std: float = 0.3  # least sigma; ours; 1e-4 there
    lr: float = 1e-3  # learning rate of the start
    epochs: int = 4  # passes of the start over the draws; ours
    minibatch: int = 64  # draws per update; ours
    # earlier iterations whose draws are learned from again; 20 there; ours: 4 learn less than none
    # (docs/methods/find.md)
    history: int = 1
    gamma: float = 0.99  # discount per environment step; DPPO's
    lam: float = 0.95  # of GAE, in [0, 1]; DPPO's
    critic_lr: float = 1e-3  # learning rate of g; 1e-4 there
    critic_epochs: int = 5  # passes of g over the draws
    critic_minibatch: int = 256  # draws per update of g

    needs: ClassVar[Needs] = Needs()

    def __post_init__(self) -> None:
        choice("method find: reduce", self.reduce, ("sum", "mean"))
        at_least("method find", self, groups=1, group=1, prompts=1, epochs=1, minibatch=1)
        at_least("method find", self, beta=0, history=0, critic_epochs=1, critic_minibatch=1)
        positive("method find", self, "clip", "far", "lr", "critic_lr", "least_std", "band")
        at_most("method find", self, least_std=0.9, band=0.9)
        share("method find", self, "gamma", "lam")

    def train(self, run: Run) -> None:
        _Steering(self, run).train()

    def loss(
        self, new: Gaussian, old: Gaussian, z: Tensor, advantage: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of b draws z [b,*E] of ``old``, [b], and its metrics [b]. advantage [b]: r*."""
        log_rho = log_ratio_unequal(new, old, z, reduce=self.reduce).clamp(-LARGEST, LARGEST)
        surrogate = clipped_surrogate(log_rho, advantage, self.clip)
        standard = Gaussian(torch.zeros_like(new.mean), torch.ones_like(new.mean))
        kl = new.kl(standard, reduce=self.reduce)
        metrics = {**clip_metrics(log_rho, advantage, surrogate), "kl": kl}
        return surrogate.loss + self.beta * kl, metrics


class _Steering:
    """The loop of FIND, in the verbs of a run."""

    def __init__(self, settings: FIND, run: Run) -> None:
        self.settings, self.run = settings, run
        self.came_with_it = "start" in run.policy.parts
        self.start = self._start()
        run.attach(start=self.start)
        self.optimizer = run.new_optimizer(
            self.start.parameters(), OptimizerConfig(lr=settings.lr, weight_decay=0.0)
        )
        self.value = DecisionValue(
            run,
            settings.gamma,
            settings.lam,
            settings.critic_lr,
            settings.critic_epochs,
            settings.critic_minibatch,
            sees=self._seen,
            inputs=run.features + 2 * math.prod(self.start.shape),
        )
        self.history = History(settings.history)
        run.register(start_optimizer=self.optimizer, history=self.history)

    def train(self) -> None:
        run = self.run
        for iteration in run.iterations():
            rollout = run.collect(self.settings.groups, self.settings.group)
            if iteration == 1:
                self._standardise(rollout)
            _, returns = self.value.advantage(rollout)
            run.show(rollout, rollout.rewards)
            fresh = self._draws(rollout, returns)
            with torch.no_grad():
                near = self.history.near(self.start, self.settings.far, fresh.z.device)
            draws = DrawnStarts.cat([fresh, *near])
            self._improve(fresh, draws)
            self._calibrate(draws)
            self.history.add(fresh)
            self._tell(fresh, draws)

    # What is learned

    def _start(self) -> LearnedStart | TableStart:
        """The start that the policy came with, or a new one."""
        run, count = self.run, self.settings.prompts
        found = run.policy.parts.get("start")
        if count is not None and world_of(run.task) == "robots":
            raise ConfigError(
                "method find: prompts asks for a table of starts, and a robot sees something else"
                " in every decision: leave it out"
            )
        kind = LearnedStart if count is None else TableStart
        if found is not None and not isinstance(found, kind):
            raise ConfigError(
                f"method find: the policy came with a {found.kind}, and prompts ="
                f" {count} asks for a {kind.kind}: set prompts, or begin with another policy"
            )
        if isinstance(found, LearnedStart):
            return found.requires_grad_(True)
        model, settings = run.policy.model, self.settings
        bounds = Bounds(low=math.log(settings.least_std), band=settings.band)
        if count is None:
            return LearnedStart(run.features, model.event_shape, bounds).to(model.device)
        first = run.collector.contexts(1, torch.arange(count), count).prompts
        with torch.no_grad():
            keys = model.features(model.encode(Context(list(dict.fromkeys(first)))))
        if isinstance(found, TableStart):
            if len(found.keys) != len(keys) or not bool(found.known(keys).all()):
                raise ConfigError(
                    f"method find: the policy came with a table of {len(found.keys)} starts, which"
                    f" are not those of the task's first {len(keys)} prompts: name the prompts that"
                    " it learned, or begin with another policy"
                )
            return found.requires_grad_(True)
        try:
            return TableStart(keys, model.event_shape, bounds).to(model.device)
        except ValueError as error:
            raise ConfigError(f"method find: of the first {count} prompts, {error}") from None

    @torch.no_grad()
    def _standardise(self, rollout: Rollout) -> None:
        """Fit the scales of what a new start, and g, see to the first rollout of all processes."""
        features = self.run.policy.model.features(rollout.trajectory.condition).cpu()
        processes = self.run.processes
        count = processes.sum(float(len(features)))
        mean = processes.reduce(features.sum(0)) / count
        std = (processes.reduce(((features - mean) ** 2).sum(0)) / count).sqrt()
        around = torch.stack([mean - std, mean + std])  # two rows that have this mean and std
        scales: list[Standard] = [self.value.value.scale]
        if isinstance(self.start, LearnedStart) and not self.came_with_it:
            scales.append(self.start.scale)
        for scale in scales:
            scale.fit(around.to(scale.centre))

    @torch.no_grad()
    def _seen(self, condition: Condition) -> Tensor:
        """The inputs of g where a condition is seen now, [B,F+2E]."""
        features = self.run.policy.model.features(condition)
        return _inputs(features, self.start(features, 1.0))

    @torch.no_grad()
    def _draws(self, rollout: Rollout, returns: Tensor) -> DrawnStarts:
        """The draws of a rollout, of all processes. returns [R]."""
        trajectory, policy = rollout.trajectory, self.run.policy
        assert trajectory.start is not None
        features = policy.model.features(trajectory.condition)
        drew = self.start(features, 1.0)
        z = trajectory.start / policy.chain.scale
        place = rollout.decisions.place
        mine = DrawnStarts(place, features, z, drew.mean, drew.std, returns)
        return mine.gathered(self.run.processes).to(policy.model.device)

    def _improve(self, fresh: DrawnStarts, draws: DrawnStarts) -> None:
        """Passes of the start over the draws, until it has gone far enough from what drew them."""
        settings, run = self.settings, self.run
        with torch.no_grad():
            seen = _inputs(draws.features, self.start(draws.features, 1.0))
            better = draws.returns - self.value.value(seen)  # r*
        better = (better - better.mean()) / (better.std(correction=0) + 1e-8)
        for rows in self._passes(len(draws), settings.minibatch, settings.epochs, "start"):
            if self._moved(fresh) > settings.far:
                break
            mine, advantage = draws[rows], better[rows]

            def losses(
                part: slice, mine: DrawnStarts = mine, advantage: Tensor = advantage
            ) -> tuple[Tensor, dict[str, Tensor]]:
                b, scored = mine[part], run.policy.scored
                new, old = scored(self.start(b.features, 1.0)), scored(b.drawn_from)
                return settings.loss(new, old, run.policy.model.scored(b.z), advantage[part])

            run.descend(losses, len(mine), "start", self.optimizer)

    def _calibrate(self, draws: DrawnStarts) -> None:
        """Regresses g on the returns, each at the distribution that drew it."""
        settings, run = self.settings, self.run
        value, optimizer = self.value.value, self.value.optimizer
        seen = _inputs(draws.features, draws.drawn_from)
        epochs, size = settings.critic_epochs, settings.critic_minibatch
        for rows in self._passes(len(draws), size, epochs, "calibration"):
            inputs, target = seen[rows], draws.returns[rows]

            def losses(part: slice, inputs: Tensor = inputs, target: Tensor = target) -> Tensor:
                return (value(inputs[part]) - target[part]) ** 2

            run.descend(losses, len(inputs), "critic", optimizer)

    def _passes(self, total: int, size: int, epochs: int, what: str) -> Iterator[Tensor]:
        """This process's rows of each minibatch of ``size`` of ``total``, [b]."""
        for epoch in range(epochs):
            order = self.run.generator(f"the {what}'s pass over draws", epoch).permutation(total)
            for first in range(0, total, size):
                yield self.run.mine(order[first : first + size])

    # What is told

    @torch.no_grad()
    def _moved(self, draws: DrawnStarts) -> float:
        """The mean of KL(pi || pi_then) over draws, nats."""
        now = self.start(draws.features, 1.0)
        moved = now.kl(draws.drawn_from, reduce="sum").mean()
        return self.run.processes.agreed([float(moved)])[0]

    @torch.no_grad()
    def _tell(self, fresh: DrawnStarts, draws: DrawnStarts) -> None:
        """Log what the start is like where it was asked."""
        now = self.start(fresh.features, 1.0)
        said = {
            "entropy": ENTROPY
            + now.std.log().mean(),  # nats per dim; 1.42 is the standard normal's
            "std": now.std.mean(),
            "mean_square": (now.mean.square() + now.std.square()).mean(),
            "moved": self._moved(fresh),
            "learned_from": len(draws) / len(fresh),
        }
        for name, value in said.items():
            self.run.log(f"start/{name}", float(value))


def _inputs(features: Tensor, start: Gaussian) -> Tensor:
    """The inputs of g: the features, mu and log sigma, [B,F+2E]."""
    return torch.cat([features, start.mean.flatten(1), start.std.log().flatten(1)], 1)

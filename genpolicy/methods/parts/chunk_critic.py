"""Values of chunks, learned from everything that was done, of a policy as it is now."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from genpolicy.config.errors import ConfigError, at_least, at_most, choice, positive, share, unread
from genpolicy.config.schema import OptimizerConfig
from genpolicy.learning.critic import (
    Critic,
    StateValue,
    Support,
    bellman_target,
    conservative,
    expectile_loss,
    polyak,
    subset_min,
)
from genpolicy.policy.parts.best_of import BestOf
from genpolicy.rollout.replay import Replay
from genpolicy.training.run import Run

Following = Callable[[Tensor, Tensor], Tensor]
"""(views [b], features [b,F]) -> the chunk that the policy would carry out there, [b,*E]."""

Samples = Callable[[Tensor], Tensor]
"""Views [b] -> samples of the policy there, [b,N,*E]."""


@dataclass
class Valuing:
    """The settings of `ChunkCritic`. Defaults without a source are ours; PA-RL's are
    configs/base_config.py of its public code.
    """

    # "rlpd": TD with the least of a few target networks; "cal_ql": and Q of the policy's samples is
    # held down to what was got; "iql": an expectile of V in the place of the policy's chunk
    kind: Literal["rlpd", "cal_ql", "iql"] = "rlpd"
    members: int = 4  # networks of Q; 10 in PA-RL
    # of them, drawn anew for each update, whose least is the target; None: 2 as in PA-RL, and in
    # ALOE all
    subset: int | None = None
    pessimism: float = 0.0  # stds over the networks taken off Q where samples are ranked; PA-RL
    hidden: int = 256  # units of each of two layers; PA-RL
    first: int = 2000  # updates before the critic first acts
    updates: int = 300  # per iteration after that
    batch: int = 256  # decisions per update, of all processes together; PA-RL
    # share of a batch from the data section and the first iteration, the rest from later ones; RLPD
    offline: float = 0.5
    lr: float = 3e-4  # learning rate; PA-RL
    # rate per update at which the target follows (`ActionValue` says why not .005)
    polyak: float = 0.02
    conservative: float = 0.005  # weight of Cal-QL's term; PA-RL
    expectile: float = 0.7  # of V, in [0, 1], for iql; PA-RL
    # least and largest return, where they are known (a sparse reward: 0 and 1): targets are kept
    # between them, so that what the choice among samples overestimates does not feed on itself
    low: float | None = None
    high: float | None = None
    bins: int = 0  # of values as histograms (HL-Gauss) between low and high; 0: squared errors

    def __post_init__(self) -> None:
        where = "method: critic"
        choice(f"{where}: kind", self.kind, ("rlpd", "cal_ql", "iql"))
        at_least(
            where, self, members=1, subset=1, pessimism=0, hidden=1, first=1, updates=1, batch=1
        )
        at_least(where, self, conservative=0, bins=0)
        positive(where, self, "lr", "polyak")
        share(where, self, "offline", "polyak", "expectile")
        at_most(where, self, subset=self.members)
        if self.kind != "cal_ql":
            unread(where, self, f"with kind {self.kind}", "conservative")
        if self.kind != "iql":
            unread(where, self, f"with kind {self.kind}", "expectile")
        if self.bins and (self.low is None or self.high is None):
            raise ConfigError(f"{where}: {self.bins} bins need low and high, the returns' range")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ConfigError(f"{where}: low is {self.low:g}; it must be below high, {self.high:g}")
        try:
            self.support()
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None

    @property
    def least_of(self) -> int:
        """The number of networks whose least is the target."""
        return min(2, self.members) if self.subset is None else self.subset

    def support(self) -> Support | None:
        """The bins, if there are any."""
        if not self.bins or self.low is None or self.high is None:
            return None
        return Support(self.low, self.high, self.bins)

    def kept(self, target: Tensor) -> Tensor:
        """Targets between the least and the largest return."""
        known = self.low is not None or self.high is not None
        return target.clamp(self.low, self.high) if known else target


class ChunkCritic:
    """Q of a chunk where it was carried out, by temporal differences:

        y = sum_j gamma^j r_j + gamma^n (1 - terminated) min_S Q_target(s', a'),
        L = sum over the networks of (Q(s, a) - y)^2
            [+ conservative (log mean exp {Q(s, a), max(Q(s, a_i), G)} - Q(s, a))],

    over everything that was carried out, whoever did it: n steps were, the rewards are theirs, and
    a' is the policy's own, so that no weight is needed. S: ``subset`` networks, one draw for each
    update. With kind iql, V(s') in the place of min_S Q_target. a_i: samples of the policy at s;
    G: the observed return (nothing is known where an episode's end is not: its own Q stands there).

    Networks and optimiser are saved and resumed with the run; Q, where it ``acts``, as the part of
    the policy that it is.
    """

    def __init__(self, run: Run, settings: Valuing, gamma: float, acts: bool = True) -> None:
        """Draws the networks' weights from torch's global generator."""
        self.run, self.settings, self.gamma = run, settings, gamma
        model = run.policy.model
        dims = model.scored(torch.zeros(1, *model.event_shape)).numel()
        self.q = Critic(
            run.features, dims, settings.members, settings.hidden, support=settings.support()
        ).to(model.device)
        self.target = copy.deepcopy(self.q).requires_grad_(False)
        self.v = (
            StateValue(run.features, settings.hidden).to(model.device)
            if settings.kind == "iql"
            else None
        )
        learned = [*self.q.parameters(), *(self.v.parameters() if self.v else ())]
        self.optimizer = run.new_optimizer(
            learned, OptimizerConfig(lr=settings.lr, weight_decay=0.0, max_grad_norm=10.0)
        )
        run.register(q_target=self.target, q_optimizer=self.optimizer)
        if self.v is not None:
            run.register(v=self.v)
        if not acts:
            run.register(q=self.q)
        self.part = BestOf(self.q, settings.pessimism)

    def value(self, features: Tensor, event: Tensor) -> Tensor:
        """The value by which samples are ranked, [B]: features [B,F], event [B,*E]."""
        return self.part(features, self.run.policy.model.scored(event))

    def standardise(self, features: Tensor) -> None:
        """Standardises from now on by the mean and std of features [F,D]."""
        for network in (self.q, self.target, self.v):
            if network is not None:
                network.scale.fit(features)

    def renew_optimizer(self) -> None:
        """Begins the optimiser anew, as PA-RL does where it goes online."""
        self.optimizer.renew()

    def learn(
        self,
        replay: Replay,
        features: Tensor,
        offline: int,
        updates: int,
        following: Following,
        samples: Samples,
    ) -> None:
        """Makes ``updates`` updates. features [F,D]: of the replay's views. offline: so many of its
        first decisions are not the improved policy's. following: what the policy does. samples: of
        it, for cal_ql.
        """
        run, settings = self.run, self.settings
        scored, device = run.policy.model.scored, features.device
        returns = replay.returns(self.gamma).to(features) if settings.kind == "cal_ql" else None
        share, batch = settings.offline, settings.batch
        batches = mixed_rows(run, len(replay), offline, share, updates, batch, "critic")
        for update, rows in enumerate(batches):
            now, later = features[replay.now[rows]], replay.after[rows]
            after, event = features[later], scored(replay.event[rows].to(features))

            # the target; where nothing comes after, nobody is asked what the policy would do there
            over = replay.terminated[rows].to(device)
            with torch.no_grad():
                draw = torch.from_numpy(
                    run.generator("the target's networks", update).random(settings.members)
                )
                if bool(over.all()):
                    next_value = torch.zeros(len(rows), device=device)
                elif self.v is None:
                    a = scored(following(later, after))
                    next_value = subset_min(self.target(after, a), settings.least_of, draw)
                else:
                    next_value = self.v(after)
                y = bellman_target(
                    replay.rewards[rows].to(features),
                    replay.executed[rows].to(device),
                    over,
                    next_value,
                    self.gamma,
                )
                y = settings.kept(y)
                aim = None
                if self.v is not None:
                    aim = subset_min(self.target(now, event), settings.least_of, draw)
            others = samples(replay.now[rows]) if returns is not None else None
            got = returns[rows] if returns is not None else None

            def losses(
                part: slice, now=now, event=event, y=y, aim=aim, others=others, got=got
            ) -> Tensor:
                loss = self.q.loss(now[part], event[part], y[part]).sum(0)
                if aim is not None:
                    assert self.v is not None
                    loss = loss + expectile_loss(aim[part] - self.v(now[part]), settings.expectile)
                if others is not None and got is not None:
                    loss = loss + settings.conservative * self._overestimates(
                        now[part], event[part], others[part], got[part]
                    )
                return loss

            run.descend(losses, len(rows), "critic", self.optimizer)
            polyak(self.target, self.q, settings.polyak)

    def _overestimates(self, now: Tensor, event: Tensor, others: Tensor, got: Tensor) -> Tensor:
        """Cal-QL's term, summed over the networks, [b]. others [b,N,*E]; got [b]: returns, nan
        where they are not known.
        """
        count = others.shape[1]
        seen = now.repeat_interleave(count, 0)
        q_others = self.q(seen, self.run.policy.model.scored(others.flatten(0, 1)))
        floor = torch.where(got.isnan(), -torch.inf, got)
        return conservative(self.q(now, event), q_others.unflatten(1, (-1, count)), floor).sum(0)


def mixed_rows(
    run: Run, total: int, offline: int, share: float, updates: int, batch: int, purpose: str
) -> Iterator[Tensor]:
    """This process's rows of each update's batch, drawn with replacement from ``total``: ``share``
    of them from the first ``offline``, once there are others (RLPD, arXiv 2302.02948).
    """
    early = round(share * batch) if offline < total else batch
    generator = run.generator(purpose)
    for _ in range(updates):
        first = generator.integers(min(offline, total), size=early)
        rest = generator.integers(min(offline, total - 1), total, size=batch - early)
        yield run.mine(np.concatenate([first, rest]))

"""Part c: one update of implicit Q-learning, beside plain torch."""

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.speed_parts.timing import Comparison, compare, require_close, weights
from genpolicy.config.parse import load
from genpolicy.contracts.task import Context
from genpolicy.methods.parts.iql import ActionValue
from genpolicy.rollout.replay import Replay
from genpolicy.training.prepare import prepare
from genpolicy.training.processes import Processes
from genpolicy.training.run import Run

CHUNK, ACTION = 4, 4
DECISIONS, UPDATES = 512, 25
GAMMA = 0.99


def replay() -> Replay:
    """Decisions of 16 episodes with random content."""
    row = torch.arange(DECISIONS)
    length = DECISIONS // 16
    last = row % length == length - 1
    event = torch.rand(DECISIONS, CHUNK, ACTION) * 2 - 1
    return Replay(
        views=Context([""] * (DECISIONS + 1)),
        now=row,
        after=row + 1,
        event=event,
        start=event,
        rewards=torch.rand(DECISIONS, CHUNK).double(),
        executed=torch.full((DECISIONS,), CHUNK),
        human=torch.zeros(DECISIONS, CHUNK, dtype=torch.bool),
        terminated=last,
        success=last,
        episode=row // length,
        first=row % length == 0,
    )


class PlainCritic:
    """The same update by hand: the same networks, losses, rows, clipping and AdamW."""

    def __init__(self, run: Run, value: ActionValue) -> None:
        self.run, self.expectile = run, value.expectile
        self.pessimism, self.polyak, self.batch = value.pessimism, value.polyak, value.batch
        self.q, self.v = copy.deepcopy(value.q), copy.deepcopy(value.v)
        self.target = copy.deepcopy(value.target)
        self.parameters = [*self.q.parameters(), *self.v.parameters()]
        settings = value.optimizer.settings
        self.bound = settings.max_grad_norm
        self.adamw = torch.optim.AdamW(
            self.parameters,
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            foreach=True,
        )

    def learn(self, data: Replay, features: Tensor, updates: int) -> None:
        for critic in (self.q, self.target, self.v):
            critic.scale.fit(features)
        steps = torch.arange(data.rewards.shape[1])
        for rows in self.run.rows(len(data), (updates, self.batch), "critic"):
            now, after = features[data.now[rows]], features[data.after[rows]]
            event, executed = data.event[rows], data.executed[rows]
            with torch.no_grad():
                values = self.target(now, event)
                lower = values.mean(0) - self.pessimism * values.std(0, correction=0)
                counts = steps < executed[:, None]
                rewards = (data.rewards[rows].float() * counts * GAMMA**steps).sum(1)
                rest = GAMMA**executed * self.v(after) * ~data.terminated[rows]
                y = rewards + rest
            error = lower - self.v(now)
            asymmetry = (self.expectile - (error < 0).float()).abs()
            loss = (asymmetry * error**2).mean()
            loss = loss + ((self.q(now, event) - y) ** 2).sum(0).mean()
            self.adamw.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, self.bound)
            self.adamw.step()
            with torch.no_grad():
                for slow, fast in zip(self.target.parameters(), self.q.parameters(), strict=True):
                    slow.lerp_(fast, self.polyak)


def critic(repeats: int) -> Iterator[Comparison]:
    """`ActionValue.learn` of UPDATES updates, through `Run.descend`, per update; its preparation
    (standardising, the returns of 512 decisions) is in it. Weights of both sides are compared after
    the first call.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"--output={folder}/run", "--environments=1"]
        run, _ = prepare(
            load("quickstart_robot", settings),
            Path(folder) / "run",
            Processes(Accelerator(cpu=True)),
        )
        with run:
            value = ActionValue(run, GAMMA)
            plain = PlainCritic(run, value)
            data, features = replay(), torch.randn(DECISIONS + 1, run.features)
            value.learn(data, features, UPDATES)
            plain.learn(data, features, UPDATES)
            pairs = zip(value.q.parameters(), plain.q.parameters(), strict=True)
            for number, (ours, other) in enumerate(pairs):
                require_close(f"c, weight {number} of Q", ours.detach(), other.detach(), 1e-4)
            size = f"{value.batch} rows, {weights(plain.q) + weights(plain.v):,} weights"
            yield compare(
                f"c: update of Q and V, {size}",
                lambda: value.learn(data, features, UPDATES),
                lambda: plain.learn(data, features, UPDATES),
                repeats,
                UPDATES,
            )

"""The additions of RL-100's tests to the toy of control: data sets with outcomes, a small
experiment, and a task that writes down what is played and kills its process when it is told to.

``python -m tests.rl100_toy CONFIG...`` trains one after the other, each in a process of its own,
and prints their exit codes.
"""

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genpolicy.contracts.task import Context
from genpolicy.tasks._environments import Environments
from genpolicy.tasks._slots import Frame
from tests import toy_control
from tests.toy_control import Point, Recorded, Walk

CLIPPED = {
    "name": "floorstd",
    "floor": 0.1,
    "kernel": {"name": "clipstd", "high": 0.8, "kernel": {"name": "ddim", "eta": 1.0}},
}
"""RL-100's kernel."""
SMALL: dict[str, Any] = {
    "name": "rl100",
    "imitation": {"iterations": 2, "updates": 10, "batch": 16, "warmup": 5, "ema": 0.9},
    "offline": {
        "episodes": 8,
        "critic_updates": 5,
        "model_updates": 3,
        "candidates": 2,
        "sweeps": 2,
        "states": 12,
        "epochs": 1,
        "minibatch": 24,
        "horizon": 2,
        "starts": 8,
        "best_of": 3,
    },
    "online": {
        "episodes": 8,
        "epochs": 1,
        "minibatch": 32,
        "critic_epochs": 1,
        "critic_minibatch": 16,
        "warm_up": 0,
    },
}
"""The run's course: imitate 1 and 2, collect 3, criticise 4, improve 5 and 6, online from 7 on."""


@dataclass
class Outcomes(Recorded):
    """Episodes with their rewards and whether they succeeded;
    those of a slow expert are cut before they get there.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        task = Point(limit=self.limit, skill=self.skill)
        made = [task.demonstrate(seed, self.noise) for seed in range(self.episodes)]
        self.succeeded = [d.success for d in made]
        success = [
            torch.arange(len(d.actions)) == (len(d.actions) - 1 if d.success else -1) for d in made
        ]
        outcome = {
            "next.reward": torch.cat([d.rewards for d in made]),
            "next.success": torch.cat(success),
        }
        self.columns = {
            **self.values,
            **{name: value.float()[:, None] for name, value in outcome.items()},
        }


class Frames:
    """Episodes given by hand, of which frame i shows i and does i: lengths, and where there are
    some rewards [F] and success [F]. numbers: what the episodes are called.
    """

    fps = 10

    def __init__(
        self,
        lengths: Sequence[int],
        success: Tensor | None = None,
        rewards: Tensor | None = None,
        numbers: Sequence[int] | None = None,
    ) -> None:
        count = sum(lengths)
        self.columns = {"observation.state": torch.arange(count).float()[:, None]}
        self.columns["action"] = self.columns["observation.state"]
        self.shapes: Mapping[str, tuple[int, ...]] = dict.fromkeys(self.columns, (1,))
        self.stats: Mapping[str, Mapping[str, Tensor]] = {}
        self.columns |= {} if success is None else {"next.success": success.float()[:, None]}
        self.columns |= {} if rewards is None else {"next.reward": rewards.float()[:, None]}
        called = torch.tensor(list(range(len(lengths))) if numbers is None else list(numbers))
        every = torch.tensor(lengths)
        self.episode = called.repeat_interleave(every)
        self.end = every.cumsum(0).repeat_interleave(every)
        self.begin = self.end - every.repeat_interleave(every)

    def __len__(self) -> int:
        return len(self.episode)

    def rows(self, index: Tensor, history: int, actions: range) -> tuple[Context, Tensor, Tensor]:
        low, high = self.begin[index, None], self.end[index, None] - 1
        past = (index[:, None] + torch.arange(1 - history, 1)).clamp(low, high)
        wanted = index[:, None] + torch.tensor(actions)
        inside = wanted.clamp(low, high)
        seen = {"observation.state": self.columns["observation.state"][past]}
        return (
            Context(["walk"] * len(index), seen),
            self.columns["action"][inside],
            wanted != inside,
        )


class WatchedWalk(Walk):
    """A `Walk` that writes "begin SEED" and "end SEED" to ``log``; where log.kill lists the seed,
    it kills its process in the place of beginning.
    """

    def __init__(self, ends: bool, limit: int, log: str) -> None:
        super().__init__(ends)
        self.limit, self.log, self.taken, self.seed = limit, Path(log), 0, -1

    def reset(self, *, seed: int) -> tuple[Frame, dict[str, Any]]:
        order = self.log.with_suffix(".kill")
        if order.is_file() and str(seed) in (asked := order.read_text().split()):
            order.write_text(" ".join(other for other in asked if other != str(seed)))
            os.kill(os.getpid(), signal.SIGKILL)
        self.taken, self.seed = 0, seed
        self._write("begin")
        return super().reset(seed=seed)

    def step(self, action: Any) -> tuple[Frame, float, bool, bool, dict[str, Any]]:
        answer = super().step(action)
        self.taken += 1
        if answer[2] or self.taken == self.limit:
            self._write("end")
        return answer

    def _write(self, what: str) -> None:
        with open(self.log, "a") as file:
            file.write(f"{what} {self.seed}\n")


@dataclass
class Watched(Point):
    """``task: {name: "tests.rl100_toy:Watched", log: FILE}``."""

    log: str = ""

    def environments(self, count: int, history: int) -> Environments:
        make = partial(WatchedWalk, self.ends, self.limit, self.log)
        return Environments(make, count, history, self.limit, self.instruction)


def experiment(folder: Path, **sections: Any) -> dict[str, Any]:
    """A raw experiment of RL-100 on the toy, of nine tiny iterations;
    a ``method`` given here changes `SMALL`.
    """
    method = {**SMALL, **sections.pop("method", {})}
    for part in ("imitation", "offline", "online"):
        method[part] = {**SMALL[part], **method[part]}
    own: dict[str, Any] = {
        "policy": {"name": "mlp", "hidden": 16, "blocks": 1, "chunk": 2},
        "chain": {"steps": 3, "kernel": CLIPPED, "window": [0, 3]},
        "data": {"name": "tests.rl100_toy:Outcomes", "episodes": 12},
        "optimizer": {"weight_decay": 0.0},
        "budget": {"iterations": 9},
        "eval": {"every": 0, "episodes": 4},
        "environments": 4,
    }
    return toy_control.experiment(folder, **{**own, **sections, "method": method})


def main(paths: Sequence[str]) -> None:
    """Train in forked processes: libraries are imported once."""
    import genpolicy.methods.rl100
    import genpolicy.models.mlp  # noqa: F401
    from genpolicy.evaluation import curves
    from genpolicy.training.experiment import train

    curves.figures = lambda folder: None
    torch.set_num_threads(1)
    codes = []
    for path in paths:
        child = os.fork()
        if not child:
            train(path)
            os._exit(0)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(codes))


if __name__ == "__main__":
    main(sys.argv[1:])

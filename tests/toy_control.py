"""A toy of control: a point that walks to a goal, demonstrations of it in memory,
and experiments as raw YAML mappings.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from genpolicy.config import parse
from genpolicy.contracts.task import Context, Demonstration
from genpolicy.tasks._demonstrations import record
from genpolicy.tasks._environments import Environments
from genpolicy.tasks._slots import Frame
from genpolicy.training.experiment import train
from genpolicy.training.prepare import prepare
from genpolicy.training.processes import Processes
from genpolicy.training.run import Run

STATE, GOAL = "observation.state", "observation.environment_state"
SPEED = 0.25
"""The distance that an action of length 1 moves the point."""
NEAR = 0.2
"""Success: the point is so close to its goal."""


class Box(NamedTuple):
    """Bounds of an action."""

    low: np.ndarray
    high: np.ndarray


class Walk:
    """The point's world as a `Simulation`: place += SPEED * action; the reward is how much nearer
    it came, and 1 at the goal. ``ends``: reaching it ends the episode.
    """

    action_space = Box(np.full(2, -1, np.float32), np.full(2, 1, np.float32))

    def __init__(self, ends: bool) -> None:
        self.ends = ends
        self.place = self.goal = np.zeros(2)

    def reset(self, *, seed: int) -> tuple[Frame, dict[str, Any]]:
        generator = np.random.default_rng(seed)
        self.place = generator.uniform(-1, 1, 2)
        angle = generator.uniform(0, 2 * np.pi)
        self.goal = self.place + generator.uniform(0.6, 1.2) * np.array(
            [np.cos(angle), np.sin(angle)]
        )
        return self._frame(), {"success": False}

    def step(self, action: np.ndarray) -> tuple[Frame, float, bool, bool, dict[str, Any]]:
        before = self._distance()
        self.place = self.place + SPEED * action.astype(np.float64)
        success = self._distance() < NEAR
        reward = before - self._distance() + float(success)
        return self._frame(), reward, self.ends and success, False, {"success": success}

    def expert(self, frame: Frame, skill: float) -> np.ndarray:
        """Straight to the goal; ``skill``: the share of the way to it that one step may cover."""
        return skill * (frame[GOAL] - frame[STATE]) / SPEED

    def render(self) -> np.ndarray:
        """The point in white and its goal in green, on 24 x 24 pixels."""
        picture = np.zeros((24, 24, 3), np.uint8)
        for place, colour in ((self.goal, (0, 255, 0)), (self.place, (255, 255, 255))):
            x, y = ((place + 2.5) / 5 * 24).clip(0, 23).astype(int)
            picture[y, x] = colour
        return picture

    def close(self) -> None:
        pass

    def _distance(self) -> float:
        return float(np.linalg.norm(self.goal - self.place))

    def _frame(self) -> Frame:
        return {STATE: self.place.astype(np.float32), GOAL: self.goal.astype(np.float32)}


@dataclass
class Point:
    """``task: {name: "tests.toy_control:Point"}``. skill: of its expert, in (0, 1]. ends: reaching
    the goal ends an episode (else all are cut at ``limit``). judged: whether it says what success
    is.
    """

    limit: int = 10
    ends: bool = True
    skill: float = 1.0
    judged: bool = True

    def __post_init__(self) -> None:
        self.shapes: Mapping[str, tuple[int, ...]] = {STATE: (2,), GOAL: (2,)}
        self.action_dim, self.fps, self.instruction, self.has_success = (
            2,
            10,
            "walk to the goal",
            self.judged,
        )
        self.action_low, self.action_high = [-1.0] * 2, [1.0] * 2

    def environments(self, count: int, history: int) -> Environments:
        return Environments(partial(Walk, self.ends), count, history, self.limit, self.instruction)

    def demonstrate(self, seed: int, noise: float) -> Demonstration:
        walk = Walk(self.ends)
        return record(walk, partial(walk.expert, skill=self.skill), seed, self.limit, noise)

    def person(self) -> "Guide":
        return Guide(self.skill)


@dataclass
class Guide:
    """The expert as a `genpolicy.contracts.task.Person`; progress is minus the distance."""

    skill: float

    def act(self, context: Context) -> Tensor:
        return self.skill * self._way(context) / SPEED

    def progress(self, context: Context) -> float:
        return -float(self._way(context).norm())

    def _way(self, context: Context) -> Tensor:
        return context.observation[GOAL][0, -1] - context.observation[STATE][0, -1]


@dataclass
class Recorded:
    """``data: {name: "tests.toy_control:Recorded"}``:
    episodes of `Point`'s expert, in memory, seeds 0, 1, ...
    """

    episodes: int = 40
    noise: float = 0.1
    skill: float = 1.0
    limit: int = 10

    def __post_init__(self) -> None:
        task = Point(limit=self.limit, skill=self.skill)
        made = [task.demonstrate(seed, self.noise) for seed in range(self.episodes)]
        self.fps = task.fps
        self.values = {
            name: torch.cat([d.observation[name] for d in made]) for name in (STATE, GOAL)
        }
        self.values["action"] = torch.cat([d.actions for d in made])
        self.shapes: Mapping[str, tuple[int, ...]] = {
            n: tuple(v.shape[1:]) for n, v in self.values.items()
        }
        self.stats = {name: _statistics(value) for name, value in self.values.items()}
        lengths = torch.tensor([len(d.actions) for d in made])
        self.first = (lengths.cumsum(0) - lengths).repeat_interleave(
            lengths
        )  # of each frame's episode
        self.end = lengths.cumsum(0).repeat_interleave(lengths)
        self.columns, self.episode = self.values, torch.arange(len(made)).repeat_interleave(lengths)

    def __len__(self) -> int:
        return len(self.first)

    def rows(self, index: Tensor, history: int, actions: range) -> tuple[Context, Tensor, Tensor]:
        first, end = self.first[index, None], self.end[index, None]
        past = torch.maximum(index[:, None] + torch.arange(1 - history, 1), first)
        wanted = index[:, None] + torch.tensor(actions)
        inside = torch.minimum(torch.maximum(wanted, first), end - 1)
        seen = {name: self.values[name][past] for name in (STATE, GOAL)}
        return (
            Context(["walk to the goal"] * len(index), seen),
            self.values["action"][inside],
            wanted != inside,
        )


@dataclass
class Shuffled(Recorded):
    """The same numbers, but that actions have nothing to do with what was seen."""

    def __post_init__(self) -> None:
        super().__post_init__()
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))
        self.values["action"] = self.values["action"][order]


def _statistics(value: Tensor) -> dict[str, Tensor]:
    quantiles = {name: value.quantile(q, 0) for name, q in (("q01", 0.01), ("q99", 0.99))}
    return {
        "min": value.amin(0),
        "max": value.amax(0),
        "mean": value.mean(0),
        "std": value.std(0),
        **quantiles,
    }


def experiment(folder: Path, **sections: Any) -> dict[str, Any]:
    """A raw experiment on the toy: output folder/run; ``sections`` replace sections."""
    raw: dict[str, Any] = {
        "policy": {"name": "mlp", "hidden": 32, "blocks": 1, "chunk": 4},
        "chain": {
            "steps": 4,
            "kernel": {"name": "floorstd", "kernel": {"name": "ddim", "eta": 1.0}, "floor": 0.1},
        },
        "task": {"name": "tests.toy_control:Point"},
        "data": {"name": "tests.toy_control:Recorded"},
        "method": {"name": "bc", "batch": 64, "updates": 10},
        "optimizer": {"lr": 3e-3},
        "budget": {"iterations": 4},
        "eval": {"every": 0, "episodes": 20},
        "environments": 10,
        "threads": 1,
        "seed": 0,
        "output": str(folder / "run"),
    }
    return {**raw, **sections}


def prepared(folder: Path, accelerator: Any = None, **sections: Any) -> tuple[Run, Any]:
    """A run of `experiment` that stands at iteration 1, and its method; ``accelerator``:
    see `tests.peers`.
    """
    processes = Processes(accelerator or Accelerator(cpu=True))
    run, method = prepare(parse.parse(experiment(folder, **sections)), folder / "run", processes)
    run.spent.iteration = 1
    return run, method


def enter(run: Run, stage: str) -> None:
    """Put a run at the beginning of its first stage of this name, with that stage's optimiser."""
    run.stages.at = [each.name for each in run.stages.all].index(stage)
    run.stages.done = 0
    run.learner.begin_stage()


def cloned(folder: Path, **policy: Any) -> str:
    """The folder of a policy that has learned from a slow expert in a second:
    it reaches the goal now and then.
    """
    raw = experiment(
        folder,
        policy={"name": "mlp", "hidden": 32, "blocks": 1, "chunk": 2, **policy},
        data={"name": "tests.toy_control:Recorded", "skill": 0.15},
        method={"name": "bc", "batch": 128, "updates": 100},
        budget={"iterations": 2},
        output=str(folder / "cloned"),
    )
    return str(train(parse.parse(raw)).folder / "policy")

"""MetaWorld v3 from its state, pictures or point clouds: a Sawyer arm and 50 things to do on a
table, each with a scripted expert.

Every episode draws its own object and goal. A step is 1/80 s; an action is the hand's displacement
(x, y, z, in hundredths of a metre) and the gripper's force, each in [-1, 1].
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from genpolicy.config.errors import ConfigError, at_least, choice, positive, share
from genpolicy.contracts.task import Context, Demonstration
from genpolicy.tasks._demonstrations import record
from genpolicy.tasks._environments import Environments
from genpolicy.tasks._sawyer import HAND, PICTURES, POINTS, STATE, WORLD, Sawyer, See, catalogue
from genpolicy.tasks._simulators import library
from genpolicy.tasks._slots import Frame

NOISE = np.array([1, 1, 1, 0.3])
"""Shares of a demonstration's noise for hand (x, y, z) and gripper; more on the gripper drops
things.
"""


class Script:
    """MetaWorld's script as a `genpolicy.contracts.task.Person` who sees the 39 numbers."""

    def __init__(self, env: str) -> None:
        self._script = library("metaworld.policies", "task metaworld").ENV_POLICY_MAP[env]()

    def act(self, context: Context) -> Tensor:
        with warnings.catch_warnings():
            # the scripts' gains are meant to be clipped
            warnings.filterwarnings("ignore", "Constant", UserWarning)
            action = self._script.get_action(_numbers(context).double().numpy())
        return torch.from_numpy(np.asarray(action, np.float32))

    def progress(self, context: Context) -> float:
        """Minus the way that is left, metres: from the hand to the object, and from there to the
        goal.
        """
        numbers = _numbers(context)
        hand, thing, goal = numbers[:3], numbers[HAND : HAND + 3], numbers[-3:]
        return -float((hand - thing).norm() + (thing - goal).norm())


def _numbers(context: Context) -> Tensor:
    """The 39 numbers of the newest frame of one row."""
    return torch.cat([context.observation[name][0, -1] for name in (STATE, WORLD)])


@dataclass
class MetaWorld:
    """One of MetaWorld's tasks as a `genpolicy.contracts.task.ControlTask`. The defaults are ours.

    It shows the hand (x, y, z, metres, and how far the gripper is open) as observation.state, and
    the rest as ``see`` says. What a policy does not come to see (inside a chunk of actions) is not
    drawn.
    """

    env: str  # its name, e.g. peg-insert-side-v3
    # "sparse" is 1 for the step that succeeds and 0 elsewhere; "dense" is MetaWorld's own, 0 to 10
    # per step
    reward: Literal["sparse", "dense"] = "sparse"
    limit: int = 150  # environment steps of an episode, which also ends at success
    workers: int = 0  # processes that simulate; 0 is this one
    # "state" is the 35 numbers of objects, goal and the frame before; "pixels" a picture from above
    # in which the goal is a green ball; "points" a cloud on gripper, goal and objects, metres
    see: See = "state"
    size: int = 64  # height and width of the picture, in pixels
    points: int = 128  # points P of the cloud Float[P,3]
    # share of the range of objects and goal, around its middle and in each coordinate, that starts
    # are drawn from; so demonstrations can show less than what is asked of the policy
    spread: float = 1.0

    def __post_init__(self) -> None:
        choice("task metaworld: env", self.env, list(catalogue()))
        choice("task metaworld: reward", self.reward, ("sparse", "dense"))
        choice("task metaworld: see", self.see, get_args(See))
        at_least("task metaworld", self, limit=1, workers=0, size=16, points=32)
        positive("task metaworld", self, "spread")
        share("task metaworld", self, "spread")
        shown: dict[str, tuple[int, ...]] = {
            "state": {WORLD: (39 - HAND,)},
            "pixels": {PICTURES: (3, self.size, self.size)},
            "points": {POINTS: (self.points, 3)},
        }[self.see]
        self.shapes: Mapping[str, tuple[int, ...]] = {STATE: (HAND,), **shown}
        self.action_dim = 4
        self.action_low, self.action_high = [-1.0] * 4, [1.0] * 4
        self.fps = 80
        self.instruction = self.env.removesuffix("-v3").replace("-", " ")
        self.has_success = True

    def environments(self, count: int, history: int) -> Environments:
        return Environments(self._make, count, history, self.limit, self.instruction, self.workers)

    @property
    def _make(self) -> Callable[[], Sawyer]:
        return partial(Sawyer, self.env, self.reward, self.see, self.size, self.points, self.spread)

    def demonstrate(self, seed: int, noise: float) -> Demonstration:
        """Plays MetaWorld's script for this task, which reads the same 39 numbers; it does not
        always succeed.
        """
        script = library("metaworld.policies", "task metaworld").ENV_POLICY_MAP[self.env]()

        def expert(_frame: Frame) -> np.ndarray:
            return script.get_action(self._stage.numbers.astype(np.float64))

        with warnings.catch_warnings():
            # the scripts' gains are meant to be clipped
            warnings.filterwarnings("ignore", "Constant", UserWarning)
            return record(self._stage, expert, seed, self.limit, noise * NOISE)

    def person(self) -> Script:
        """The script step by step; `ConfigError` where its 39 numbers are not shown."""
        if self.see != "state":
            raise ConfigError(
                f"person: MetaWorld's script reads the state, and see is {self.see}; set see: state"
            )
        return Script(self.env)

    @cached_property
    def _stage(self) -> Sawyer:
        return self._make()

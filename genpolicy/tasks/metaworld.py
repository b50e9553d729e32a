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

from genpolicy.config.errors import at_least, choice, positive, share
from genpolicy.contracts.task import Demonstration
from genpolicy.tasks._demonstrations import record
from genpolicy.tasks._environments import Environments
from genpolicy.tasks._sawyer import HAND, PICTURES, POINTS, STATE, WORLD, Sawyer, See, catalogue
from genpolicy.tasks._simulators import library
from genpolicy.tasks._slots import Frame

NOISE = np.array([1, 1, 1, 0.3])
"""The share of a demonstration's noise that hand and gripper get: more on the gripper drops things.
"""


@dataclass
class MetaWorld:
    """One of MetaWorld's tasks as a `genpolicy.contracts.task.ControlTask`.

    env: its name, e.g. peg-insert-side-v3. reward: "sparse", 1 for the step that succeeds and 0
    elsewhere, or "dense", MetaWorld's own (0 to 10 a step). limit: environment steps of an episode;
    it also ends at success. workers: processes that simulate; 0 is this one. spread: the share of
    the range of objects and goal, around its middle and in each coordinate, that starts are drawn
    from; so demonstrations can show less than what is asked of the policy. see: beside the hand (x,
    y, z, metres, and how far the gripper is open: observation.state) either "state", the 35 numbers
    of objects, goal and the frame before; or "pixels", a picture of ``size`` x ``size`` from above
    in which the goal is a green ball; or "points", ``points`` points Float[P,3], metres, on
    gripper, goal and objects. What a policy does not come to see (inside a chunk of actions) is not
    drawn.
    """

    env: str
    reward: Literal["sparse", "dense"] = "sparse"
    limit: int = 150
    workers: int = 0
    see: See = "state"
    size: int = 64
    points: int = 128
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
        self.fps = 80
        self.instruction = self.env.removesuffix("-v3").replace("-", " ")
        self.has_success = True

    def environments(self, count: int, history: int) -> Environments:
        return Environments(self._make, count, history, self.limit, self.instruction, self.workers)

    @property
    def _make(self) -> Callable[[], Sawyer]:
        return partial(Sawyer, self.env, self.reward, self.see, self.size, self.points, self.spread)

    def demonstrate(self, seed: int, noise: float) -> Demonstration:
        """MetaWorld's script for this task, which reads the same 39 numbers; it does not always
        succeed.
        """
        script = library("metaworld.policies", "task metaworld").ENV_POLICY_MAP[self.env]()

        def expert(_frame: Frame) -> np.ndarray:
            return script.get_action(self._stage.numbers.astype(np.float64))

        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Constant", UserWarning
            )  # the scripts' gains are meant to be clipped
            return record(self._stage, expert, seed, self.limit, noise * NOISE)

    @cached_property
    def _stage(self) -> Sawyer:
        return self._make()

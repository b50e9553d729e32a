"""Pushing a T as a simulation: gym_pusht's, seen as keypoints, with a picture where it is asked
for.
"""

from typing import Any, Literal

import numpy as np

from genpolicy.tasks._gym import IMAGES, frame
from genpolicy.tasks._simulators import library


class Pushing:
    """A `genpolicy.tasks._slots.Simulation`: a disc that follows the action and pushes a T onto a
    target.

    world: gym_pusht's own environment.
    """

    def __init__(self, reward: Literal["dense", "sparse"], pixels: bool) -> None:
        pusht = library("gym_pusht.envs.pusht", "task pusht")
        self.world = pusht.PushTEnv("environment_state_agent_pos")
        self.world._get_coverage = self._coverage
        self._outline = pusht.pymunk_to_shapely
        self._sparse = reward == "sparse"
        self._pixels = pixels
        self.action_space = self.world.action_space

    def reset(self, *, seed: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        observation, info = self.world.reset(seed=seed)
        return self._frame(observation), info

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        observation, reward, _, _, info = self.world.step(action)
        success = bool(info["is_success"])
        reward = float(success if self._sparse else reward)
        return self._frame(observation), reward, success, False, {"success": success}

    def render(self) -> np.ndarray:
        return self.world.render()

    def close(self) -> None:
        self.world.close()

    def _frame(self, observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen = frame(observation)
        if self._pixels:  # as its own pixel observations: 96 x 96, without the action's cross
            seen[IMAGES + "top"] = self.world._render().transpose(2, 0, 1).copy()
        return seen

    def _coverage(self) -> float:
        """The covered share of the target, as gym_pusht has it, but with the T's two parts in a
        fixed order: it takes them from a set, whose order changes from run to run and with it the
        last bit.
        """
        bodies = (self.world.get_goal_pose_body(self.world.goal_pose), self.world.block)
        goal, block = (self._outline(body, self.world._block_shapes) for body in bodies)
        return goal.intersection(block).area / goal.area

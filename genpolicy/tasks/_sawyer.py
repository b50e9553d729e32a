"""MetaWorld's arm as a simulation whose goal can be seen."""

from typing import Any

import numpy as np

from genpolicy.tasks._simulators import RenderError, library

STATE, WORLD = "observation.state", "observation.environment_state"
HAND = 4
"""Of the 39 numbers that MetaWorld shows, the first are the hand (x, y, z) and how far the gripper is open."""
PICTURE = 240
"""Height and width of what `render` draws, in pixels."""
CAMERA = {"lookat": (0.0, 0.65, 0.15), "distance": 1.35, "azimuth": 135.0, "elevation": -30.0}
"""From behind the arm's shoulder, metres and degrees: doors and shelves show their fronts. MetaWorld's own cameras at
the corners are upside down."""


def catalogue() -> dict[str, Any]:
    """MetaWorld's environments by name."""
    return library("metaworld.env_dict", "task metaworld").ALL_V3_ENVIRONMENTS


class Sawyer:
    """A `genpolicy.tasks._slots.Simulation` of one MetaWorld task whose goal can be seen."""

    def __init__(self, env: str, reward: str) -> None:
        self._world = catalogue()[env]()
        world = self._world
        world._partially_observable = False
        # The bounds of what is seen were cached when the goal was still hidden; step() would clip the goal to 0.
        world.__dict__.pop("sawyer_observation_space", None)
        world._freeze_rand_vec, world.seeded_rand_vec = False, True  # objects and goal are drawn from the seed
        world._set_task_called = True  # nothing else of a task is needed
        world.max_path_length = np.inf  # the limit is kept outside
        self._sparse = reward == "sparse"
        self._renderer: Any = None
        self.action_space = world.action_space

    def reset(self, *, seed: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        self._world.seed(seed)
        observation, _ = self._world.reset()
        return _frame(observation), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        observation, reward, _, _, info = self._world.step(action)
        success = bool(info["success"])
        reward = float(success if self._sparse else reward)
        return _frame(observation), reward, success, False, {"success": success}

    def render(self) -> np.ndarray:
        mujoco: Any = library("mujoco", "task metaworld")
        if self._renderer is None:
            try:
                self._renderer = mujoco.Renderer(self._world.model, PICTURE, PICTURE)
            except Exception as error:  # EGL's, GLFW's or OSMesa's
                why = " ".join(str(error).split())
                raise RenderError(f"MuJoCo can't draw here: {why}; set MUJOCO_GL to egl, glfw or osmesa") from error
            self._camera = mujoco.MjvCamera()
            for setting, value in CAMERA.items():
                setattr(self._camera, setting, value)
        self._renderer.update_scene(self._world.data, self._camera)
        return self._renderer.render()

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        self._world.close()


def _frame(observation: np.ndarray) -> dict[str, np.ndarray]:
    return {STATE: observation[:HAND].astype(np.float32), WORLD: observation[HAND:].astype(np.float32)}

"""Any Gymnasium environment as a simulation: its observations by LeRobot's names, its own word on
success.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from genpolicy.config.errors import ConfigError, RenderError, nearest
from genpolicy.config.origin import Origin
from genpolicy.tasks._simulators import library, quiet

WORLD = "observation.environment_state"
IMAGES = "observation.images."
NAMES = {"agent_pos": "observation.state", "environment_state": WORLD}
GOAL = ("observation", "achieved_goal", "desired_goal")
SUCCESS = ("is_success", "success", "goal_achieved")
"""Names under which an environment's info says that it is done."""
LEAF = "task gymnasium"
PACKAGES = ("gymnasium_robotics", "gym_pusht")
"""Packages of environments that genpolicy itself depends on, and imports whoever names them."""
INDIRECT = ("GymV21Environment-v0", "GymV26Environment-v0")
"""Environments that make another one, whose id may name a module, too."""


class Gym:
    """A `genpolicy.tasks._slots.Simulation` of a registered environment, without its time limit.

    An id that Gymnasium does not know may come from the package it is in the namespace of
    (gym_pusht/PushT-v0 is gym_pusht's) or from gymnasium_robotics; any other package is imported
    only where ``origin``, which the id comes from, may. spec: the registered one. reports_success:
    whether the info of the last step said so.
    """

    def __init__(self, env: str, kwargs: Mapping[str, Any], origin: Origin) -> None:
        gymnasium = library("gymnasium", LEAF)
        self.spec = _spec(gymnasium, env, origin)
        modes = {"render_mode": "rgb_array", **kwargs}
        try:
            with quiet():
                self._env = gymnasium.make(
                    env, max_episode_steps=-1, disable_env_checker=True, **modes
                )
        except (TypeError, ValueError, gymnasium.error.Error) as error:
            raise ConfigError(
                f"{LEAF}: {env} can't be made with {dict(kwargs)}: {_brief(error)}"
            ) from error
        self.action_space = self._env.action_space
        if (
            not isinstance(self.action_space, gymnasium.spaces.Box)
            or len(self.action_space.shape) != 1
        ):
            raise ConfigError(
                f"{LEAF}: {env} takes actions {self.action_space}; "
                "they must be a Box of one dimension"
            )
        self.reports_success = False

    @property
    def fps(self) -> int:
        """Environment steps per second: the rate that the environment draws at, or its time step's
        inverse, or 1.
        """
        rate = self._env.metadata.get("render_fps")
        return round(rate or 1 / getattr(self._env.unwrapped, "dt", 1))

    def reset(self, *, seed: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        observation, info = self._env.reset(seed=seed)
        return frame(observation), info

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self._env.step(action)
        said = [bool(info[name]) for name in SUCCESS if name in info]
        self.reports_success = bool(said)
        success = {"success": any(said)}
        return frame(observation), float(reward), bool(terminated), bool(truncated), success

    def render(self) -> np.ndarray:
        picture = self._env.render()
        if not isinstance(picture, np.ndarray):
            raise RenderError(f"{LEAF}: {self.spec.id} draws no pictures")
        return picture

    def close(self) -> None:
        self._env.close()


def _spec(gymnasium: Any, env: str, origin: Origin) -> Any:
    """The registered specification of an id, after its package was asked to register it."""
    module, _, name = env.rpartition(":")
    missing = ""
    if name in INDIRECT:
        origin.admit(env, f"env of {LEAF}")
    if module:
        origin.admit(env, f"env of {LEAF}")
        library(module, f"{LEAF}: {env}")
    elif name not in gymnasium.registry:
        package = name.rpartition("/")[0] or PACKAGES[0]
        if package not in PACKAGES:
            origin.admit(env, f"env of {LEAF}")
        try:
            library(package, LEAF)
        except ConfigError:
            missing = f" ({package} is not installed)"
    if name not in gymnasium.registry:
        raise ConfigError(f"{LEAF}: env is {env!r}{nearest(name, [*gymnasium.registry])}{missing}")
    return gymnasium.registry[name]


def frame(observation: Any) -> dict[str, np.ndarray]:
    """An observation by LeRobot's names: vectors float32 [n], pictures uint8 [C,H,W].

    A vector is the robot's state, a picture the camera "top". Of a dict, agent_pos is the state,
    environment_state itself, pixels the camera "top" or several by name; a goal environment's three
    parts are one environment_state.
    """
    if not isinstance(observation, Mapping):
        observation = {"pixels" if _is_picture(observation) else "agent_pos": observation}
    if set(GOAL) <= set(observation):
        return {WORLD: np.concatenate([_vector(observation[part]) for part in GOAL])}
    seen: dict[str, np.ndarray] = {}
    for name, value in observation.items():
        if name == "pixels":
            cameras = value if isinstance(value, Mapping) else {"top": value}
            seen |= {
                IMAGES + camera: picture.transpose(2, 0, 1).copy()
                for camera, picture in cameras.items()
            }
        else:
            seen[NAMES.get(name, f"observation.{name}")] = _vector(value)
    return seen


def _is_picture(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3


def _vector(value: Any) -> np.ndarray:
    if isinstance(value, Mapping):
        return np.concatenate([_vector(part) for part in value.values()])
    return np.array(value, np.float32).ravel()


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

"""One environment of a genpolicy task as Gymnasium has it,
with the names that LeRobot's commands look for.
"""

from typing import Any

import gymnasium
import numpy as np
import torch

from genpolicy.contracts.task import ControlTask, TaskStep

NAMES = {"observation.state": "agent_pos", "observation.environment_state": "environment_state"}
"""LeRobot's names of observations inside a gymnasium environment, by those in its data sets."""


class ControlEnv(gymnasium.Env):
    """Vector observations alone, float32. The same seed is the same episode as in genpolicy.

    ``draw`` False renders black frames: LeRobot's evaluation always writes videos, and drawing
    needs a graphics library and ten times as long as the episode.
    """

    def __init__(self, task: ControlTask, draw: bool) -> None:
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": task.fps}
        self.task = self.task_description = task.instruction
        self._max_episode_steps = task.limit
        self._draw = draw
        self._environments = task.environments(1, 1)
        boxes = {NAMES[name]: _box(shape) for name, shape in task.shapes.items()}
        self.observation_space = gymnasium.spaces.Dict(boxes)
        self.action_space = _box((task.action_dim,))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """An episode of this seed; without one, of a seed that the last one decides."""
        super().reset(seed=seed)
        chosen = int(self.np_random.integers(2**31)) if seed is None else seed
        context = self._environments.reset([0], [chosen])
        return _frame(context.observation), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One environment step: a chunk of one action."""
        taken: TaskStep = self._environments.step(
            [0], torch.as_tensor(action, dtype=torch.float32)[None, None]
        )
        ended, cut = bool(taken.terminated[0]), bool(taken.truncated[0])
        success = bool(taken.success[0])
        return (
            _frame(taken.context.observation),
            float(taken.rewards[0, 0]),
            ended,
            cut,
            {"is_success": success},
        )

    def render(self) -> np.ndarray:
        """The picture of a camera, or a black one, uint8 [H,W,3]."""
        return self._environments.render(0) if self._draw else np.zeros((64, 64, 3), np.uint8)

    def close(self) -> None:
        """Give everything back."""
        self._environments.close()


def _box(shape: tuple[int, ...]) -> gymnasium.spaces.Box:
    """Without bounds: the environment itself clips actions to its own."""
    return gymnasium.spaces.Box(-np.inf, np.inf, shape, np.float32)


def _frame(observation: Any) -> dict[str, np.ndarray]:
    return {NAMES[name]: value[0, -1].numpy() for name, value in observation.items()}

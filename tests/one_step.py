"""A toy of one decision: a single action in [-1, 1] is taken, and the episode ends.

The data's actions lie half at +`MODE` and half at -`MODE`, and the reward is highest at +`MODE`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from genpolicy.contracts.task import Context, Demonstration
from genpolicy.tasks._demonstrations import record
from genpolicy.tasks._environments import Environments
from genpolicy.tasks._slots import Frame
from genpolicy.training.run import Run
from tests import toy_control
from tests.toy_control import STATE, Box

MODE, SPREAD = 0.6, 0.02
"""Where the data's actions lie, and the std around it, in the environment's units."""
ODE = {"name": "ddim", "eta": 0.0}
POLICIES: dict[str, dict[str, Any]] = {
    "diffusion": {
        "policy": {"name": "mlp", "family": "vp", "hidden": 64, "blocks": 1, "chunk": 1},
        "chain": {"steps": 10, "kernel": ODE},
    },
    "flow": {
        "policy": {"name": "mlp", "family": "flow", "hidden": 32, "blocks": 1, "chunk": 1},
        "chain": {"steps": 5, "kernel": ODE},
    },
    "tokens": {
        "policy": {"name": "tokens", "hidden": 32, "blocks": 1, "chunk": 1, "bins": 32},
        "chain": {"steps": 1, "kernel": ODE},
    },
}
"""A small policy of each class, as sections of an experiment."""


class Choice:
    """The world as a `Simulation`: the reward of an action a is -4 (a - MODE)^2."""

    action_space = Box(np.full(1, -1, np.float32), np.full(1, 1, np.float32))

    def __init__(self) -> None:
        self.seen: Frame = {}

    def reset(self, *, seed: int) -> tuple[Frame, dict[str, Any]]:
        state = np.random.default_rng(seed).uniform(-1, 1, 1)
        self.seen = {STATE: state.astype(np.float32)}
        return self.seen, {"success": False}

    def step(self, action: np.ndarray) -> tuple[Frame, float, bool, bool, dict[str, Any]]:
        reward = -4 * float((action[0] - MODE) ** 2)
        return self.seen, reward, True, False, {"success": reward > -0.1}

    def render(self) -> np.ndarray:
        return np.zeros((4, 4, 3), np.uint8)

    def close(self) -> None:
        pass


@dataclass
class Chosen:
    """``task: {name: "tests.one_step:Chosen"}``."""

    limit: ClassVar[int] = 1
    fps: ClassVar[int] = 10
    action_dim: ClassVar[int] = 1
    instruction: ClassVar[str] = "choose"
    has_success: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.shapes: Mapping[str, tuple[int, ...]] = {STATE: (1,)}
        self.action_low, self.action_high = [-1.0], [1.0]

    def environments(self, count: int, history: int) -> Environments:
        return Environments(Choice, count, history, self.limit, self.instruction)

    def demonstrate(self, seed: int, noise: float) -> Demonstration:
        return record(Choice(), lambda frame: np.full(1, MODE), seed, self.limit, noise)


@dataclass
class Both:
    """``data: {name: "tests.one_step:Both"}``: episodes of one action, half in each mode."""

    episodes: int = 400

    fps: ClassVar[int] = 10

    def __post_init__(self) -> None:
        generator = np.random.default_rng(0)
        side = np.where(np.arange(self.episodes) % 2, 1.0, -1.0)
        action = side * MODE + SPREAD * generator.standard_normal(self.episodes)
        values = {
            STATE: torch.from_numpy(generator.uniform(-1, 1, (self.episodes, 1))).float(),
            "action": torch.from_numpy(action.clip(-1, 1))[:, None].float(),
        }
        self.values = values
        reward = -4 * (values["action"] - MODE) ** 2
        outcome = {"next.reward": reward, "next.success": (reward > -0.1).float()}
        self.columns = {**values, **outcome}
        self.shapes: Mapping[str, tuple[int, ...]] = dict.fromkeys(values, (1,))
        self.stats = {name: toy_control._statistics(value) for name, value in values.items()}
        self.episode = torch.arange(self.episodes)

    def __len__(self) -> int:
        return self.episodes

    def rows(self, index: Tensor, history: int, actions: range) -> tuple[Context, Tensor, Tensor]:
        seen = {STATE: self.values[STATE][index][:, None].expand(-1, history, -1)}
        outside = (torch.tensor(actions) != 0).expand(len(index), -1)
        action = self.values["action"][index][:, None].expand(-1, len(actions), -1)
        return Context(["choose"] * len(index), seen), action, outside


def prepared(folder: Path, kind: str = "flow", **sections: Any) -> tuple[Run, Any]:
    """A run on the toy that stands at iteration 1, with a policy of `POLICIES`, and its method."""
    own = {
        **POLICIES[kind],
        "task": {"name": "tests.one_step:Chosen"},
        "data": {"name": "tests.one_step:Both"},
        "eval": {"every": 0, "episodes": 4},
        "environments": 4,
    }
    return toy_control.prepared(folder, **{**own, **sections})

"""Tiny LeRobot DiffusionPolicies, their data set, and what they see:
real classes, no hub, built in milliseconds.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genpolicy.contracts.task import Context
from genpolicy.models.lerobot_diffusion import LeRobotDiffusion

STATE, WORLD, TOP, FRONT = (
    "observation.state",
    "observation.environment_state",
    "observation.images.top",
    "observation.images.front",
)
DIMS = {STATE: (3,), WORLD: (5,), TOP: (3, 64, 64), FRONT: (3, 64, 64), "action": (2,)}
SMALL = {
    "n_obs_steps": 2,
    "horizon": 8,
    "n_action_steps": 4,
    "down_dims": [16, 32],
    "diffusion_step_embed_dim": 16,
    "noise_scheduler_type": "DDIM",
    "num_train_timesteps": 100,
    "pretrained_backbone_weights": None,
    "use_group_norm": True,
    "spatial_softmax_num_keypoints": 4,
}
"""Keys of DiffusionConfig."""


class Recorded:
    """Sixty frames whose values lie far from the unit box;
    the last dim of the world stood still.
    """

    fps = 10

    def __init__(self, *names: str) -> None:
        generator = torch.Generator().manual_seed(7)
        self.values: dict[str, Tensor] = {}
        for name in (*names, "action"):
            value = torch.rand(60, *DIMS[name], generator=generator)
            self.values[name] = (
                value if len(DIMS[name]) == 3 else value * torch.linspace(1, 40, DIMS[name][0]) - 3
            )
        if WORLD in names:
            self.values[WORLD][:, -1] = 2.5
        self.shapes = {name: DIMS[name] for name in self.values}
        self.stats = {name: self._stats(value) for name, value in self.values.items()}

    @staticmethod
    def _stats(value: Tensor) -> dict[str, Tensor]:
        quantiles = {"q01": value.quantile(0.01, 0), "q99": value.quantile(0.99, 0)}
        return {
            "min": value.amin(0),
            "max": value.amax(0),
            "mean": value.mean(0),
            "std": value.std(0),
            **quantiles,
        }

    def __len__(self) -> int:
        return 60

    def rows(self, index: Tensor, history: int, actions: range) -> tuple[Context, Tensor, Tensor]:
        past = (index[:, None] + torch.arange(1 - history, 1)).clamp(0, 59)
        asked = index[:, None] + torch.tensor(actions)
        seen = {name: value[past] for name, value in self.values.items() if name != "action"}
        return (
            Context(["reach the cube"] * len(index), seen),
            self.values["action"][asked.clamp(0, 59)],
            (asked < 0) | (asked > 59),
        )


def diffusion(
    *names: str, train: Any = "full", spacing: Any = "lerobot", **config: Any
) -> LeRobotDiffusion:
    """A fresh tiny policy that sees ``names``."""
    model = LeRobotDiffusion(config={**SMALL, **config}, train=train, spacing=spacing, device="cpu")
    model.initialise(Recorded(*names))
    return model


def saved(model: LeRobotDiffusion, folder: Path) -> Path:
    """The policy's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save(folder)
    return folder

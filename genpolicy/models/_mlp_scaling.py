"""The scale of what an mlp sees and does, from the statistics of its data set: observations are
standardised by mean and std, actions scaled to [-1, 1] by min and max.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genpolicy.contracts.dataset import Dataset

STILL = 1e-4
"""An observation dim whose std is below this stood still in the data: it is only shifted."""
STD_FLOOR = 0.01
"""Least std that an observation dim that moved is divided by."""
OUTLIER = 5.0
"""Standardised observations are clamped to this: what the data never came near should not be
extrapolated.
"""
REACH_FLOOR = 1e-3
"""Least half range of an action dim, in the environment's units: one that never moved in the data
hardly moves, and the scaling stays invertible.
"""


@dataclass(frozen=True)
class Scaling:
    """The statistics, as they are saved.

    tensors: "NAME.mean" and "NAME.std" of every vector and point cloud that is seen, and of the
        actions the middle and the half of their range, "action.middle" and "action.reach" [D].
    """

    tensors: dict[str, Tensor]

    @classmethod
    def fit(cls, dataset: Dataset, names: Sequence[str], device: torch.device) -> "Scaling":
        """Takes the statistics of the observations ``names`` and of the actions of a data set."""
        tensors: dict[str, Tensor] = {}
        for name in names:
            if len(dataset.shapes[name]) == 3:
                continue  # pictures stay in [0,1]
            mean, std = (dataset.stats[name][statistic].float() for statistic in ("mean", "std"))
            if len(dataset.shapes[name]) == 2:  # of all points together
                variance = std.square().mean(0) + mean.var(0, correction=0)
                mean = mean.mean(0)
                std = variance.sqrt()
            divisor = torch.where(std < STILL, 1.0, std.clamp_min(STD_FLOOR))
            tensors[f"{name}.mean"] = mean.to(device)
            tensors[f"{name}.std"] = divisor.to(device)
        low, high = (dataset.stats["action"][statistic].float() for statistic in ("min", "max"))
        tensors["action.middle"] = ((high + low) / 2).to(device)
        tensors["action.reach"] = ((high - low) / 2).clamp_min(REACH_FLOOR).to(device)
        return cls(tensors)

    def standardised(self, name: str, seen: Tensor) -> Tensor:
        """Standardises the observation ``name`` [B,history,*shape], a vector or a point cloud."""
        standard = (seen - self.tensors[f"{name}.mean"]) / self.tensors[f"{name}.std"]
        return standard.clamp(-OUTLIER, OUTLIER)

    def observed(self, name: str, standard: Tensor) -> Tensor:
        """Inverts `standardised`, for values in which nothing is clamped."""
        return standard * self.tensors[f"{name}.std"] + self.tensors[f"{name}.mean"]

    def event(self, actions: Tensor) -> Tensor:
        """Scales actions [B,T,D] so that the data's range is [-1, 1]."""
        return (actions - self.tensors["action.middle"]) / self.tensors["action.reach"]

    def actions(self, event: Tensor) -> Tensor:
        """Inverts `event`."""
        return event * self.tensors["action.reach"] + self.tensors["action.middle"]

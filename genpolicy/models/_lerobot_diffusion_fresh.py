"""A fresh DiffusionPolicy: its configuration from our settings, its weights for a data set."""

from collections.abc import Mapping
from typing import Any

import torch

from genpolicy.chain.values import Parametrisation
from genpolicy.config.parse import decode
from genpolicy.contracts.dataset import Dataset
from genpolicy.models import _lerobot as theirs

DECIDED = ("input_features", "output_features", "device", "pretrained_path")
"""Keys of LeRobot's DiffusionConfig that the data set and the device decide."""
NORMALISED = {"VISUAL": "MEAN_STD", "STATE": "MIN_MAX", "ENV": "MIN_MAX", "ACTION": "MIN_MAX"}
"""LeRobot's defaults, and an environment state like the robot's: its own default leaves it as it
is.
"""


def configure(given: Mapping[str, Any], head: Parametrisation, device: torch.device) -> Any:
    """Returns LeRobot's DiffusionConfig with the keys ``given`` (``policy.config``).

    Raises `ValueError` where one of them is decided elsewhere, or is none of its keys.
    """
    with theirs.lerobot():
        from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig

        for name in given:
            if name in DECIDED:
                raise ValueError(
                    f"policy.config.{name} can't be set there: the data set and the device"
                    " decide it"
                )
        settings = {
            "normalization_mapping": NORMALISED,
            **given,
            "prediction_type": head,
            "device": str(device),
        }
        return decode(DiffusionConfig, settings, "policy.config")


def draw(config: Any, dataset: Dataset, device: torch.device) -> Any:
    """Draws a policy's weights, from torch's global generator, for the features of ``dataset`` that
    a DiffusionPolicy can see; ``config`` then names them.

    Raises `ValueError` where it can see too few, and where batch norms would have to learn.
    """
    names = [
        name
        for name in dataset.shapes
        if name in (theirs.STATE, theirs.WORLD) or name.startswith(theirs.CAMERA)
    ]
    if theirs.STATE not in names or len(names) == 1:
        raise ValueError(
            f"LeRobot's DiffusionPolicy needs {theirs.STATE} and {theirs.WORLD} or a camera; the"
            f" data set has {', '.join(dataset.shapes)}"
        )
    cameras = any(name.startswith(theirs.CAMERA) for name in names)
    if cameras and not config.use_group_norm and config.pretrained_backbone_weights is None:
        raise ValueError(
            "policy.config: use_group_norm must be true where pretrained_backbone_weights is null:"
            " batch norms do not gather statistics here, because the policy learns as it acts"
        )
    with theirs.lerobot():
        from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

        config.input_features = theirs.features(dataset.shapes, names)
        config.output_features = theirs.features(dataset.shapes, ["action"])
        return DiffusionPolicy(config).to(device)

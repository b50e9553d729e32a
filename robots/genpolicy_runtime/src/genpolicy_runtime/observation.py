"""Observations: one frame is checked, and becomes the numbers that the graphs take."""

from collections.abc import Mapping

import numpy as np

from genpolicy_runtime.errors import ObservationError, shown
from genpolicy_runtime.manifest import Observed

Frame = dict[str, np.ndarray]
"""An observation's name -> float32 [*shape]; images are [3,H,W] in [0,1]."""


def frame(observation: Mapping[str, np.ndarray], needed: Mapping[str, Observed]) -> Frame:
    """Returns the frame that an observation shows; raises `ObservationError`."""
    if not isinstance(observation, Mapping):
        raise ObservationError(
            f"the observation is {shown(observation)}; it must be a dict of {', '.join(needed)}"
        )
    for name in needed:
        if name not in observation:
            raise ObservationError(
                f"the observation lacks {name}; the policy needs {', '.join(needed)}"
            )
    for name in observation:
        if name not in needed:
            raise ObservationError(
                f"the observation has {shown(name)}, which the policy does not know;"
                f" it needs {', '.join(needed)}"
            )
    return {name: _values(name, observation[name], one) for name, one in needed.items()}


def _values(name: str, value: object, needed: Observed) -> np.ndarray:
    """The numbers of one part of an observation, in memory of their own."""
    if not isinstance(value, np.ndarray):
        raise ObservationError(f"{name} is a {type(value).__name__}; it must be {_valid(needed)}")
    kind = (value.dtype, value.shape)
    image = needed.kind == "image"
    if image and kind == (np.uint8, (*needed.shape[1:], needed.shape[0])):
        return value.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    if kind != (np.float32, needed.shape):
        raise ObservationError(
            f"{name} is {value.dtype} {list(value.shape)}; it must be {_valid(needed)}"
        )
    wrong = value[~np.isfinite(value)]
    if wrong.size:
        raise ObservationError(f"{name} has {wrong[0]} in it; it must be {_valid(needed)}")
    if image and (value.min() < 0 or value.max() > 1):
        raise ObservationError(
            f"{name} has values from {value.min():.6g} to {value.max():.6g};"
            f" it must be {_valid(needed)}"
        )
    return value.copy()


def _valid(needed: Observed) -> str:
    """The valid arrays of one part of an observation, in words."""
    if needed.kind == "vector":
        return f"a numpy array float32 {list(needed.shape)} of finite numbers"
    channels, height, width = needed.shape
    return (
        f"a numpy array float32 {[channels, height, width]} in [0,1]"
        f" or uint8 {[height, width, channels]}"
    )

"""Strict score of the shapes world: 1 if a picture shows just the caption's two objects so
related.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genpolicy.rewards import _shapes


def shapes_strict(images: Tensor, context) -> Tensor:
    """Float[B], 0 or 1, of pictures Float[B, 3, H, W] in [0, 1] under the captions
    `context.prompts`.
    """
    return torch.from_numpy(_shapes.scores(_shapes.to_uint8(images), context.prompts)[:, 0])

"""Strict score of the motion world: 1 if a video shows just the caption's object, and it moves
evenly in the caption's direction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genpolicy.rewards import _motion, _shapes


def motion_strict(videos: Tensor, context) -> Tensor:
    """Float[B], 0 or 1, of videos Float[B, F, 3, H, W] in [0, 1] under the captions
    `context.prompts`.
    """
    return torch.from_numpy(_motion.scores(_shapes.to_uint8(videos), context.prompts)[:, 0])

"""Dense score of the motion world, in [0, 1]: the mean share of frames with the right colour and
shape, and of steps that go in the right direction and are alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genpolicy.rewards import _motion, _shapes


def motion_dense(videos: Tensor, context) -> Tensor:
    """Float[B] in [0, 1] of videos Float[B, F, 3, H, W] in [0, 1] under the captions
    `context.prompts`: see `genpolicy.rewards._motion`.
    """
    return torch.from_numpy(_motion.scores(_shapes.to_uint8(videos), context.prompts)[:, 1])

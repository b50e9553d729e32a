"""Dense score of the shapes world, in [0, 1]: partial credit for right attributes and the right
relation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genpolicy.rewards import _shapes


def shapes_dense(images: Tensor, context) -> Tensor:
    """Float[B] in [0, 1] of pictures Float[B, 3, H, W] in [0, 1] under the captions
    `context.prompts`.

    .2 for each right colour and shape of the best matching, .2 for the relation once all four are
    right, less .1 for every object beyond the second, never below 0.
    """
    return torch.from_numpy(_shapes.scores(_shapes.to_uint8(images), context.prompts)[:, 1])

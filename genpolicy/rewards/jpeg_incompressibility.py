"""JPEG incompressibility: larger files score higher (DDPO, arXiv 2305.13301;
kvablack/ddpo-pytorch).

reward = size of the picture's JPEG file at quality 95, in **decimal kilobytes** (bytes / 1000). No
weights, no prompt, no randomness: the first check that a training loop works at all. A 512 x 512
picture of plain grey has 4.7, one of uniform noise, near the optimum, 308.
"""

from __future__ import annotations

from torch import Tensor

from genpolicy.contracts.task import Context
from genpolicy.rewards._jpeg import kilobytes


def jpeg_incompressibility(outputs: Tensor, context: Context) -> Tensor:
    """File size in decimal kB, float32 [B]; see `kilobytes`."""
    return kilobytes(outputs)

"""JPEG compressibility: smaller files score higher (DDPO, arXiv 2305.13301; kvablack/ddpo-pytorch).

reward = -(size of the picture's JPEG file at quality 95), in **decimal kilobytes** (bytes / 1000);
exactly minus jpeg_incompressibility. No weights, no prompt, no randomness: the first check that a
training loop works at all. Its optimum is a plain picture, at about -4.7 for 512 x 512.

Flow-GRPO (flow_grpo/rewards.py) scales the same size to -kB / 500, the unit of half a megabyte; the
weight in `reward: {jpeg_compressibility: 0.002}` gives its numbers. Its jpeg_incompressibility is
kB, as here.
"""

from __future__ import annotations

from torch import Tensor

from genpolicy.contracts.task import Context
from genpolicy.rewards._jpeg import kilobytes


def jpeg_compressibility(outputs: Tensor, context: Context) -> Tensor:
    """Minus the file size in decimal kB, float32 [B]; see `kilobytes`."""
    return -kilobytes(outputs)

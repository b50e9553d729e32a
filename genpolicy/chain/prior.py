"""The distribution in which a chain starts."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from genpolicy.chain.values import Condition, Gaussian, expand

LEAST_ROOM = 1e-6
"""Least mean square that `typical` leaves for a mean: a root has no gradient at 0."""


@dataclass(frozen=True)
class StandardNormal:
    """x at the first grid time ~ N(0, scale^2 I), with the chain's `Chain.scale`: from the noisiest
    time 1 on flows and VP, and sqrt(1 + sigma_max^2) on EDM.
    """

    def __call__(
        self, condition: Condition, shape: tuple[int, ...], scale: float, device: torch.device
    ) -> Gaussian:
        mean = torch.zeros((len(condition), *shape), device=device)
        return Gaussian(
            mean, torch.full((len(condition),) + (1,) * len(shape), scale, device=device)
        )


def typical(mean: Tensor, std: Tensor, band: float) -> tuple[Tensor, Tensor]:
    """Mean and std, [B,*E] each, with 1 - band <= mean over E of mean^2 + std^2 <= 1 + band: what
    they draw has about the norm of standard normal noise, which is all that a network has seen.

    Where they are too large the std, of at most sqrt(1 + band), stays and the mean shrinks into the
    room that it leaves; where they are too small both grow. A std is so never made smaller than it
    was, but for that bound. Inside the band nothing changes.
    """
    low, high = 1 - band, 1 + band
    std = std.clamp_max(math.sqrt(high))
    square, spread = mean.square().flatten(1).mean(1), std.square().flatten(1).mean(1)
    room = (high - spread).clamp_min(LEAST_ROOM)
    shrunk = (room / square.clamp_min(LEAST_ROOM)).sqrt()
    shrink = torch.where(square > room, shrunk, 1.0)
    total = spread + torch.minimum(square, room)
    grow = (low / total.clamp_max(low)).sqrt()
    return expand(shrink * grow, mean) * mean, expand(grow, std) * std

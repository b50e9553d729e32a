"""The distribution in which a chain starts."""

import math
from dataclasses import dataclass
from typing import Any, Self

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


def bounded(value: Tensor, low: float, high: float) -> Tensor:
    """value, brought between low < 0 and high > 0: value / sqrt(1 + (value / bound)^2), with the
    bound on its side of 0. 0 stays 0, the slope there is 1, and far out it falls with the cube of
    the distance alone, so that what went past a bound comes back.
    """
    bound = torch.where(value < 0, low, high).to(value)
    return value / (1 + (value / bound).square()).sqrt()


def typical(mean: Tensor, std: Tensor, band: float) -> tuple[Tensor, Tensor]:
    """Mean and std, [B,*E] each, with 1 - band <= mean over E of mean^2 + std^2 <= 1 + band: what
    they draw has about the norm of standard normal noise, which is all that a network has seen.

    std is of at most sqrt(1 + band). Where they are too large it stays and the mean shrinks into
    the room that it leaves; where they are too small both grow. A std is so never made smaller than
    it was. Inside the band nothing changes.
    """
    low, high = 1 - band, 1 + band
    square, spread = mean.square().flatten(1).mean(1), std.square().flatten(1).mean(1)
    room = (high - spread).clamp_min(LEAST_ROOM)
    shrunk = (room / square.clamp_min(LEAST_ROOM)).sqrt()
    shrink = torch.where(square > room, shrunk, 1.0)
    total = spread + torch.minimum(square, room)
    grow = (low / total.clamp_max(low)).sqrt()
    return expand(shrink * grow, mean) * mean, expand(grow, std) * std


@dataclass(frozen=True)
class Bounds:
    """The bounds of a start, whatever its parameters are."""

    low: float = -4.0  # of log sigma
    high: float = 0.3  # of log sigma; at most log sqrt(1 + band), where there is a band
    band: float | None = None  # of the mean over the dims of mu^2 + sigma^2 around 1; None is any
    # log sigma is cut at low and high, where its gradient ends and a sigma that went past them
    # stays; of files from before it was `bounded`
    cut: bool = False

    @classmethod
    def read(cls, settings: dict[str, Any]) -> Self:
        """The bounds that a start's file names."""
        return cls(**{"cut": True, **settings})

    def __call__(self, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
        """mu and sigma, [B,*E] each, of a start's own output."""
        high = self.high if self.band is None else min(self.high, 0.5 * math.log1p(self.band))
        log_std = (torch.clamp if self.cut else bounded)(log_std, self.low, high)
        std = log_std.exp()
        return (mean, std) if self.band is None else typical(mean, std, self.band)


USUAL = Bounds()
"""The bounds of a start where nobody names others."""

"""Uniform bins of the data's range, which scaling has made [-1, 1]: actions as tokens and back; and
the chain of one step that a policy of tokens has.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from genpolicy.chain.schedule import Schedule


@dataclass(frozen=True)
class Bins:
    """``count`` bins of every dim; bin 0 begins at -1. A place is a number of bins from there: its
    whole part is the token, the rest the point within the bin.
    """

    count: int

    def tokens(self, event: Tensor) -> Tensor:
        """The tokens of event [B,T,D], of what lies outside [-1, 1] the nearest: [B,T*D]."""
        places = ((event.flatten(1) + 1) * (self.count / 2)).floor()
        return places.clamp(0, self.count - 1).long()

    def event(self, places: Tensor) -> Tensor:
        """The values in [-1, 1] at places, of the same shape."""
        return places * (2 / self.count) - 1


def uniform(noise: Tensor) -> Tensor:
    """The distribution function of the standard normal at noise [B,T,D], fp32: [B,T*D] in [0,1]."""
    return (1 + torch.erf(noise.float().flatten(1) * 0.5**0.5)) / 2


def one_step(schedule: Schedule, steps: int, start: float | None) -> Tensor:
    """The grid [1, 0], the only one of a policy of tokens; `ValueError` for any other chain."""
    if steps != 1 or start not in (None, 1.0):
        raise ValueError(
            f"a policy of tokens says a chunk in one step from pure noise, and steps is {steps}"
            f"{'' if start is None else f', start {start:g}'}: set steps to 1 and no start"
        )
    return schedule.grid(1)

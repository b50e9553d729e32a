"""The initial noises that were drawn, each beside the distribution that drew it and what came of
it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from genpolicy.chain.values import Gaussian
from genpolicy.policy.parts._start import Start
from genpolicy.training.processes import Processes


@dataclass(frozen=True)
class DrawnStarts:
    """B draws. Everything about a draw stands in its row and moves with it.

    place [B]: its number in its iteration. features [B,F]: of what was seen. z [B,*E]: the noise,
    in units of the chain's scale. mean, std [B,*E]: of the distribution that drew it, in the same.
    returns [B]: the reward that it brought, or the return from its decision on.
    """

    place: Tensor
    features: Tensor
    z: Tensor
    mean: Tensor
    std: Tensor
    returns: Tensor

    def __len__(self) -> int:
        return len(self.place)

    def __getitem__(self, rows: slice | Tensor) -> Self:
        return type(self)(*(getattr(self, f.name)[rows] for f in fields(self)))

    @property
    def drawn_from(self) -> Gaussian:
        """The distributions that drew."""
        return Gaussian(self.mean, self.std)

    @classmethod
    def cat(cls, parts: "Sequence[DrawnStarts]") -> Self:
        """The rows of several, one after the other."""
        return cls(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)))

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        return type(self)(*(getattr(self, f.name).to(device) for f in fields(self)))

    def gathered(self, processes: Processes) -> Self:
        """The rows of all processes in the order of their places, on the CPU, on each of them."""
        mine = self.to(torch.device("cpu"))
        counts = processes.gather(torch.tensor([len(self)])).tolist()
        longest = max(counts)
        # all processes gather as many rows: those that are missing are copies of a row, left out
        padding = torch.arange(longest).clamp_max(max(len(self) - 1, 0))
        found = [
            torch.cat([rows[:n] for n, rows in zip(counts, every.split(longest), strict=True)])
            for every in (processes.gather(getattr(mine[padding], f.name)) for f in fields(self))
        ]
        everybody = type(self)(*found)
        return everybody[everybody.place.argsort()]


class History:
    """The draws of the last ``iterations`` iterations, the oldest first; it has a state_dict."""

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations
        self.kept: list[DrawnStarts] = []

    def near(self, start: Start, most: float, device: torch.device) -> list[DrawnStarts]:
        """The kept draws of distributions of which the present one is at most ``most`` nats away,
        KL(now || then): further away a ratio of densities says nothing. device: of ``start``.
        """
        found = []
        for draws in (kept.to(device) for kept in self.kept):
            now = start(draws.features, 1.0)
            near = now.kl(draws.drawn_from, reduce="sum") <= most
            found.append(draws[near])
        return found

    def add(self, draws: DrawnStarts) -> None:
        """Keep an iteration's draws, and forget those that are too old."""
        kept = [*self.kept, draws]
        self.kept = kept[max(len(kept) - self.iterations, 0) :]

    def state_dict(self) -> list[dict[str, Any]]:
        return [vars(draws) for draws in self.kept]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        self.kept = [DrawnStarts(**draws) for draws in state]

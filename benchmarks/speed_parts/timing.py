"""Times two sides that do the same work, in turn, in CPU time of one thread."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

STATE = "observation.state"
WARM_UP = 3
"""Untimed calls of both sides before the first timed one."""
COLUMNS = ("work", "ours, min", "other, min", "ratio of minima", "median ratio [95 %]", "n")


@dataclass(frozen=True)
class Comparison:
    """Seconds of the same work, ours [n] and the other's [n], call by call in turn."""

    work: str
    ours: list[float]
    other: list[float]

    def row(self) -> str:
        """One row of the table; times in milliseconds."""
        ratios = sorted(a / b for a, b in zip(self.ours, self.other, strict=True))
        n = len(ratios)
        reach = 0.98 * math.sqrt(n)
        low = ratios[max(math.floor(n / 2 - reach), 0)]
        high = ratios[min(math.ceil(n / 2 + reach), n) - 1]
        ours, other = min(self.ours), min(self.other)
        cells = [
            self.work,
            f"{1000 * ours:.2f} ms",
            f"{1000 * other:.2f} ms",
            f"{ours / other:.3f}",
            f"{median(ratios):.3f} [{low:.3f}, {high:.3f}]",
            str(n),
        ]
        return f"| {' | '.join(cells)} |"


def compare(
    work: str, ours: Callable[[], object], other: Callable[[], object], repeats: int, parts: int = 1
) -> Comparison:
    """``repeats`` timed calls of each, in turn; a call does the work ``parts`` times."""
    for _ in range(WARM_UP):
        ours()
        other()
    mine: list[float] = []
    theirs: list[float] = []
    for repeat in range(repeats):
        pair = [(ours, mine), (other, theirs)]
        for call, seconds in pair if repeat % 2 == 0 else reversed(pair):
            began = time.process_time()
            call()
            seconds.append((time.process_time() - began) / parts)
    return Comparison(work, mine, theirs)


def require_close(what: str, ours: Tensor, other: Tensor, tolerance: float) -> None:
    """Both sides compute the same, or their times may not be compared."""
    apart = float((ours - other).abs().max())
    if not apart <= tolerance:
        raise SystemExit(f"{what}: the two sides are {apart:.1e} apart, more than {tolerance:.0e}")


def weights(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class Statistics:
    """The part of a data set that a fresh model asks for: shapes, and values of unit spread."""

    shapes: dict[str, tuple[int, ...]]

    @property
    def stats(self) -> dict[str, dict[str, Tensor]]:
        values = {"min": -1.0, "q01": -1.0, "mean": 0.0, "std": 1.0, "q99": 1.0, "max": 1.0}
        return {
            name: {statistic: torch.full(shape, value) for statistic, value in values.items()}
            for name, shape in self.shapes.items()
        }

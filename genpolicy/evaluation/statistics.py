"""Statistics that evaluations share: intervals of means, paired differences and latency."""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor


def interval(value: Tensor, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of the mean of [S] values: Wilson's for rates (every value 0 or 1), Student's
    otherwise, which is NaN for a single value. z: standard deviations of the normal distribution
    on either side, of Wilson's.
    """
    n, mean = len(value), float(value.mean())
    if bool(((value == 0) | (value == 1)).all()):
        centre = (mean + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * math.sqrt(mean * (1 - mean) / n + z**2 / (4 * n**2))
    else:
        centre, half = mean, _students(value)
    return centre - half, centre + half


def lower_bound(value: Tensor, least: float, worst: float) -> float:
    """A lower bound of the mean that [S] values are drawn from: the lower end of its 95 % interval.

    Of fewer than two values nothing is claimed, which is ``least``: 0 for rates, -inf for returns.
    Values that are all alike say nothing of their spread: they are read as a rate, Wilson's, on the
    scale from ``worst`` to themselves: 0 for rates, the lowest that was ever seen for returns.
    """
    if len(value) < 2:
        return least
    top = float(value.max())
    if float(value.min()) < top:
        return interval(value)[0]
    share, _ = interval(torch.ones_like(value))
    return top - (1 - share) * (top - min(worst, top))


def _students(value: Tensor) -> float:
    """Half of the width of Student's 95 % interval of a mean, NaN for a single value."""
    from scipy.stats import t

    n = len(value)
    return float(t.ppf(0.975, n - 1)) * float(value.std()) / math.sqrt(n) if n > 1 else math.nan


def paired(before: Tensor, after: Tensor, units: int) -> tuple[float, float, float]:
    """(mean, low, high): after - before of the same [S] samples, sample i of unit i mod ``units``,
    with its 95 % interval (NaN for a single unit).

    Samples of one unit (a prompt, an episode's start, a seed) are alike, so that only units count:
    the mean over units of the unit's mean difference, Student's t.
    """
    difference = after - before
    means = torch.stack([difference[u::units].mean() for u in range(min(units, len(difference)))])
    centre, half = float(means.mean()), _students(means)
    return centre, centre - half, centre + half


def latency(
    call: Callable[[int], object], calls: int = 20, warm_up: int = 1, seconds: float = 60.0
) -> dict[str, float]:
    """Milliseconds of ``call(number)``: p50, p95 and p99 over ``calls`` calls.

    ``warm_up`` calls go before; after ``seconds`` no more are made (but 3 at least), and ``calls``
    says how many there were.
    """
    times: list[float] = []
    started = time.perf_counter()
    for number in range(warm_up + calls):
        begun = time.perf_counter()
        call(number)
        times.append(1000 * (time.perf_counter() - begun))
        if number >= warm_up + 2 and time.perf_counter() - started > seconds:
            break
    measured = torch.tensor(times[warm_up:], dtype=torch.float64)
    found = measured.quantile(torch.tensor([0.5, 0.95, 0.99], dtype=torch.float64))
    return {**dict(zip(("p50", "p95", "p99"), found.tolist(), strict=True)), "calls": len(measured)}

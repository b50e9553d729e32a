"""Statistics that evaluations share: intervals of means, paired differences and latency."""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor


def interval(value: Tensor, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of the mean of [S] values: Wilson's for rates (every value 0 or 1), the normal
    one otherwise. z: standard deviations of the normal distribution on either side.
    """
    n, mean = len(value), float(value.mean())
    if bool(((value == 0) | (value == 1)).all()):
        centre = (mean + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * math.sqrt(mean * (1 - mean) / n + z**2 / (4 * n**2))
    else:
        centre, half = mean, z * float(value.std(correction=0)) / math.sqrt(n)
    return centre - half, centre + half


def paired(before: Tensor, after: Tensor, units: int) -> tuple[float, float, float]:
    """(mean, low, high): after - before of the same [S] samples, sample i of unit i mod ``units``,
    with its 95 % interval (NaN for a single unit).

    Samples of one unit (a prompt, an episode's start, a seed) are alike, so that only units count:
    the mean over units of the unit's mean difference, Student's t.
    """
    from scipy.stats import t

    difference = after - before
    means = torch.stack([difference[u::units].mean() for u in range(min(units, len(difference)))])
    centre = float(means.mean())
    if len(means) < 2:
        return centre, math.nan, math.nan
    half = float(t.ppf(0.975, len(means) - 1)) * float(means.std()) / math.sqrt(len(means))
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

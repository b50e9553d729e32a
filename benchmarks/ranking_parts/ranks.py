"""The quality of a ranking of pairs of chunks."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from scipy.stats import rankdata
from torch import Tensor

from genpolicy.evaluation.statistics import paired

ROUNDING = 1e-9
"""Truths this close are equal."""


def ranking(values: Tensor, found: Tensor) -> dict[str, Any]:
    """Measures how values [P,2] rank pairs whose rollouts gave ``found`` [P,2,R].

    right: the share of the pairs whose truths differ in which the higher value has the higher
    truth, with its 95 % interval (Wilson's) and the number of those pairs; equal values count one
    half. right_surely: the same of the pairs whose truths differ by more than two standard errors
    (over the rollouts, paired). picked: the truth of the chunk with the higher value minus the
    other's over all pairs, 0 for equal values: mean, low, high (Student's). spearman: of values and
    truths over all chunks. within: the correlation of their deviations from the pair's mean.
    """
    truth, difference = found.mean(2), found[:, 0] - found[:, 1]
    gap, lean = truth[:, 0] - truth[:, 1], values[:, 0] - values[:, 1]
    right = torch.where(lean == 0, 0.5, ((lean * gap) > 0).double())
    differ, error = gap.abs() > ROUNDING, difference.std(1) / math.sqrt(found.shape[2])
    gain = lean.sign() * gap
    ranks = [torch.from_numpy(rankdata(x.flatten().numpy())) for x in (values, truth)]
    return {
        "right": _share(right[differ]),
        "right_surely": _share(right[differ & (gap.abs() > 2 * error)]),
        "picked": paired(torch.zeros_like(gain), gain, len(gain)),
        "spearman": _correlation(*(rank - rank.mean() for rank in ranks)),
        "within": _correlation(lean, gap),
    }


def _share(right: Tensor) -> dict[str, Any]:
    """The mean of ``right`` [n], each 0, one half or 1, with its interval."""
    if not len(right):
        return {"share": math.nan, "low": math.nan, "high": math.nan, "n": 0}
    n, share, z = len(right), float(right.mean()), 1.96
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return {"share": share, "low": max(centre - half, 0.0), "high": min(centre + half, 1.0), "n": n}


def _correlation(x: Tensor, y: Tensor) -> float:
    """The correlation of deviations; nan where one of them has none."""
    size = float((x @ x * (y @ y)).sqrt())
    return float(x @ y) / size if size else math.nan


def compared(values: Mapping[str, Tensor], found: Tensor) -> dict[str, Any]:
    """The `ranking` of every critic's values and of half of the rollouts, and the truths' own
    numbers. ceiling: the better chunk's truth minus the other's; twice what the better one has
    beyond the pair's mean.
    """
    half, truth = found.shape[2] // 2, found.mean(2)
    return {
        "mean": float(truth.mean()),
        "ceiling": float((truth[:, 0] - truth[:, 1]).abs().mean()),
        "by": {
            **{name: ranking(value, found) for name, value in values.items()},
            "half of the rollouts": ranking(found[..., :half].mean(2), found[..., half:]),
        },
    }


def table(told: dict[str, Any]) -> str:
    """A line per truth and critic."""
    lines = [
        f"{told['run']}: {told['pairs']} pairs, {told['rollouts']} rollouts that go on with the"
        f" {told['then']} policy, gamma {told['gamma']}",
        "",
        "| truth | ranked by | right, of the pairs that differ | of those that surely do |"
        " pick minus other | Spearman over all chunks | correlation in a state |",
        "|---|---|---|---|---|---|---|",
    ]
    for truth in ("success", "return"):
        part = told[truth]
        head = f"{truth}, mean {part['mean']:.3f}, better minus other {part['ceiling']:.4f}"
        for name, one in part["by"].items():
            shares = [
                f"{s['share']:.3f} [{s['low']:.3f}, {s['high']:.3f}] ({s['n']})"
                for s in (one["right"], one["right_surely"])
            ]
            mean, low, high = one["picked"]
            lines.append(
                f"| {head} | {name} | {shares[0]} | {shares[1]}"
                f" | {mean:+.4f} [{low:+.4f}, {high:+.4f}]"
                f" | {one['spearman']:.3f} | {one['within']:.3f} |"
            )
    return "\n".join(lines)

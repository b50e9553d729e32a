"""Acceptance of a candidate: paired comparison, and how much may be risked."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """A candidate against the policy in force, on the same starts: mean of new - old, its standard
    error, mean of old.
    """

    difference: float
    error: float
    old: float

    def accepts(self, delta: float, z: float) -> bool:
        """difference - z * error >= delta * |old|: by this much better, z standard errors aside. A
        nan is refused.

        delta: .05 in RL-100, 0 in Uni-O4 (arXiv 2311.03351); with delta 0 and z 0 a policy is
        accepted against itself.
        """
        return self.difference - z * self.error >= delta * abs(self.old)


def compare(new: Tensor, old: Tensor) -> Comparison:
    """Pair by pair: ``new`` and ``old`` [S] are the two policies' scores from the same starts with
    the same noise.
    """
    if new.shape != old.shape or new.dim() != 1 or len(new) < 2:
        raise ValueError(
            f"scores have shapes {list(new.shape)} and {list(old.shape)}; valid is one per start,"
            " 2 starts or more"
        )
    paired = new.double() - old.double()
    error = float(paired.std()) / math.sqrt(len(paired))
    return Comparison(float(paired.mean()), error, float(old.double().mean()))


def safe_share(floor: float, baseline: float, lower: float) -> float:
    """The largest share p of episodes that a new policy may play while the expected outcome of all,
    p lower + (1 - p) baseline, stays at least baseline - (1 - floor) |baseline|; the baseline plays
    the others.

    That much may be lost: of a baseline above 0 the share ``floor`` is kept, and one below 0 may
    lose as much as one above it. With the loss (1 - floor) |baseline| = p (baseline - lower),

        p = (1 - floor) |baseline| / (baseline - lower)

    floor: in [0, 1]. lower: a lower bound of the new policy's outcome, -inf where there is none. 1
    where the new policy is good enough by itself. Both are of one quantity, success or return.
    """
    allowed = (1 - floor) * abs(baseline)
    shortfall = baseline - lower
    return 1.0 if shortfall <= allowed else allowed / shortfall


def rank_correlation(a: Tensor | Sequence[float], b: Tensor | Sequence[float]) -> float:
    """Spearman's rho: the correlation of ranks, equal values sharing their mean rank. A side
    without an order (constant, fewer than two values, a nan) gives nan.
    """
    x, y = (torch.as_tensor(values, dtype=torch.float64).cpu().flatten() for values in (a, b))
    if len(x) != len(y):
        raise ValueError(
            f"there are {len(x)} and {len(y)} values to correlate; valid are equally many"
        )
    if bool(x.isnan().any() | y.isnan().any()):
        return math.nan
    p, q = (_centred_rank(values) for values in (x, y))
    spread = float((p @ p) * (q @ q))
    return float(p @ q) / math.sqrt(spread) if spread > 0 else math.nan


def _centred_rank(values: Tensor) -> Tensor:
    """(How many are below) - (how many are above), twice the rank less its mean: [n] -> [n]."""
    return torch.sign(values[:, None] - values[None, :]).nan_to_num().sum(1)

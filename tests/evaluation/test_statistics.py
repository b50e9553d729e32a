"""Intervals and paired differences against scipy's, and what counts as a unit."""

import math
import time

import pytest
import torch
from scipy import stats

from genpolicy.evaluation.statistics import interval, latency, lower_bound, paired


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (61, 200)])
def test_the_interval_of_a_rate_is_wilsons(successes: int, trials: int):
    value = (torch.arange(trials) < successes).double()
    theirs = stats.binomtest(successes, trials).proportion_ci(0.95, "wilson")
    assert interval(value) == pytest.approx((theirs.low, theirs.high), abs=1e-4)  # z is 1.96 here
    normal = interval(value + 1e-9)  # the negative control: no longer all 0 or 1
    assert normal != pytest.approx((theirs.low, theirs.high), abs=1e-3)


@pytest.mark.parametrize("trials", [2, 5, 30])
def test_the_interval_of_a_mean_is_students(trials: int):
    value = torch.randn(trials, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theirs = stats.ttest_1samp(value.numpy(), 0.0).confidence_interval(0.95)
    assert interval(value) == pytest.approx((theirs.low, theirs.high))
    low, high = interval(torch.tensor([7.0]))
    assert math.isnan(low)
    assert math.isnan(high)


def test_a_lower_bound_claims_nothing_of_one_value_and_little_of_values_that_are_alike():
    assert lower_bound(torch.tensor([1.0]), 0.0, 0.0) == 0
    assert lower_bound(torch.tensor([7.0]), -math.inf, 0.0) == -math.inf
    rate = torch.tensor([1.0, 1.0, 0.0, 1.0])
    assert lower_bound(rate, 0.0, 0.0) == interval(rate)[0]
    for alike in (2, 20):
        share, _ = interval(torch.ones(alike))
        found = lower_bound(torch.full((alike,), 10.0), -math.inf, -10.0)
        assert found == pytest.approx(-10 + 20 * share), "a rate between -10 and 10"
    assert lower_bound(torch.full((4,), 5.0), -math.inf, 5.0) == 5.0, "nothing was ever worse"


@pytest.mark.parametrize("count", [2, 5, 48])
@pytest.mark.parametrize("kind", ["rates", "returns"])
def test_the_mean_is_hardly_ever_below_its_lower_bound(kind: str, count: int):
    generator = torch.Generator().manual_seed(0)
    if kind == "rates":
        drawn = torch.rand(2000, count, dtype=torch.float64, generator=generator)
        drawn, mean, least = (drawn < 0.6).double(), 0.6, 0.0
    else:
        drawn = torch.randn(2000, count, dtype=torch.float64, generator=generator) - 10
        mean, least = -10.0, -math.inf
    found = [lower_bound(row, least, max(least, -20.0)) for row in drawn]
    assert sum(bound > mean for bound in found) / len(found) < 0.05
    plain = (drawn.mean(1) - 1.96 * drawn.std(1, correction=0) / math.sqrt(count)) > mean
    assert count > 5 or float(plain.double().mean()) > 0.05, "control: the normal one of so few"


def test_paired_differences_are_students():
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 12, dtype=torch.float64, generator=generator).cumsum(0)
    mean, low, high = paired(before, after, 12)
    theirs = stats.ttest_rel(after.numpy(), before.numpy()).confidence_interval(0.95)
    assert mean == pytest.approx(float((after - before).mean()))
    assert (low, high) == pytest.approx((theirs.low, theirs.high))
    alone = stats.ttest_ind(after.numpy(), before.numpy()).confidence_interval(0.95)
    assert (low, high) != pytest.approx((alone.low, alone.high)), "the negative control"


def test_paired_counts_units_not_samples():
    """Six identical samples of each of four prompts know no more than four numbers."""
    differences = torch.tensor([0.0, 1.0, 0.0, 1.0])
    before, after = torch.zeros(24), differences.repeat(6)
    mean, low, high = paired(before, after, 4)
    half = 3.18245 * differences.std().item() / 2
    assert (mean, low, high) == pytest.approx((0.5, 0.5 - half, 0.5 + half), rel=1e-4)
    _, narrow, _ = paired(before, after, 24)  # the negative control
    assert narrow > low + 0.5


def test_a_single_unit_has_no_interval():
    mean, low, high = paired(torch.zeros(3), torch.ones(3), 1)
    assert mean == 1
    assert math.isnan(low)
    assert math.isnan(high)


def test_latency_leaves_out_the_warm_up():
    found = latency(lambda number: time.sleep(0.2 if number < 2 else 0.001), calls=5, warm_up=2)
    assert found["calls"] == 5
    assert 1 <= found["p50"] <= found["p95"] <= found["p99"] < 200

"""The local step of PA-RL (arXiv 2412.06685): gradient steps on Q from a sample, the best iterate.

Q = -(a - 1)^2 from a = 0 has a closed form: after K steps a = 1 - (1 - 2 rate)^K.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from genpolicy.policy.parts.refiner import Refiner

NOTHING = torch.zeros(1, 1)
"""Features of one row."""


def near_one(features: Tensor, event: Tensor) -> Tensor:
    """Q = -(a - 1)^2, summed over an event's numbers."""
    return -(event - 1).square().flatten(1).sum(1)


def policy(judge: Any = near_one) -> Any:
    """All that a refiner asks of a policy: its critic and which of an event's numbers count."""
    return SimpleNamespace(judge=judge, model=SimpleNamespace(scored=lambda event: event))


def climbed(refiner: Refiner, start: float, judge: Any = near_one) -> tuple[float, int]:
    event, number = refiner.climbed(policy(judge), NOTHING, torch.full((1, 1, 1), start))
    return float(event), int(number)


@pytest.mark.parametrize(("steps", "known"), [(1, 0.2), (10, 0.8926258), (50, 0.9999857)])
def test_the_iterates_are_those_of_gradient_ascent(steps: int, known: float) -> None:
    found, number = climbed(Refiner(steps, 0.1), 0.0)
    assert found == pytest.approx(1 - 0.8**steps, abs=1e-6)
    assert found == pytest.approx(known, abs=1e-6)
    assert number == steps
    assert found != pytest.approx(1 - 0.8 ** (steps + 1), abs=1e-6), "control: one step too many"


def test_every_step_is_clipped() -> None:
    """...and the sample itself is not: what is deployed without a step is the sample."""
    assert climbed(Refiner(10, 0.1, high=0.5), 0.0)[0] == 0.5
    assert climbed(Refiner(10, 0.1, high=2.0), 0.0)[0] > 0.8, "control"
    assert climbed(Refiner(10, -0.1, low=-0.5), 0.0)[0] == 0.0, "Q falls on the way: the sample"
    assert climbed(Refiner(0, 0.1, high=0.5), 0.7) == (pytest.approx(0.7), 0)


def test_where_steps_diverge_the_sample_stays() -> None:
    """Rate 1.1: a - 1 is multiplied by -1.2 in every step, and each iterate is worse."""
    wide = {"low": -100.0, "high": 100.0}
    assert climbed(Refiner(10, 1.1, **wide), 0.0) == (0.0, 0)
    last = 1 - (1 - 2.2) ** 10  # what the last iterate would be, in the place of the best
    assert abs(last) > 5, "control"
    # at rate .95 the iterates jump from side to side and come nearer: the last one is taken
    assert climbed(Refiner(10, 0.95, **wide), 0.0)[1] == 10


def test_the_best_iterate_is_neither_the_first_nor_the_last() -> None:
    """A narrow peak is passed by long steps: of all iterates the one next to it is taken."""

    def peaked(features: Tensor, event: Tensor) -> Tensor:
        return event.flatten(1).sum(1) - 10 * (event.flatten(1).sum(1) - 0.4).clamp_min(0)

    # from 0 by steps of .25: .25, then .5 (past the peak), then a step of -9 * .25, clipped
    found, number = climbed(Refiner(3, 0.25), 0.0, peaked)
    assert (found, number) == (0.25, 1)


def test_rows_climb_alone() -> None:
    """A row's iterate is the same alone and in a batch, though one gradient is taken of the sum."""
    start = torch.linspace(-0.9, 0.9, 7).view(7, 1, 1)
    refiner = Refiner(5, 0.3)
    together, numbers = refiner.climbed(policy(), torch.zeros(7, 1), start)
    for row in range(7):
        alone, number = refiner.climbed(policy(), NOTHING, start[row : row + 1])
        assert torch.equal(together[row : row + 1], alone)
        assert numbers[row] == number
    assert bool((near_one(NOTHING, together) >= near_one(NOTHING, start)).all())


def test_weights_of_the_critic_get_no_gradient() -> None:
    weight = torch.nn.Parameter(torch.tensor(2.0))

    def judge(features: Tensor, event: Tensor) -> Tensor:
        return weight * near_one(features, event)

    with torch.no_grad():
        found, _ = Refiner(1, 0.1).climbed(policy(judge), NOTHING, torch.zeros(1, 1, 1))
    assert float(found) == pytest.approx(0.4), "also where no gradients are taken around it"
    assert weight.grad is None
    assert not found.requires_grad

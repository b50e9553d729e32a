"""The choice among a decision's samples: which are moved before they are valued, and which one is
carried out.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from genpolicy.chain import Noise
from genpolicy.config.schema import ChainConfig
from genpolicy.models.mlp import MLP
from genpolicy.policy.parts.refiner import Refiner
from genpolicy.policy.policy import ChainPolicy
from genpolicy.policy.sampler import make_policy
from tests.toy_control import Recorded

ROWS, SAMPLES = 5, 6
WAVES = 4.0
"""How quickly the critic rises and falls: then another sample wins where it has been moved."""


def wavy(features: Tensor, event: Tensor) -> Tensor:
    """A critic with many maxima, another one for every state."""
    phase = features[:, :1]
    return (WAVES * event.flatten(1) + phase).sin().sum(1) - event.flatten(1).square().sum(1)


@pytest.fixture(scope="module")
def policy() -> ChainPolicy:
    torch.manual_seed(0)
    model = MLP(hidden=16, blocks=1, chunk=2)
    model.initialise(Recorded(episodes=8))
    sampler = ChainConfig(steps=4, kernel={"name": "ddim", "eta": 1.0})
    return replace(make_policy(model, sampler), judge=wavy)


def given() -> tuple[Tensor, Tensor]:
    """Features [B,4] and events [B N,2,2]."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(ROWS, 4, generator=generator)
    return features, 0.6 * torch.randn(ROWS * SAMPLES, 2, 2, generator=generator)


def by_hand(
    policy: ChainPolicy, features: Tensor, events: Tensor, moves: int, best: bool = True
) -> tuple[Tensor, list[int]]:
    """One sample after the other: those whose rank is below ``moves``, the best (or the worst)
    first, are refined; the one with the highest value then.
    """
    refiner = policy.refiner
    found, places = [], []
    samples = len(events) // len(features)
    for row, seen in enumerate(features.split(1)):
        own = list(events[row * samples : (row + 1) * samples].split(1))
        order = sorted(range(samples), key=lambda n: float(wavy(seen, own[n])), reverse=best)
        for n in order[:moves]:
            own[n] = refiner(policy, seen, own[n])
        winner = max(range(samples), key=lambda n: float(wavy(seen, own[n])))
        found.append(own[winner])
        places.append(row * samples + winner)
    return torch.cat(found), places


@pytest.mark.parametrize("moves", [0, 1, 2, 3, SAMPLES, None])
def test_it_is_the_argmax_after_the_highest_valued_were_moved(policy, moves) -> None:
    features, events = given()
    acting = policy if moves == 0 else replace(policy, refiner=Refiner(3, 0.05), refined=moves)
    x0, best = acting.chosen(features, events)
    expected, places = by_hand(acting, features, events, SAMPLES if moves is None else moves)
    assert best.tolist() == places
    assert torch.allclose(x0, expected, atol=1e-6)
    assert torch.equal(events, given()[1]), "the samples themselves stay as they were"


def test_control_other_numbers_of_moves_choose_otherwise(policy) -> None:
    features, events = given()
    acting = replace(policy, refiner=Refiner(3, 0.05), refined=2)
    x0, best = acting.chosen(features, events)
    for wrong in (by_hand(acting, features, events, SAMPLES), by_hand(policy, features, events, 0)):
        assert not torch.allclose(x0, wrong[0], atol=1e-3)
    worst, _ = by_hand(acting, features, events, 2, best=False)
    assert not torch.allclose(x0, worst, atol=1e-3)
    assert len(best) == ROWS


def test_of_the_moved_only_as_many_are_asked_of_the_refiner(policy) -> None:
    """...each row's own highest, whatever those of the other rows are worth."""
    features, events = given()
    asked = []

    def counted(acting: ChainPolicy, seen: Tensor, event: Tensor) -> Tensor:
        asked.append((seen, event))
        return event

    replace(policy, refiner=counted, refined=2).chosen(features, events)
    ((seen, event),) = asked
    assert torch.equal(seen, features.repeat_interleave(2, 0))
    values = wavy(features.repeat_interleave(SAMPLES, 0), events).view(ROWS, SAMPLES)
    top = values.topk(2, 1).indices + torch.arange(ROWS)[:, None] * SAMPLES
    assert torch.equal(event, events[top.flatten()])


@pytest.mark.parametrize("refined", [None, 2])
def test_what_is_carried_out_is_what_is_chosen_of_the_samples(policy, refined) -> None:
    acting = replace(policy, best_of=SAMPLES, refiner=Refiner(3, 0.05), refined=refined)
    condition = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(1))
    noise = Noise.rows(0, 0, torch.arange(ROWS), 1)
    drawn = acting.sample(condition, noise)
    plain = replace(acting, best_of=1, refiner=None)
    every = condition.repeat_interleave(SAMPLES, 0)
    several = plain.sample(every, noise.fan(SAMPLES))
    features = acting.model.features(condition)
    x0, best = acting.chosen(features, several.x0)
    assert torch.equal(drawn.x0, x0)
    assert drawn.start is not None
    assert several.start is not None
    assert torch.equal(drawn.start, several.start[best]), "the noise of the chosen one"
    left = replace(acting, refiner=None).sample(condition, noise)
    assert not torch.allclose(drawn.x0, left.x0, atol=1e-3), "control: nothing moved"


def test_a_single_sample_is_refined_too(policy) -> None:
    acting = replace(policy, refiner=Refiner(3, 0.05), refined=1)
    condition = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(1))
    noise = Noise.rows(0, 0, torch.arange(ROWS), 1)
    plain = replace(acting, refiner=None).sample(condition, noise).x0
    expected = Refiner(3, 0.05)(acting, acting.model.features(condition), plain)
    assert torch.equal(acting.sample(condition, noise).x0, expected)
    assert not torch.equal(expected, plain)

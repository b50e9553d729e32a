"""The planner solves PushT from any start; without its search it does not."""

import pytest
import torch

from genpolicy.contracts.task import Demonstration
from genpolicy.tasks import _pusht_planner
from genpolicy.tasks._demonstrations import record
from genpolicy.tasks._pusht import Pushing


def episode(seed: int, noise: float = 0.0) -> Demonstration:
    pushing = Pushing("sparse", False)
    return record(pushing, _pusht_planner.Planner(pushing.world, seed), seed, 300, noise)


@pytest.mark.parametrize(("seed", "noise"), [(0, 0.0), (1, 0.0), (2, 5.0)])
def test_it_succeeds(seed: int, noise: float):
    done = episode(seed, noise)
    assert done.success
    assert done.rewards.sum() == done.rewards[-1] == 1
    assert (done.actions >= 0).all()
    assert (done.actions <= 512).all()


def test_without_its_search_it_fails(monkeypatch):
    monkeypatch.setattr(_pusht_planner, "SAMPLES", 1)
    monkeypatch.setattr(_pusht_planner, "ROUNDS", 0)
    assert not episode(0).success


def test_the_same_seed_is_the_same_episode():
    first, again = episode(3, 5.0), episode(3, 5.0)
    assert torch.equal(first.actions, again.actions)
    assert not torch.equal(episode(3, 0.0).actions[:20], first.actions[:20])


def test_the_way_to_a_push_leaves_the_t_alone():
    pushing = Pushing("sparse", False)
    pushing.reset(seed=3)
    planner, block = _pusht_planner.Planner(pushing.world, 3), pushing.world.block
    before, actions = (*block.position, block.angle), planner._plan()
    waiting = [k for k in range(1, len(actions)) if (actions[k] == actions[k - 1]).all()]
    arrived = max(
        waiting[: _pusht_planner.SETTLE - 2]
    )  # the last steps of the way; the others are the push's
    shifts = []
    for action in actions:
        pushing.step(action)
        shifts.append(
            max(abs(a - b) for a, b in zip((*block.position, block.angle), before, strict=True))
        )
    assert max(shifts[: arrived + 1]) < 0.1 < 5 < shifts[-1]

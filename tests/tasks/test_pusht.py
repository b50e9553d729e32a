"""PushT: what it sees, what it rewards, when it is done."""

import numpy as np
import pytest
import torch

from genpolicy.config import errors, leaves
from genpolicy.config.origin import PERSON
from genpolicy.tasks._pusht import Pushing
from genpolicy.tasks.pusht import PushT

STATE, WORLD, TOP = "observation.state", "observation.environment_state", "observation.images.top"


def stepped(reward, x):
    """One step with the T at x instead of the target's 256, the disc far away."""
    simulation = Pushing(reward, pixels=False)
    simulation.reset(seed=0)
    simulation.world.agent.position = 50, 50
    simulation.world.block.angle = np.pi / 4
    simulation.world.block.position = x, 256
    return simulation.step(np.array([50, 50], np.float32))


def test_success_is_coverage():
    _, dense, ended, _, info = stepped("dense", 256)
    assert (dense, ended, info["success"]) == (1, True, True)
    _, dense, ended, _, info = stepped("dense", 300)
    assert 0 < dense < 1
    assert (ended, info["success"]) == (False, False)
    assert stepped("sparse", 256)[1] == 1
    assert stepped("sparse", 300)[1] == 0


def test_coverage_is_gym_pushts():
    simulation = Pushing("dense", pixels=False)
    for seed in range(20):
        simulation.reset(seed=seed)
        simulation.world.block.position = 256 + seed, 256
        theirs = type(simulation.world)._get_coverage(simulation.world)
        assert 0 < theirs < 1
        assert simulation._coverage() == pytest.approx(theirs, rel=1e-12)


def test_a_demonstration_is_what_happened():
    task = PushT()
    shown, again = task.demonstrate(4, 2.0), task.demonstrate(4, 2.0)
    assert torch.equal(shown.actions, again.actions)
    assert torch.equal(shown.rewards, again.rewards)
    assert shown.success
    assert shown.rewards[-1] == 1
    environments = task.environments(1, 1)
    environments.reset([0], [4])
    step = environments.step([0], shown.actions[None])
    assert (step.executed.item(), step.terminated.item()) == (len(shown.actions), True)
    assert torch.equal(step.rewards[0], shown.rewards)
    environments.close()


def test_what_is_seen():
    task = leaves.make("tasks", {"name": "pusht"}, PERSON)
    assert (task.action_dim, task.limit, task.fps) == (2, 300, 10)
    environments = task.environments(2, 2)
    slots = environments._shares[0]
    assert task.action_low == slots._low.tolist()
    assert task.action_high == slots._high.tolist()
    context = environments.reset([0, 1], [0, 1])
    assert {
        name: tuple(value.shape[2:]) for name, value in context.observation.items()
    } == task.shapes
    assert not torch.equal(*context.observation[WORLD])
    # The disc follows the action, in pixels of the 512 x 512 plane.
    step = environments.step([0, 1], torch.tensor([100.0, 400.0]).expand(2, 20, 2))
    assert torch.allclose(
        step.context.observation[STATE][:, -1], torch.tensor([100.0, 400.0]), atol=5
    )
    again = environments.reset([1], [0])
    for name in task.shapes:
        assert torch.equal(again.observation[name][0], context.observation[name][0])
    environments.close()


def test_pixels():
    task = PushT(pixels=True)
    environments = task.environments(1, 1)
    first = environments.reset([0], [0]).observation[TOP]
    assert first.shape == (1, 1, *task.shapes[TOP])
    step = environments.step([0], torch.full((1, 5, 2), 300.0))
    assert not torch.equal(step.context.observation[TOP], first)
    assert torch.equal(environments.reset([0], [0]).observation[TOP], first)
    environments.close()


def test_bad_settings_get_a_sentence():
    with pytest.raises(errors.ConfigError, match="reward is 'densed'; did you mean dense"):
        PushT(reward="densed")

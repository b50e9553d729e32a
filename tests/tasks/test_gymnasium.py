"""Gymnasium's environments by LeRobot's names; success only where the environment says so."""

import pytest
import torch

from genpolicy.config import errors, leaves
from genpolicy.config.origin import PERSON

STATE, WORLD, TOP = "observation.state", "observation.environment_state", "observation.images.top"
KNOWN = [
    ("Hopper-v5", {STATE: (11,)}, 3, 1000, 125, False),
    ("HalfCheetah-v5", {STATE: (17,)}, 6, 1000, 20, False),
    ("PointMaze_UMaze-v3", {WORLD: (8,)}, 2, 300, 50, True),
    ("AdroitHandDoor-v1", {STATE: (39,)}, 28, 200, 100, True),
    ("gym_pusht/PushT-v0", {STATE: (5,)}, 2, 300, 10, True),
]


def make(env, **settings):
    return leaves.make("tasks", {"name": "gymnasium", "env": env, **settings}, PERSON)


def play(environments, names, slot, seed, scale):
    """Two decisions of actions that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    contexts = [environments.reset([slot], [seed])]
    for _ in range(2):
        actions = scale * (
            torch.rand(1, 3, environments_dim(environments), generator=generator) * 2 - 1
        )
        contexts.append(environments.step([slot], actions).context)
    return torch.cat(
        [context.observation[name].flatten() for context in contexts for name in names]
    )


def environments_dim(environments):
    return environments._shares[0]._low.size


@pytest.mark.parametrize(("env", "shapes", "action_dim", "limit", "fps", "has_success"), KNOWN)
def test_known_environments(env, shapes, action_dim, limit, fps, has_success):
    task = make(env)
    assert (task.shapes, task.action_dim, task.limit) == (shapes, action_dim, limit)
    assert (task.fps, task.has_success) == (fps, has_success)
    environments = task.environments(2, 2)
    slots = environments._shares[0]
    assert task.action_low == slots._low.tolist()
    assert task.action_high == slots._high.tolist()
    scale = 512 if "PushT" in env else 1
    alone = play(environments, shapes, 0, 3, scale)
    play(environments, shapes, 1, 4, scale)
    assert torch.equal(play(environments, shapes, 1, 3, scale), alone)
    assert not torch.equal(play(environments, shapes, 1, 4, scale), alone)
    step = environments.step([0], torch.zeros(1, 2, action_dim))
    assert not step.success.item()
    environments.close()


def test_the_limit_is_ours():
    task = make("Hopper-v5", limit=4, kwargs={"terminate_when_unhealthy": False})
    environments = task.environments(1, 1)
    environments.reset([0], [0])
    step = environments.step([0], torch.zeros(1, 6, 3))
    assert (step.executed.item(), step.truncated.item(), step.terminated.item()) == (4, True, False)
    environments.close()


def test_pixels():
    task = make("gym_pusht/PushT-v0", kwargs={"obs_type": "pixels_agent_pos"})
    assert task.shapes == {STATE: (2,), TOP: (3, 96, 96)}
    environments = task.environments(1, 2)
    picture = environments.reset([0], [0]).observation[TOP]
    assert picture.shape == (1, 2, 3, 96, 96)
    assert 0 <= picture.min() < picture.max() <= 1
    assert environments.render(0).shape == (680, 680, 3)
    environments.close()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"env": "Hoper-v5"}, "did you mean Hopper-v5"),
        ({"env": "gym_nothing/PushT-v0"}, "gym_nothing is not installed"),
        ({"env": "CartPole-v1"}, "they must be a Box of one dimension"),
        ({"env": "Hopper-v5", "kwargs": {"wings": 2}}, "unexpected keyword argument 'wings'"),
        ({"env": "Hopper-v5", "limit": 0}, "limit is 0"),
    ],
)
def test_bad_settings_get_a_sentence(settings, sentence):
    with pytest.raises(errors.ConfigError, match=sentence):
        make(**settings)


def test_there_is_no_expert():
    with pytest.raises(ValueError, match="no expert for Pendulum-v1"):
        make("Pendulum-v1").demonstrate(0, 0.0)


def test_a_missing_library_is_one_sentence():
    from genpolicy.tasks._simulators import library

    with pytest.raises(
        errors.ConfigError, match=r"task x needs nowhere: pip install 'genpolicy\[robots\]'"
    ):
        library("nowhere.envs", "task x")

"""MetaWorld: the goal is seen after every step, an episode is its seed's, a demonstration is what happened."""

import warnings

import numpy as np
import pytest
import torch

from genpolicy import config
from genpolicy.tasks._sawyer import STATE, WORLD, Sawyer, catalogue
from genpolicy.tasks._simulators import RenderError
from genpolicy.tasks.metaworld import MetaWorld

PEG, ASSEMBLY, BUTTON = "peg-insert-side-v3", "assembly-v3", "button-press-topdown-v3"


class Clipped(Sawyer):
    """The trap: the goal's bounds are still those of a hidden goal, so that step() clips it to 0."""

    def __init__(self, env, reward):
        super().__init__(env, reward)
        self._world._partially_observable = True
        assert self._world.sawyer_observation_space.high[-1] == 0  # it is cached here, as its constructor does
        self._world._partially_observable = False


def goals(simulation, seed):
    """What reset() and step() show as the goal, and where it is."""
    first, _ = simulation.reset(seed=seed)
    second, *_ = simulation.step(np.zeros(4, np.float32))
    return first[WORLD][-3:], second[WORLD][-3:], simulation._world._target_pos.astype(np.float32)


def successes(task, simulation, seeds):
    """How many episodes the expert wins in this simulation."""
    task.__dict__["_stage"] = simulation
    return sum(task.demonstrate(seed, 0.0).success for seed in seeds)


@pytest.mark.parametrize("env", [PEG, ASSEMBLY])
def test_the_goal_is_seen(env):
    for seed in range(3):
        at_reset, at_step, target = goals(Sawyer(env, "sparse"), seed)
        assert np.array_equal(at_reset, target)
        assert np.array_equal(at_step, target)
    assert successes(MetaWorld(env), Sawyer(env, "sparse"), range(4)) >= 3


@pytest.mark.parametrize("env", [PEG, ASSEMBLY])
def test_a_clipped_goal_would_be_seen(env):
    at_reset, at_step, target = goals(Clipped(env, "sparse"), 0)
    assert np.array_equal(at_reset, target)
    assert not np.array_equal(at_step, target)
    assert successes(MetaWorld(env), Clipped(env, "sparse"), range(4)) == 0


def test_a_demonstration_is_what_happened():
    """Its actions, played in environments whose slots were used before, give the same frames, rewards and success."""
    task = MetaWorld(BUTTON)
    shown = task.demonstrate(3, 0.1)
    assert shown.success
    assert torch.equal(task.demonstrate(3, 0.1).actions, shown.actions)
    length = len(shown.actions)
    assert shown.rewards.tolist() == [0.0] * (length - 1) + [1.0]
    assert shown.actions.abs().max() <= 1
    assert {name: tuple(value.shape[1:]) for name, value in shown.observation.items()} == task.shapes
    environments = task.environments(2, 1)
    environments.reset([0, 1], [8, 9])
    environments.step([0, 1], torch.rand(2, 30, 4) * 2 - 1)
    first = environments.reset([1], [3])
    assert torch.equal(first.observation[WORLD][0, 0], shown.observation[WORLD][0])
    step = environments.step([1], shown.actions[None, : length - 1])
    assert not step.terminated.item()
    for name in task.shapes:
        assert torch.equal(step.context.observation[name][0, 0], shown.observation[name][-1])
    step = environments.step([1], torch.cat([shown.actions[None, -1:], torch.zeros(1, 3, 4)], 1))
    assert (step.terminated.item(), step.success.item(), step.executed.item()) == (True, True, 1)
    environments.close()


def test_noise_is_the_seeds_and_less_on_the_gripper():
    task = MetaWorld(BUTTON)
    first, second = (task.demonstrate(seed, 0.0).observation[STATE][0] for seed in (0, 1))
    assert torch.equal(first, second)  # the hand starts where it always does
    worlds = [task.demonstrate(seed, 0.0).observation[WORLD][0] for seed in (0, 1)]
    assert not torch.equal(*worlds)
    calm, noisy = task.demonstrate(0, 0.0), task.demonstrate(0, 0.1)
    moved = (noisy.actions[0] - calm.actions[0]).abs()
    assert moved.max() > 0
    noises = np.random.Generator(np.random.Philox(key=0)).standard_normal(4) * [0.1, 0.1, 0.1, 0.03]
    assert torch.allclose(noisy.actions[0], (calm.actions[0] + torch.tensor(noises)).clamp(-1, 1).float(), atol=1e-6)


def test_experts_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MetaWorld(PEG).demonstrate(0, 0.0)


def test_the_dense_reward_is_metaworlds():
    dense, sparse = (MetaWorld(BUTTON, reward=reward).demonstrate(0, 0.0).rewards for reward in ("dense", "sparse"))
    assert len(dense) == len(sparse)
    assert 0 <= dense.min() < 1 < dense.max() <= 10
    assert sparse.unique().tolist() == [0, 1]


def test_what_is_asked_and_how_fast():
    task = config.make("tasks", {"name": "metaworld", "env": PEG})
    assert (task.instruction, task.limit, task.action_dim) == ("peg insert side", 150, 4)
    assert task.fps == round(1 / Sawyer(PEG, "sparse")._world.dt)


def test_a_wrong_name_gets_the_nearest():
    with pytest.raises(ValueError, match="did you mean peg-insert-side-v3"):
        config.make("tasks", {"name": "metaworld", "env": "peg-insert-v3"})
    with pytest.raises(ValueError, match="limit is 0"):
        MetaWorld(PEG, limit=0)


def test_a_picture_or_one_sentence(monkeypatch):
    import mujoco

    environments = MetaWorld(PEG).environments(1, 1)
    environments.reset([0], [0])

    def fail(*_):
        raise ImportError("Cannot initialize\na EGL device display")

    with monkeypatch.context() as without:
        without.setattr(mujoco, "Renderer", fail)
        with pytest.raises(
            RenderError, match="MuJoCo can't draw here: Cannot initialize a EGL device display; set MUJOCO_GL"
        ):
            environments.render(0)
    try:
        picture = environments.render(0)
    except RenderError:
        return  # this machine has no way to draw
    finally:
        environments.close()
    assert picture.shape == (240, 240, 3)
    assert picture.dtype == np.uint8
    # Upright: beside the arm, the grey floor is above and the wooden table (more red than blue) below.
    warmth = picture[:, 150:, 0].astype(float) - picture[:, 150:, 2]
    assert warmth[180:].mean() > 20 > 10 > warmth[:50].mean()


@pytest.mark.slow
@pytest.mark.parametrize("env", sorted(catalogue()))
def test_every_task(env):
    """The goal is seen, and seeds are episodes, whatever ran before; the expert wins most of the time."""
    task = MetaWorld(env)
    at_reset, at_step, target = goals(Sawyer(env, "sparse"), 0)
    assert np.array_equal(at_reset, target)
    assert np.array_equal(at_step, target)
    shown = [task.demonstrate(seed, 0.0) for seed in (0, 1, 2, 3, 0)]
    assert torch.equal(shown[0].actions, shown[-1].actions)
    assert torch.equal(shown[0].observation[WORLD], shown[-1].observation[WORLD])
    assert sum(demonstration.success for demonstration in shown[:4]) >= 2

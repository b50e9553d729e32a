"""A critic's ranking is held against rollouts: those go on from a moment of an episode to the bit,
a pair shares its noise, and what is reported is what it says.
"""

import hashlib
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks.critic_ranking import measure, monte_carlo
from benchmarks.ranking_parts.moments import Moment, Resumed, World
from benchmarks.ranking_parts.pairs import states, truths, two_chunks
from benchmarks.ranking_parts.ranks import compared, ranking, table
from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.methods.parts.practice import Episodes
from genpolicy.policy.files import load
from genpolicy.rollout.demonstrations import demonstrate
from genpolicy.tasks._sawyer import Sawyer
from genpolicy.tasks._simulators import library
from genpolicy.training.draws import Draws
from genpolicy.training.experiment import train
from tests.toy_control import Walk, cloned, prepared

CRITIC = {"members": 2, "hidden": 16, "first": 5, "updates": 5, "batch": 16}
SMALL = {"practice": {"first": 2, "episodes": 2}, "critic": CRITIC, "updates": 2, "batch": 16}


# A moment is reached again


def seen(simulation, actions):
    """All that a simulation shows and is, step by step, and its rewards."""
    rows = []
    for action in actions:
        frame, reward, *_ = simulation.step(action)
        world = simulation._world
        body = (world.data.qpos, world.data.qvel, world.data.mocap_pos.ravel(), world.data.act)
        rows.append(np.concatenate([*frame.values(), [reward], *body]))
    return np.stack(rows)


@pytest.mark.parametrize("env", ["shelf-place-v3", "peg-insert-side-v3"])
def test_an_episode_goes_on_from_a_moment_to_the_bit(env):
    actions = np.random.default_rng(0).uniform(-1.5, 1.5, (60, 4)).astype(np.float32)
    original = Sawyer(env, "dense")
    clipped = actions.clip(original.action_space.low, original.action_space.high)
    original.reset(seed=5)
    before = [original.step(action) for action in clipped[:30]]
    qpos, qvel = original._world.data.qpos.copy(), original._world.data.qvel.copy()
    expected = seen(original, clipped[30:])

    moment = Moment(5).after(torch.from_numpy(actions[:30]))
    others = [Moment(6, moment.actions), Moment(5, moment.actions[1:])]
    resumed = Resumed(partial(Sawyer, env, "dense"), [moment, *others], limit=150)
    resumed._world = resumed._simulation._world  # for `seen`
    for number in (2, 0):  # another moment before it changes nothing
        frame, _ = resumed.reset(seed=number)
        found = seen(resumed, clipped[30:])
    assert all(np.array_equal(frame[name], before[-1][0][name]) for name in frame)
    assert np.array_equal(found, expected)

    # controls: another start, an action less, and positions and velocities alone
    for number in (1, 2):
        resumed.reset(seed=number)
        assert np.abs(seen(resumed, clipped[30:]) - expected).max() > 1e-3
    original.reset(seed=5)
    original._world.data.qpos[:], original._world.data.qvel[:] = qpos, qvel
    library("mujoco", "the test").mj_forward(original._world.model, original._world.data)
    assert np.abs(seen(original, clipped[30:]) - expected).max() > 1e-3


def test_the_limit_counts_from_the_episodes_own_beginning():
    action = torch.zeros(3, 2)
    resumed = Resumed(partial(Walk, True), [Moment(1), Moment(1).after(action)], limit=5)
    lengths = []
    for number in (0, 1):
        resumed.reset(seed=number)
        cut, steps = False, 0
        while not cut:
            *_, cut, _ = resumed.step(np.zeros(2, np.float32))
            steps += 1
        lengths.append(steps)
    assert lengths == [5, 2]


# Pairs and their rollouts


@pytest.fixture(scope="module")
def walker(tmp_path_factory):
    """A policy that reaches the goal now and then, with noise."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = cloned(tmp_path_factory.mktemp("walker"))
    kernel = {"name": "floorstd", "kernel": {"name": "ddim", "eta": 1.0}, "floor": 0.3}
    return load(folder, kernel=kernel, window=None)


def rolled(policy, slots, chunks=lambda x: x, seed=0):
    """Success and returns of pairs at moments of the walker's episodes."""
    world, draws = World(partial(Walk, True), 10, slots), Draws(seed)
    moments, context = states(policy, world, range(6), draws)
    drawn = chunks(two_chunks(policy, context, draws))
    found = truths(policy, world, moments, drawn, 5, 0.9, draws)
    world.close()
    return moments, *found


def test_rollouts_do_not_depend_on_the_slots_and_a_pair_shares_its_noise(walker):
    moments, success, returns = rolled(walker, 1)
    assert len({len(moment.actions) for moment in moments}) > 1
    assert success.shape == returns.shape == (6, 2, 5)
    assert torch.allclose(returns, rolled(walker, 4)[2], atol=1e-5)
    assert not torch.allclose(returns, rolled(walker, 4, seed=1)[2], atol=1e-5)
    assert (returns[:, 0] != returns[:, 1]).any()
    alike = rolled(walker, 3, lambda chunks: chunks[:, :1].repeat(1, 2, 1, 1))[2]
    assert torch.allclose(alike[:, 0], alike[:, 1], atol=1e-5)
    assert (alike.std(2) > 1e-3).any(), "rollouts have noise of their own"


def test_a_rollout_is_what_the_chunk_and_then_the_policy_earn(walker):
    """By hand, for chunks that stand still: nothing is earned by them, and all later rewards are
    discounted by their two steps.
    """
    world, draws = World(partial(Walk, True), 10, 4), Draws(0)
    moments, _ = states(walker, world, range(6), draws)
    still = walker.model.event(torch.zeros(6, 2, 2)).unflatten(0, (3, 2))
    _, found = truths(walker, world, moments[:3], still, 5, 0.9, draws)
    zero = walker.actions(still.flatten(0, 1))
    assert zero.abs().max() < 1e-4
    later = [m.after(torch.zeros(zero.shape[1], 2)) for m in moments[:3]]
    for pair, moment in enumerate(later):
        if len(moment.actions) >= 10:
            assert found[pair].abs().max() < 1e-5
            continue
        noise = draws.noise("rollouts", 0, torch.full((5,), pair), 0)
        noise = replace(noise, member=torch.arange(5))
        _, after = world.play(walker, [moment] * 5, noise, 0.9)
        assert torch.allclose(found[pair, 0], 0.9 ** zero.shape[1] * after, atol=1e-4)
        assert after.abs().max() > 1e-2
    world.close()


# How values rank


def test_the_truth_ranks_all_pairs_its_negative_none_and_a_constant_half():
    found = (torch.rand(40, 2, 16) < torch.rand(40, 2, 1)).double()
    found[:5] = 1.0  # pairs that do not differ
    truth = found.mean(2)
    differ = int((truth[:, 0] != truth[:, 1]).sum())
    gap = (truth[:, 0] - truth[:, 1]).abs()
    told = compared({"truth": truth, "against": -truth, "none": torch.zeros(40, 2)}, found)
    right, wrong, none = (told["by"][name] for name in ("truth", "against", "none"))
    assert (right["right"]["share"], right["right"]["n"]) == (1.0, differ)
    assert 0 < right["right_surely"]["n"] < differ
    assert wrong["right"]["share"] == wrong["right_surely"]["share"] == 0.0
    assert none["right"]["share"] == 0.5
    assert none["picked"][0] == 0.0
    assert right["picked"][0] == pytest.approx(float(gap.mean())) == told["ceiling"]
    assert wrong["picked"][0] == -right["picked"][0]
    assert right["spearman"] == pytest.approx(1.0)
    assert right["within"] == pytest.approx(1.0)
    assert wrong["within"] == pytest.approx(-1.0)
    half = told["by"]["half of the rollouts"]["picked"][0]
    assert 0 < half < told["ceiling"], "a pick by noise is not judged by the same noise"


def test_values_that_know_the_state_alone_correlate_across_states_and_not_within():
    level = torch.rand(200, 1, 1)
    found = (torch.rand(200, 2, 16) < level).double()
    values = level.squeeze(2) + 1e-3 * torch.randn(200, 2)
    one = ranking(values.double(), found)
    assert one["spearman"] > 0.8
    assert abs(one["within"]) < 0.2
    assert one["right"]["low"] < 0.5 < one["right"]["high"]


def test_the_monte_carlo_critic_learns_the_observed_returns(tmp_path):
    told = {"name": "aloe", "gamma": 0.5, **SMALL, "critic": {**CRITIC, "batch": 64, "lr": 3e-3}}
    run, method = prepared(tmp_path, method=told)
    with run:
        episodes = Episodes(run, method.practice, method.cut_fails)
        replay, features = episodes.experience.replay, episodes.experience.features
        returns = replay.returns(method.gamma).float()
        known = ~returns.isnan()

        def error(updates):
            critic = monte_carlo(run, method, episodes, updates)
            with torch.no_grad():
                values = critic(features[replay.now], run.policy.model.scored(replay.event))
            return float((values.mean(0) - returns)[known].square().mean())

        assert error(300) < 0.5 * float(returns[known].var()) < error(0)


# A run


def told_by(folder, **method):
    """A run of two iterations in MetaWorld."""
    data = folder / "demonstrations"
    demonstrate({"name": "metaworld", "env": "reach-v3"}, data, episodes=2, noise=0.1, seed=0)
    raw = {
        "policy": {"name": "mlp", "hidden": 16, "blocks": 1, "chunk": 4},
        "chain": {"steps": 2, "kernel": {"name": "ddim", "eta": 1.0}},
        "task": {"name": "metaworld", "env": "reach-v3", "limit": 20},
        "data": {"name": "lerobot_dataset", "root": str(data)},
        "method": {**SMALL, **method},
        "budget": {"iterations": 2},
        "eval": {"every": 0, "episodes": 2},
        "environments": 2,
        "threads": 1,
        "output": str(folder / "run"),
    }
    return train(parse.parse(raw)).folder


def digest(folder):
    return {p: hashlib.sha256(p.read_bytes()).digest() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "name",
    ["aloe", "pa_rl", *(pytest.param(n, marks=pytest.mark.slow) for n in ("expo", "q_chunking"))],
)
def test_a_runs_critic_is_ranked_and_the_run_is_only_read(tmp_path, name):
    folder = told_by(tmp_path, name=name)
    before = digest(folder)
    told = measure(folder, 3, 4, 5, 0)
    assert digest(folder) == before
    again = measure(folder, 3, 4, 5, 0)
    assert told["each"] == again["each"]
    assert told["iteration"] == 2
    assert all(steps % 4 == 0 and steps < 20 for steps in told["each"]["steps"])
    for critic in ("critic", "monte carlo"):
        assert torch.tensor(told["each"][critic]).isfinite().all()
    assert told["each"]["critic"] != told["each"]["monte carlo"]
    assert np.shape(told["each"]["return"]) == (3, 2, 4)
    assert table(told).count("\n") == 2 + 2 + 6 - 1


def test_a_folder_without_a_critic_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="no run's folder"):
        measure(tmp_path, 3, 4, 5, 0)
    folder = told_by(tmp_path, name="aloe", weigh="success", critic={})
    with pytest.raises(ConfigError, match="has no critic"):
        measure(folder, 3, 4, 5, 0)

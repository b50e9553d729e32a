"""The sampler that is deployed: along the states in which training has changed the network."""

from dataclasses import replace

import pytest
import torch

from genpolicy.chain import Mean, Noise
from genpolicy.config.schema import ChainConfig
from genpolicy.policy.sampler import ODE, deployed_sampler, make_policy
from tests.toy_control import Recorded, prepared

SDE = {"name": "sde", "a": 0.7}
WHOLE = ChainConfig(steps=5, kernel=SDE, window=(0, 4))
DRAWN = replace(WHOLE, window_size=1)
MEAN = {"name": "mean", "kernel": SDE}


def test_actions_are_deployed_with_the_mean_where_all_steps_of_the_window_are_trained():
    assert deployed_sampler(WHOLE, {}, control=True) == replace(WHOLE, kernel=MEAN)


@pytest.mark.parametrize("size", [1, 3])
def test_actions_are_deployed_with_the_ode_where_the_noisy_steps_are_drawn_anew(size):
    found = deployed_sampler(replace(WHOLE, window_size=size), {}, control=True)
    assert found == replace(WHOLE, kernel=ODE, window=None)


def test_pictures_are_deployed_with_the_ode_in_both_cases():
    for rollout in (WHOLE, DRAWN):
        assert deployed_sampler(rollout, {}) == replace(WHOLE, kernel=ODE, window=None)


@pytest.mark.parametrize("control", [True, False])
@pytest.mark.parametrize("name", ["heun", "dpmsolver"])
def test_a_solver_is_deployed_as_it_is(name, control):
    rollout = ChainConfig(steps=5, kernel={"name": name})
    assert deployed_sampler(rollout, {}, control=control) == rollout
    named = deployed_sampler(rollout, {"kernel": ODE}, control=control)
    assert named.kernel == ODE, "control: but where another one is named"


def test_a_kernel_that_is_named_is_the_one_that_is_deployed_in_the_window():
    found = deployed_sampler(DRAWN, {"kernel": MEAN}, control=True)
    assert found == replace(WHOLE, kernel=MEAN)


def test_the_best_of_several_is_picked_from_the_process_that_is_trained():
    several = deployed_sampler(WHOLE, {"best_of": 4}, control=True)
    assert several == replace(WHOLE, best_of=4), "the kernel, its last step without noise"
    several = deployed_sampler(DRAWN, {"best_of": 4}, control=True)
    assert several == replace(WHOLE, kernel=ODE, window=None, best_of=4)


def test_a_run_with_one_random_step_deploys_what_it_walks_along(tmp_path):
    """A training chain is the ODE but for one step; the mean at all steps is far from both."""
    policy = {"name": "mlp", "hidden": 16, "blocks": 1, "chunk": 2, "family": "flow"}
    chain = {"steps": 5, "kernel": SDE, "window": [0, 4], "window_size": 1}
    run, _ = prepared(tmp_path, policy=policy, chain=chain, method={"name": "bc"})
    with run:
        context, _, _ = Recorded(episodes=4).rows(torch.arange(6), 1, range(2))
        condition = run.policy.model.encode(context)
        noise = Noise.rows(0, 0, torch.arange(6), 1)
        along = run.policy.with_window((0, 0)).sample(condition, noise).x0
        assert torch.equal(run.deployed.sample(condition, noise).x0, along)
        assert not isinstance(run.deployed.chain.kernel, Mean)
        means = make_policy(run.policy.model, deployed_sampler(WHOLE, {}, control=True))
        there = means.sample(condition, noise).x0
        assert float((there - along).abs().max()) > 0.1, "control: what was deployed before"

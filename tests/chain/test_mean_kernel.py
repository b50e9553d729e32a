"""The kernel Mean: where another kernel's noise would have taken the chain, without the noise."""

from dataclasses import replace

import pytest
import torch

from genpolicy.chain import CPS, DDIM, SDE, Chain, ClipStd, FloorStd, Linear, Mean, Noise
from genpolicy.chain.schedule import step
from genpolicy.config.origin import PERSON
from genpolicy.config.schema import ChainConfig
from genpolicy.contracts.task import Context
from genpolicy.models.toy import Toy
from genpolicy.policy.sampler import deployed_sampler, make_kernel, make_policy
from tests.chain.exact import SCHEDULES, Network, batch

KERNELS = {
    "ddim": DDIM(1.0),
    "floor": FloorStd(DDIM(1.0), 0.1),
    "published floor": FloorStd(DDIM(1.0), 0.1, consistent=False),
    "clip": ClipStd(DDIM(1.0), 0.02, 0.3),
    "cps": CPS(0.5),
    "sde": SDE(0.7),
}


def grid_steps(schedule, K=6):
    grid = schedule.grid(K)
    return step(schedule, grid[:-1], grid[1:])


@pytest.mark.parametrize("name", KERNELS)
def test_the_same_mean_and_no_noise(name):
    here = grid_steps(Linear())
    noisy, quiet = KERNELS[name].coefficients(here), Mean(KERNELS[name]).coefficients(here)
    for part in ("x", "x0", "eps"):
        assert torch.equal(getattr(noisy, part), getattr(quiet, part))
    assert (quiet.std == 0).all()
    assert (noisy.std[:-1] > 0).all()


@pytest.mark.parametrize("name", ["ddim", "floor", "cps"])
def test_control_the_ode_is_another_mean(name):
    here = grid_steps(Linear())
    ode, quiet = DDIM(0.0).coefficients(here), Mean(KERNELS[name]).coefficients(here)
    assert (ode.eps - quiet.eps).abs().max() > 0.01
    assert torch.equal(Mean(DDIM(0.0)).coefficients(here).eps, ode.eps)


@pytest.mark.parametrize("schedule", ["vp", "linear"])
def test_a_chain_of_means_is_the_chain_whose_noise_is_zero(schedule):
    schedule = SCHEDULES[schedule]
    condition, noise = batch(3, 1)
    network = Network((2, 2))
    grid, kernel = schedule.grid(5), FloorStd(DDIM(1.0), 0.1)

    class Silent(Noise):
        def __call__(self, k, shape, device="cpu"):
            draw = super().__call__(k, shape, device)
            return draw if k < 0 else torch.zeros_like(draw)

    silent = Silent(noise.seed, noise.iteration, noise.group, noise.member)
    for window in (None, (0, 5), (2, 4)):
        quiet = Chain(schedule, grid, Mean(kernel), window)
        expected = (
            Chain(schedule, grid, kernel, window).sample(network, condition, silent, (2, 2)).x0
        )
        assert torch.equal(quiet.sample(network, condition, noise, (2, 2)).x0, expected)
        plain = Chain(schedule, grid, kernel, window).sample(network, condition, noise, (2, 2)).x0
        assert (plain - expected).abs().max() > 1e-3


def test_a_point_is_not_scored():
    condition, noise = batch(2, 1)
    network, schedule = Network((2,)), Linear()
    chain = Chain(schedule, schedule.grid(4), Mean(DDIM(1.0)))
    trajectory = chain.sample(network, condition, noise, (2,))
    gaussian = chain.transition(network, trajectory, 1)
    with pytest.raises(ValueError, match="no density"):
        gaussian.log_prob(trajectory.after(1), reduce="sum")


TRAINED = ChainConfig(
    steps=6,
    kernel={"name": "floorstd", "kernel": {"name": "ddim", "eta": 1.0}, "floor": 0.1},
    window=(2, 6),
    guidance=1.0,
)
DRAWN = replace(TRAINED, window_size=1)
"""A sampler whose window is drawn for every iteration."""


def test_actions_are_deployed_with_the_mean_of_the_kernel_that_was_trained():
    deployed = deployed_sampler(TRAINED, {}, control=True)
    assert make_kernel(deployed.kernel, PERSON) == Mean(FloorStd(DDIM(1.0), 0.1))
    assert (deployed.steps, deployed.window, deployed.window_size) == (6, (2, 6), None)


def test_pictures_are_deployed_with_the_ode():
    for trained in (TRAINED, DRAWN):
        deployed = deployed_sampler(trained, {})
        assert make_kernel(deployed.kernel, PERSON) == DDIM(0.0)
        assert (deployed.steps, deployed.window, deployed.window_size) == (6, None, None)


def test_actions_are_deployed_with_the_ode_where_the_window_is_drawn():
    deployed = deployed_sampler(DRAWN, {}, control=True)
    assert make_kernel(deployed.kernel, PERSON) == DDIM(0.0)
    assert (deployed.steps, deployed.window, deployed.window_size) == (6, None, None)


@pytest.mark.parametrize("control", [False, True])
def test_what_is_asked_of_the_deployed_sampler_wins(control):
    asked = {"steps": 3, "kernel": {"name": "cps", "a": 0.2}, "window": None}
    deployed = deployed_sampler(TRAINED, asked, control=control)
    assert (deployed.steps, make_kernel(deployed.kernel, PERSON), deployed.window) == (
        3,
        CPS(0.2),
        None,
    )


def test_the_deployed_means_are_those_that_training_scores():
    """Step by step: the deployed sampler's transition has the training kernel's mean
    at the same state.
    """
    model = Toy()
    training = make_policy(model, TRAINED)
    deployed = make_policy(model, deployed_sampler(TRAINED, {}, control=True))
    condition = model.encode(Context(["a", "b", "c"]))
    trajectory = training.sample(condition, Noise.rows(0, 0, torch.arange(3), 1))
    ode = make_policy(model, deployed_sampler(TRAINED, {}))
    for k in trajectory.steps:
        mean = deployed.transition(trajectory, k).mean
        assert torch.equal(mean, training.transition(trajectory, k).mean)
        other = ode.with_window((0, 6)).transition(trajectory, k) if k < 5 else None
        assert other is None or not torch.allclose(mean, other.mean, atol=1e-3)

"""A learned std: where it draws, where it does not, and what is scored with it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from genpolicy.chain import Noise
from genpolicy.config.errors import ConfigError
from genpolicy.contracts.task import Context
from genpolicy.policy.files import load
from genpolicy.policy.policy import ChainPolicy
from genpolicy.policy.sampler import make_policy
from genpolicy.training.run import Run
from tests import toy
from tests.policy.toy_parts import acted, apart, part, prepared, reloaded, same

ODE = {"name": "ddim", "eta": 0.0}
EVAL = {"every": 0, "samples": 4}
VISIBLE = 0.01
"""The least that a learned std changes, in units of the event."""


def learned(world: str, folder, **sections) -> Run:
    """A run of a world before it begins, whose policy has a learned std."""
    run, _ = prepared(world, "std", folder, **sections)
    run.attach(std=part("std", run.policy, run.features))
    return run


def bare(policy: ChainPolicy) -> ChainPolicy:
    """The same network and sampler without parts."""
    return replace(policy, parts={}, noise=None)


def deployed(world: str, folder, sampler: dict, **chain) -> tuple[Run, ChainPolicy]:
    """A run with a learned std, and what it saves with the deployed sampler, loaded again."""
    settings = {"every": 0, "sampler": sampler}
    settings |= {"episodes": 4} if world == "robots" else {"samples": 4}
    section = {"steps": 4, "kernel": {"name": "ddim", "eta": 1.0}, **chain}
    run = learned(world, folder, eval=settings, chain=section)
    return run, reloaded(run.deployed, run, folder / "saved")


# Where it draws


@pytest.mark.parametrize(
    ("world", "sampler"),
    [("prompts", {}), ("prompts", {"kernel": ODE}), ("robots", {}), ("robots", {"kernel": ODE})],
)
def test_a_deployed_sampler_without_noise_stays_without_noise(tmp_path, world, sampler):
    run, loaded = deployed(world, tmp_path, sampler, window=[0, 4])
    for policy in (run.deployed, loaded):
        assert same(policy, bare(policy))
        assert "std" in policy.parts
    assert apart(run.policy, bare(run.policy)) > VISIBLE, "control: the kernel that is trained"
    run.evaluator.close()


def test_a_deployed_ode_in_a_window_that_is_named_draws_the_learned_noise(tmp_path):
    run, loaded = deployed("robots", tmp_path, {"kernel": ODE, "window": [0, 4]})
    for policy in (run.deployed, loaded):
        assert apart(policy, bare(policy)) > VISIBLE
    run.evaluator.close()


@pytest.mark.parametrize("kernel", [{"name": "ddim", "eta": 0.3}, {"name": "cps", "a": 0.5}])
def test_a_deployed_kernel_with_noise_keeps_the_window_and_draws_the_learned_noise(
    tmp_path, kernel
):
    run, loaded = deployed("robots", tmp_path, {"kernel": kernel}, window=[0, 3])
    assert run.deployment.sampler.window == (0, 3)
    for policy in (run.deployed, loaded):
        assert apart(policy, bare(policy)) > VISIBLE
    run.evaluator.close()


def test_reinflow_is_refused_a_kernel_without_noise_whose_window_is_not_named(tmp_path):
    run, method = prepared(
        "robots",
        "std",
        tmp_path,
        policy={"name": "mlp", "hidden": 8, "blocks": 1, "chunk": 2, "family": "flow"},
        chain={"steps": 4, "kernel": ODE},
        method={"name": "reinflow", "episodes": 4},
    )
    with run, pytest.raises(ConfigError, match="chain.window must name the steps that explore"):
        method.train(run)

"""A learned std: where it draws, where it does not, and what is scored with it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from genpolicy.chain import Noise
from genpolicy.config.errors import ConfigError
from genpolicy.contracts.task import Context
from genpolicy.methods.flow_grpo import FlowGRPO
from genpolicy.policy.policy import ChainPolicy
from genpolicy.training.requirements import Needs, require_chain
from genpolicy.training.run import Run
from tests import toy
from tests.policy.toy_parts import apart, part, prepared, reloaded, same

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
    with run, pytest.raises(ConfigError, match="name the steps that explore"):
        method.train(run)


# What is scored with it


def drawn(run: Run, keep: tuple[int, int] | None = None):
    """Six chains of the policy that is trained."""
    policy = run.policy
    context = Context([toy.PROMPTS[row % 4] for row in range(6)])
    noise = Noise.rows(0, 1, torch.arange(6), 1)
    return policy.sample(policy.model.encode(context), noise, keep=keep)


@pytest.mark.parametrize("k", [1, torch.tensor([0, 1, 2, 2, 1, 0])])
def test_the_std_of_a_scored_step_is_the_one_that_acted(tmp_path, k):
    run = learned("prompts", tmp_path, eval=EVAL)
    trajectory = drawn(run)
    step = run.policy.score(trajectory, k, torch.zeros(6))
    acting: Tensor = trajectory.acted(k).std.flatten(1).mean(1)
    assert torch.equal(torch.as_tensor(step.std), acting)
    assert not torch.allclose(acting, run.policy.std(k).expand(6), rtol=0.1), (
        "control: the kernel's"
    )


@pytest.mark.parametrize("k", [1, torch.tensor([0, 1, 2, 2, 1, 0])])
def test_without_a_learned_std_it_is_the_kernels_to_the_bit(tmp_path, k):
    run, _ = prepared("prompts", "std", tmp_path, eval=EVAL)
    step = run.policy.score(drawn(run), k, torch.zeros(6))
    assert torch.equal(torch.as_tensor(step.std), run.policy.std(k).expand(6))


def test_the_weight_of_flow_grpo_is_that_of_the_std_that_acted(tmp_path):
    run = learned("prompts", tmp_path, eval=EVAL)
    trajectory = drawn(run)
    step = run.policy.score(trajectory, 1, torch.linspace(-1, 1, 6))
    plain, weighted = (FlowGRPO(weight=weight) for weight in ("none", "std/dt"))
    grid = run.policy.chain.grid
    ratio = trajectory.acted(1).std.flatten(1).mean(1) / float(grid[1] - grid[2])
    assert torch.allclose(weighted.loss(step)[0], plain.loss(step)[0] * ratio, rtol=1e-5)


def test_a_step_outside_the_window_is_kept_as_the_point_that_it_was(tmp_path):
    run = learned("prompts", tmp_path, eval=EVAL)
    trajectory = drawn(run, keep=(0, 4))
    assert torch.equal(trajectory.after(3), trajectory.acted(3).mean)
    assert not bool(trajectory.acted(3).std.any())
    assert bool((trajectory.acted(2).std > 0).all()), "control: the last step that draws"


def test_a_deterministic_kernel_with_a_learned_std_has_likelihoods(tmp_path):
    chain = {"steps": 4, "kernel": ODE, "window": [0, 3]}
    run = learned("robots", tmp_path, chain=chain)
    needs = Needs(likelihoods=True)
    require_chain("any", needs, run.policy)
    with pytest.raises(ConfigError, match="is deterministic"):
        require_chain("any", needs, bare(run.policy))
    run.evaluator.close()

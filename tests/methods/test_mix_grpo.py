"""MixGRPO: where the window stands, what is noisy and trained, and the solver behind it."""

import math

import pytest
import torch

from genpolicy.chain import DDIM, Chain, Noise
from genpolicy.chain.schedule import Linear
from genpolicy.chain.solver import DPMSolver
from genpolicy.chain.values import Prediction
from genpolicy.config.errors import ConfigError
from genpolicy.methods.mix_grpo import MixGRPO
from tests.methods.test_laws import prepared

SDE = {"steps": 8, "kernel": {"name": "sde", "a": 0.7}}


def places(method, iterations, count):
    return [method.slid(iteration, count) for iteration in range(1, iterations + 1)]


def test_the_window_moves_every_so_many_iterations_and_begins_again():
    assert places(MixGRPO(every=2), 14, 5) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 0, 0, 1, 1]
    assert places(MixGRPO(every=1, stride=2), 7, 5) == [0, 2, 4, 0, 2, 4, 0]
    assert places(MixGRPO(every=1, stride=3), 4, 5) == [0, 3, 4, 0], "moved back inside"
    assert places(MixGRPO(every=1), 2, 1) == [0, 0]
    assert places(MixGRPO(), 26, 22)[-2:] == [0, 1], "25 iterations as published"


def test_the_later_places_are_passed_faster():
    """tau_l = ceil(25 exp(-0.1 max(l - 13, 0))), by hand."""
    method = MixGRPO(schedule="exp_decay")
    stays = [method.stay(place, 22) for place in range(22)]
    assert stays[:14] == [25] * 14
    assert stays[14:] == [math.ceil(25 * math.exp(-0.1 * n)) for n in range(1, 9)]
    assert stays[14:] == [23, 21, 19, 17, 16, 14, 13, 12]
    found = places(method, sum(stays) + 1, 22)
    assert [found.count(place) for place in range(1, 22)] == stays[1:]
    assert found[-1] == 0
    linear = [MixGRPO(schedule="decay", every=4).stay(place, 4) for place in range(4)]
    assert linear == [4, 3, 2, 1]


def test_a_random_window_is_drawn_in_every_iteration(tmp_path):
    run, method = prepared(tmp_path, "mix_grpo", chain=SDE)
    method.schedule, method.size = "random", 2
    found = []
    for iteration in range(1, 41):
        run.spent.iteration = iteration
        found.append(method.place(run, iteration, run.window))
    assert set(found) == set(range(6))


def test_only_the_window_is_noisy_and_trained(tmp_path):
    run, method = prepared(tmp_path, "mix_grpo", chain=SDE)
    method.size, method.every = 3, 1
    run.experiment.optimizer.lr = 1e-12  # the policy stays as it is
    seen, honest = [], run.update
    run.update = lambda rollout, *rest: seen.append(rollout) or honest(rollout, *rest)
    run.iterations = lambda: iter([1, 3])
    method.train(run)
    first, third = seen[0].trajectory, seen[-1].trajectory
    assert (first.steps, third.steps) == (range(3), range(2, 5))
    assert (third.std > 0).all()
    # before the window the chain is the ODE's: it follows from its start alone
    chain = run.policy.with_window((0, 0)).chain
    sample = chain.sample(
        run.policy.denoiser,
        third.condition,
        Noise.rows(0, 9, torch.arange(4), 4),
        third.start.shape[1:],
        start=(0, third.start),
        keep=(0, 8),
    )
    assert torch.allclose(sample.before(2), third.before(2), atol=1e-6)
    assert not torch.allclose(sample.before(5), third.after(4), atol=1e-3), (
        "control: noise is drawn"
    )


def test_a_window_longer_than_the_chains_is_refused(tmp_path):
    run, method = prepared(tmp_path, "mix_grpo", chain={**SDE, "steps": 3})
    method.size = 3
    with pytest.raises(ConfigError, match="has 2 steps"):
        method.train(run)


def test_a_window_of_the_chain_section_that_moves_by_itself_is_refused(tmp_path):
    run, method = prepared(tmp_path, "mix_grpo", chain={**SDE, "window_size": 2})
    with pytest.raises(ConfigError, match="window_size"):
        method.train(run)


# -- Flash -----------------------------------------------------------------------------------------


def test_flash_takes_fewer_evaluations_behind_the_window_and_none_less_before(tmp_path):
    run, method = prepared(tmp_path, "mix_grpo", chain=SDE)
    method.size = 2
    spent = {}
    for steps in (None, 2, 99):
        method.solver_steps = steps
        policy = method.flash(run.policy, (2, 4))
        before = policy.model.evaluations
        rollout = run.collect(2, 2, policy=policy, window=(2, 4))
        spent[steps] = (policy.model.evaluations - before) / 4
        assert rollout.trajectory.steps == range(2, 4)
        grid = run.policy.chain.grid
        assert all(float(t) in grid.tolist() for t in policy.chain.grid), "the chain's own times"
    assert spent == {None: 8, 2: 6, 99: 8}


def test_flash_scores_its_window_with_ratio_one(tmp_path):
    run, method = prepared(tmp_path, "mix_grpo", chain=SDE)
    method.size, method.solver_steps = 2, 2
    rollout = run.collect(2, 2, policy=method.flash(run.policy, (2, 4)), window=(2, 4))
    for k in (2, 3):
        scored = run.policy.score(rollout.trajectory, k, torch.ones(4), None)
        assert method.log_ratio(scored.new, scored.old, scored.x).abs().max() == 0


def test_behind_a_window_the_solver_goes_on_from_its_last_state():
    """On x_0 ~ N(1, .5^2), whose denoiser is known: the chain with a solver is the solver from the
    window's end on, and nearer to the exact flow than Euler at the same times.
    """
    schedule = Linear()

    def denoiser(x, t, condition):
        alpha, sigma = schedule.alpha(t)[:, None].float(), schedule.sigma(t)[:, None].float()
        variance = alpha**2 * 0.25 + sigma**2
        x0 = 1 + alpha * 0.25 / variance * (x - alpha)
        return Prediction(x0=x0, eps=(x - alpha * x0) / sigma.clamp_min(1e-9))

    grid = schedule.grid(24)
    coarse = torch.cat([grid[:8], grid[[8, 12, 16, 20, 24]]])
    condition, noise = torch.zeros(64, 1), Noise.rows(0, 0, torch.arange(64), 1)

    def end(chain):
        return chain.sample(denoiser, condition, noise, (1,), keep=(4, 8))

    common = {"kernel": DDIM(eta=0.0), "window": (4, 8)}
    fine = end(Chain(schedule, schedule.grid(960), DDIM(eta=0.0), (4, 8))).x0
    euler = end(Chain(schedule, coarse, **common))
    flash = end(Chain(schedule, coarse, finish=DPMSolver(), **common))
    assert torch.equal(flash.x, euler.x), "the window is the same"
    straight = DPMSolver().integrate(
        lambda x, t: denoiser(x, t, condition), flash.x[:, -1], schedule, coarse[8:]
    )
    assert torch.equal(flash.x0, straight)
    assert (flash.x0 - fine).abs().mean() < 0.7 * (euler.x0 - fine).abs().mean()


def test_a_chain_that_ends_with_a_solver_is_not_differentiated():
    schedule = Linear()
    chain = Chain(schedule, schedule.grid(4), window=(0, 2), finish=DPMSolver())
    with pytest.raises(ValueError, match="not differentiated"):
        chain.unroll(None, None, None, (1,))  # refused before anything is used

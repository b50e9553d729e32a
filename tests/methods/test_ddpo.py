"""DDPO: its two estimators against a policy gradient that is known, its baselines, its passes."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from genpolicy.chain.values import Gaussian
from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.learning.advantage import PromptHistory
from genpolicy.learning.objective import Scored
from genpolicy.methods.ddpo import DDPO
from genpolicy.training.experiment import train
from tests import toy_control
from tests.methods.test_laws import KERNELS, Turned, prepared

STEP = {"reference": None, "dt": 0.1, "gain": 1.0, "index": 0, "steps": 1}

# -- the estimators --------------------------------------------------------------------------------

PULL, DRIFT, STD = (0.9, 0.7, 0.5), (1.0, 0.5, 2.0), (0.8, 0.4, 0.6)
"""A chain on the line, x' = PULL x + DRIFT theta + STD noise at each of three steps."""
THETA = 0.3
DIRECTION = torch.tensor([1.0, -2.0], dtype=torch.float64)
"""The reward of a sample x is its product with this."""


def transitions(count, theta):
    """The three steps of ``count`` chains under the policy that acted, and under theta; and the
    rewards.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    found = []
    for pull, drift, std in zip(PULL, DRIFT, STD, strict=True):
        old = Gaussian(pull * x + drift * THETA, torch.full((count, 1), std, dtype=torch.float64))
        after = old.sample(torch.randn(x.shape, generator=generator, dtype=torch.float64))
        found.append((Gaussian(pull * x + drift * theta, old.std), old, after))
        x = after
    return found, x @ DIRECTION


@pytest.mark.parametrize("estimator", ["is", "sf"])
def test_both_estimate_the_gradient_of_the_mean_reward(estimator):
    """E[R] is linear in theta: each step's drift reaches the sample through the later pulls."""
    count = 40_000
    theta = torch.full((count, 2), THETA, dtype=torch.float64, requires_grad=True)
    steps, reward = transitions(count, theta)
    method = DDPO(estimator=estimator, updates=1, reduce="sum", clip=0.2)
    advantage = reward - reward.mean()
    losses = [
        method.loss(Scored(new=new, old=old, x=x, advantage=advantage, std=old.std[:, 0], **STEP))
        for new, old, x in steps
    ]
    rows = -torch.autograd.grad(sum(loss.sum() for loss, _ in losses), theta)[0]  # [count,2]
    reach = sum(d * math.prod(PULL[k + 1 :]) for k, d in enumerate(DRIFT))
    error = rows.std(0) / count**0.5
    assert ((rows.mean(0) - reach * DIRECTION).abs() < 3 * error).all()
    assert (error < 0.05).all()
    # control: one step alone, or the last drift for all, is another gradient
    assert ((rows.mean(0) - DRIFT[-1] * DIRECTION).abs() > 5 * error).all()


def moved(advantage, far):
    """A step of rows whose means have moved by ``far`` stds since they acted."""
    old = Gaussian(torch.zeros(4, 3), torch.full((4, 1), 0.5))
    mean = torch.full((4, 3), 0.5 * far).requires_grad_()
    x = 0.5 * torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    values = torch.tensor(advantage)
    new = Gaussian(mean, old.std)
    return Scored(new=new, old=old, x=x, advantage=values, std=old.std[:, 0], **STEP), mean


@pytest.mark.parametrize("far", [0.0, 0.7])
def test_the_score_function_is_minus_a_grad_log_p_wherever_the_policy_stands(far):
    step, mean = moved([1.0, -2.0, 0.0, 0.5], far)
    method = DDPO(estimator="sf", updates=1, reduce="sum")
    loss, metrics = method.loss(step)
    found = torch.autograd.grad(loss.sum(), mean)[0]
    density = torch.distributions.Normal(mean, 0.5).log_prob(step.x).sum(1)
    expected = torch.autograd.grad((-step.advantage * density).sum(), mean)[0]
    assert torch.allclose(found, expected, atol=1e-5)
    assert metrics["clip_fraction"].sum() == 0
    importance = torch.autograd.grad(DDPO(reduce="sum", clip=0.2).loss(step)[0].sum(), mean)[0]
    assert torch.allclose(found, importance, atol=1e-5) == (far == 0.0)


def test_importance_sampling_clips_what_has_gone_far():
    step, mean = moved([1.0, 1.0, -1.0, -1.0], 3.0)
    loss, metrics = DDPO(reduce="sum", clip=0.2).loss(step)
    gone = metrics["ratio_mean"]
    cut = ((gone > 1.2) & (step.advantage > 0)) | ((gone < 0.8) & (step.advantage < 0))
    assert cut.any()
    assert torch.equal(metrics["clip_fraction"].bool(), cut)
    gradient = torch.autograd.grad(loss.sum(), mean)[0]
    assert torch.equal(gradient.abs().sum(1) == 0, cut)


# -- the baselines ---------------------------------------------------------------------------------


@pytest.fixture
def drawn(tmp_path):
    """A rollout of four prompts of four samples, with rewards that are easily followed."""
    run, _ = prepared(tmp_path, "ddpo", chain={"steps": 4, "kernel": KERNELS["ddim"]})
    rewards = torch.tensor([[1.0, 3], [10, 14], [5, 7], [0, 0]], dtype=torch.float64)
    return replace(run.collect(4, 2), rewards=rewards, prompts=("a", "b", "a", "c"))


def test_a_prompt_is_compared_with_its_own_last_rewards_wherever_they_stand(drawn):
    method = DDPO(groups=4, group=2, history=4, min_count=4)
    found = method.advantage(drawn, PromptHistory(4, 4))
    own = torch.tensor([1.0, 3, 5, 7], dtype=torch.float64)
    whole = drawn.rewards
    expected = [
        (own[:2] - own.mean()) / own.std(correction=0),
        (whole[1] - whole.mean()) / whole.std(correction=0),  # too few of its own: the batch's
        (own[2:] - own.mean()) / own.std(correction=0),
        (whole[3] - whole.mean()) / whole.std(correction=0),
    ]
    assert torch.allclose(found, torch.stack(expected), atol=1e-5)


def test_the_history_keeps_the_last_ones_and_goes_on(drawn):
    method = DDPO(groups=4, group=2, history=2, min_count=2)
    history = PromptHistory(2, 2)
    first = method.advantage(drawn, history)
    assert list(history.history["a"]) == [5.0, 7.0]
    assert first[0].tolist() == pytest.approx([-5, -3], abs=1e-4), "(1 - 6)/1 and (3 - 6)/1"
    later = replace(drawn, rewards=drawn.rewards[:1] + 100, prompts=("b",))
    method.advantage(later, history)
    assert list(history.history["b"]) == [101.0, 103.0]


def test_the_baselines_of_the_batch_and_of_the_group(drawn):
    whole = drawn.rewards
    found = DDPO(group=2, baseline="batch").advantage(drawn, PromptHistory())
    assert torch.allclose(found, (whole - whole.mean()) / whole.std(correction=0), atol=1e-6)
    found = DDPO(group=2, baseline="group").advantage(drawn, PromptHistory())
    pairs = torch.tensor([[-1.0, 1], [-1, 1], [-1, 1], [0, 0]], dtype=torch.float64)
    assert torch.allclose(found, pairs, atol=1e-3)


def test_advantages_are_bounded(drawn):
    method = DDPO(group=2, baseline="batch", advantage_clip=0.5)
    assert method.advantage(drawn, PromptHistory()).abs().max() == 0.5


# -- runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", ["prompts", "robots"])
def test_a_pass_takes_every_sample_once_in_random_parts_at_all_its_steps(tmp_path, world):
    run, method = prepared(
        tmp_path, "ddpo", world, chain={"steps": 5, "kernel": KERNELS["ddim"], "window": [1, 4]}
    )
    method.updates, method.epochs = 3, 2
    seen, honest = [], run.update

    def update(rollout, batch, *arguments, **options):
        assert batch.k is None, "all steps of the window"
        assert len(rollout.trajectory.steps) == 3
        seen.append((batch.rows.tolist(), len(rollout.trajectory.x0)))
        return honest(rollout, batch, *arguments, **options)

    run.update, run.iterations = update, lambda: iter([1])
    method.train(run)
    total = seen[0][1]
    assert len(seen) == 6
    passes = [[row for rows, _ in part for row in rows] for part in (seen[:3], seen[3:])]
    assert all(Counter(rows) == Counter(range(total)) for rows in passes)
    assert passes[0] != passes[1], "each pass has an order of its own"
    assert all(rows != sorted(rows) for rows in passes)


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("estimator", ["is", "sf"])
def test_a_slow_point_learns_to_reach_its_goal(tmp_path, estimator, right):
    floor = {"name": "floorstd", "kernel": {"name": "ddim", "eta": 1.0}, "floor": 0.2}
    updates = {"is": 4, "sf": 1}[estimator]
    raw = toy_control.experiment(
        tmp_path,
        policy={"name": "mlp", "pretrained": toy_control.cloned(tmp_path, family="vp")},
        task={"name": "tests.toy_control:Point" if right else f"{Turned.__module__}:Turned"},
        chain={"steps": 4, "kernel": floor, "window": [0, 4]},
        method={
            "name": "ddpo",
            "estimator": estimator,
            "updates": updates,
            "groups": 8,
            "group": 8,
            "baseline": "group",
            "reduce": "sum",
            "clip": 0.2,
        },
        optimizer={"lr": 2e-3},
        eval={"every": 0, "episodes": 40},
        environments=40,
        budget={"iterations": 12 if estimator == "is" else 40},
    )
    result = train(parse.parse(raw))
    before, after = result.before["success_rate"], result.after["success_rate"]
    assert after > before + 0.2 if right else after <= before, (before, after)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"estimator": "ppo"}, "estimator is 'ppo'"),
        ({"baseline": "value"}, "baseline is 'value'"),
        ({"estimator": "sf"}, "set both to 1"),
        ({"estimator": "sf", "updates": 1, "epochs": 2}, "set both to 1"),
        ({"baseline": "group"}, "it must be at least 2"),
        ({"history": 8}, "never reaches min_count = 16"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"groups": 0}, "groups is 0"),
    ],
)
def test_settings_that_mean_nothing_are_one_sentence(wrong, sentence):
    with pytest.raises(ConfigError, match=sentence):
        DDPO(**wrong)

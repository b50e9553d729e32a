"""Losses, gradients and replays that are not finite: what stops a run, and what fp16 skips."""

import math
from dataclasses import replace

import pytest
import torch

from genpolicy.cli import main
from genpolicy.config.errors import ConfigError
from genpolicy.config.schema import OptimizerConfig
from genpolicy.learning.objective import log_ratio
from genpolicy.training.optimizer import OVERFLOWS, Optimizer, step_together
from tests.training.test_verbs import largest_difference, prepared

SETTINGS = OptimizerConfig(lr=0.1, max_grad_norm=1e9, weight_decay=0.0, ema=0.5)


def weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(3))


def optimizer(parameter: torch.nn.Parameter, fp16: bool = True) -> Optimizer:
    return Optimizer(SETTINGS, [parameter], fp16, None)


def overflow(one: Optimizer) -> float:
    """An update whose scaled loss is finite, and its gradient is not."""
    one.zero_grad()
    one.backward((one.parameters[0] * math.inf).clamp(max=1.0).sum())
    one.parameters[0].grad = torch.full((3,), math.inf)
    return step_together([one], 0.0)


def test_an_optimiser_beside_the_first_sees_gradients_without_the_scale():
    """The loss of a policy in fp16 reaches a part (ReinFlow's std) with an optimiser of its own."""
    network, part = weight(), weight()
    one, beside = optimizer(network), optimizer(part, fp16=False)
    one.backward((network * part * torch.arange(3.0)).sum())
    assert part.grad is not None
    assert float(part.grad.max()) == 2 * 65536, "control: before the step it is scaled"
    norm = step_together([one, beside], 0.0)
    assert torch.equal(part.grad, torch.arange(3.0))
    assert norm == pytest.approx(5**0.5)
    assert float(network.detach()[1]) == float(part.detach()[1]) == pytest.approx(0.9)


def test_what_one_of_them_overflows_none_of_them_applies():
    network, part = weight(), weight()
    one, beside = optimizer(network), optimizer(part, fp16=False)
    one.backward((network + part).sum())
    part.grad = torch.full((3,), math.inf)
    step_together([one, beside], 0.0)
    assert torch.equal(network.detach(), torch.ones(3))
    assert torch.equal(part.detach(), torch.ones(3))
    assert one.scaler.get_scale() == 32768
    one, beside = optimizer(network, fp16=False), optimizer(part, fp16=False)
    one.backward((network + part * math.nan).sum())
    with pytest.raises(FloatingPointError, match="the gradient's norm is nan: nothing was applied"):
        step_together([one, beside], 0.0)
    assert torch.equal(network.detach(), torch.ones(3))


def test_an_update_that_overflows_fp16_is_skipped_and_not_counted():
    one = optimizer(weight())
    assert not math.isfinite(overflow(one))
    assert torch.equal(one.parameters[0].detach(), torch.ones(3))
    assert (one.updates, one.overflows) == (0, 1)
    again = optimizer(weight())
    again.load_state_dict(one.state_dict())
    assert again.overflows == 1
    one.zero_grad()
    one.backward(one.parameters[0].sum())
    step_together([one], 0.0)
    assert (one.updates, one.overflows) == (1, 0)
    assert float(one.parameters[0].detach()[0]) == pytest.approx(0.9)


def test_fp16_that_only_overflows_stops_with_one_sentence():
    one = optimizer(weight())
    for _ in range(OVERFLOWS - 1):
        overflow(one)
    with pytest.raises(FloatingPointError, match=r"overflowed fp16 in 20 updates") as caught:
        overflow(one)
    assert main._sentence(caught.value) == str(caught.value)
    assert torch.equal(one.parameters[0].detach(), torch.ones(3))


@pytest.mark.parametrize("fp16", [True, False])
def test_a_loss_that_is_not_a_number_stops_at_once(tmp_path, fp16):
    """It is no overflow, which a smaller scale would mend."""
    run = prepared(tmp_path)
    run.learner.optimizer = run.learner.new_optimizer(run.trainable, SETTINGS, fp16)
    before = run.weights()

    def losses(part: slice) -> torch.Tensor:
        rows = torch.tensor([1.0, math.nan])[part]
        return rows * run.trainable[0].sum()

    with pytest.raises(FloatingPointError, match="the loss is nan: nothing was applied"):
        run.descend(losses, 2, "thing")
    assert largest_difference(run.weights().values, before.values) == 0
    assert run.learner.optimizer.overflows == 0


def test_a_replay_that_is_not_a_number_fails_the_check(tmp_path):
    run = prepared(tmp_path, chain={"steps": 4, "kernel": {"name": "ddim", "eta": 1.0}})
    rollout = run.collect(4, 4)

    def ratio(new, old, x):
        found = log_ratio(new, old, x, reduce="sum")
        return torch.where(torch.arange(len(found)) == 1, math.nan, found)

    with pytest.raises(ConfigError, match=r"replay is not exact: at step 0 .* is NaN"):
        run.verified(rollout, ratio, 0.02)
    run.replay_check.again = None  # control: it is the NaN
    assert run.verified(rollout, lambda *a: log_ratio(*a, reduce="sum"), 0.02) is rollout


def test_a_step_that_acted_with_a_number_and_scores_none_is_named(tmp_path):
    run = prepared(tmp_path, chain={"steps": 4, "kernel": {"name": "ddim", "eta": 1.0}})
    rollout = run.collect(4, 4)
    mean = rollout.trajectory.mean.clone()
    mean[3, 2] = math.nan
    broken = replace(rollout, trajectory=replace(rollout.trajectory, mean=mean))
    with pytest.raises(ConfigError, match="at step 2 the log-ratio of unchanged weights is NaN"):
        run.verified(broken, lambda *a: log_ratio(*a, reduce="sum"), 0.02)

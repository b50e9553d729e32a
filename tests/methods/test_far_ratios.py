"""Ratios that fp32 can't hold: a clipped row has gradient 0 in every loss of the PPO family."""

from functools import partial

import pytest
import torch

from genpolicy.chain import Gaussian
from genpolicy.learning.objective import Scored, clipped_surrogate
from genpolicy.methods.dppo import DPPO
from genpolicy.methods.flow_grpo import FlowGRPO
from genpolicy.methods.grpo_guard import GRPOGuard
from genpolicy.methods.parts.ppo import ppo_loss
from genpolicy.methods.reinflow import ReinFlow

LOSSES = {
    "flow_grpo": FlowGRPO(clip=0.2, reduce="sum").loss,
    "grpo_guard": GRPOGuard(clip=0.2, reduce="sum").loss,
    "dppo": DPPO(clip=0.2, reduce="sum").loss,
    "reinflow": ReinFlow(clip=0.2, reduce="sum", entropy=0.0).loss,
    "ppo": partial(ppo_loss, clip=0.2),
}
DIMS = 5
FAR = 19.5
"""The noise of every dim for a log-ratio of 95: five times (19.5 - .5)."""


def far_and_near():
    """Three rows whose means moved by one std in every dim, which are to be left alone, and two
    that hardly moved, to learn from. The log-ratios are 95 with A > 0, -100 with A < 0, 95 with
    A = 0, and about 0 with either sign.
    """
    old = Gaussian(torch.zeros(5, DIMS), torch.ones(5, 1))
    moved = torch.tensor([1.0, 1.0, 1.0, 0.01, 0.01])
    mean = moved[:, None].repeat(1, DIMS).requires_grad_()
    noise = torch.tensor([FAR, -FAR, FAR, 0.5, 0.5])
    advantage = torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0])
    x = noise[:, None].expand(5, DIMS).clone()
    step = Scored(
        new=Gaussian(mean, old.std),
        old=old,
        reference=None,
        x=x,
        advantage=advantage,
        std=torch.ones(5),
        dt=0.1,
        gain=1.0,
        index=0,
        steps=1,
    )
    return step, mean


@pytest.mark.parametrize("name", LOSSES)
def test_a_clipped_row_has_gradient_zero_however_far_the_policy_has_gone(name):
    step, mean = far_and_near()
    loss, metrics = LOSSES[name](step)
    assert loss.isfinite().all()
    loss.sum().backward()
    assert mean.grad.isfinite().all()
    assert (mean.grad[:3] == 0).all(), "exactly"
    assert (mean.grad[3:].abs().sum(1) > 0).all(), "the others learn"
    for metric, values in metrics.items():
        assert values.isfinite().all(), metric
    assert metrics["clip_fraction"].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_control_the_maximum_of_both_branches_has_no_gradient_there():
    log_rho = torch.tensor([95.0]).requires_grad_()
    ratio = log_rho.exp()
    torch.maximum(-ratio, -ratio.clamp(0.8, 1.2)).sum().backward()
    assert log_rho.grad.isnan().all()


def test_the_surrogate_is_the_maximum_of_both_branches_to_the_bit_with_its_gradient():
    generator = torch.Generator().manual_seed(0)
    log_rho = torch.randn(1000, generator=generator)
    advantage = torch.randn(1000, generator=generator)
    found = log_rho.clone().requires_grad_()
    clipped_surrogate(found, advantage, 0.2).loss.sum().backward()
    plain = log_rho.clone().requires_grad_()
    ratio = plain.exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
    loss.sum().backward()
    assert torch.equal(clipped_surrogate(log_rho, advantage, 0.2).loss, loss.detach())
    assert torch.equal(found.grad, plain.grad)


def test_a_spoiled_log_ratio_stays_spoiled():
    """A row that is not a number must not pass for one without an advantage."""
    spoiled = torch.tensor([torch.nan, torch.nan])
    assert clipped_surrogate(spoiled, torch.tensor([0.0, 1.0]), 0.2).loss.isnan().all()


def test_an_unclipped_row_whose_ratio_is_infinite_says_so():
    found = clipped_surrogate(torch.tensor([95.0]), torch.tensor([-1.0]), 0.2)
    assert found.loss.isinf().all()
    assert not found.clipped.any()

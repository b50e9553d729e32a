"""Advantages against hand computation."""

import math

import pytest
import torch

from genpolicy.learning.advantage import PromptHistory, group_relative, leave_one_out, z_sum

R = torch.tensor([[0.0, 1.0, 2.0, 1.0], [10.0, 10.0, 10.0, 10.0]], dtype=torch.float64)


def test_group_scale_by_hand():
    std = math.sqrt(0.5)  # biased std of 0, 1, 2, 1
    expected = torch.tensor([-1.0, 0.0, 1.0, 0.0]).double() / (std + 1e-4)
    assert torch.allclose(group_relative(R)[0], expected, atol=1e-12)
    assert torch.equal(group_relative(R)[1], torch.zeros(4).double())


def test_scale_over_all_is_one_divisor_for_every_group():
    everything = R.std(correction=0)
    assert torch.allclose(group_relative(R, "all")[0], torch.tensor([-1.0, 0.0, 1.0, 0.0]).double() / (everything + 1e-4))
    assert not torch.allclose(group_relative(R, "all")[0], group_relative(R, "group")[0])


@pytest.mark.parametrize("advantage", [group_relative, leave_one_out, lambda r: group_relative(r, "none")])
def test_groups_sum_to_zero(advantage):
    rewards = torch.randn(5, 7, dtype=torch.float64)
    assert advantage(rewards).sum(1).abs().max() < 1e-9


def test_unknown_scale_names_the_valid_ones():
    with pytest.raises(ValueError, match="'group', 'all', 'none'"):
        group_relative(R, "batch")


def test_leave_one_out_is_against_the_others():
    rewards = torch.tensor([[1.0, 2.0, 6.0]], dtype=torch.float64)
    assert torch.allclose(leave_one_out(rewards), torch.tensor([[1 - 4.0, 2 - 3.5, 6 - 1.5]]).double())
    with pytest.raises(ValueError, match="at least 2"):
        leave_one_out(torch.zeros(3, 1))


def test_z_sum_ignores_the_scale_of_a_reward():
    a, b = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    assert torch.allclose(z_sum([a, 1000 * b], [1, 1], eps=0), z_sum([a, b], [1, 1], eps=0))
    assert not torch.allclose(group_relative(a + 1000 * b), group_relative(a + b), atol=0.1)


def test_prompt_history_falls_back_to_the_batch_then_uses_the_prompts_own():
    history = PromptHistory(size=4, min_count=3)
    first = torch.tensor([[1.0, 3.0], [5.0, 7.0]], dtype=torch.float64)
    batch = (first - 4.0) / (first.std(correction=0) + 1e-6)
    assert torch.allclose(history(first, ["a", "b"]), batch)
    second = torch.tensor([[2.0, 4.0]], dtype=torch.float64)
    seen = torch.tensor([1.0, 3.0, 2.0, 4.0]).double()
    assert torch.allclose(history(second, ["a"]), (second - 2.5) / (seen.std(correction=0) + 1e-6))


def test_prompt_history_resumes():
    history, other = PromptHistory(), PromptHistory()
    history(R, ["a", "b"])
    other.load_state_dict(history.state_dict())
    assert torch.equal(history(R + 1, ["a", "b"]), other(R + 1, ["a", "b"]))

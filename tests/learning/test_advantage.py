"""Advantages against hand computation."""

import math

import pytest
import torch

from genpolicy.learning.advantage import Advantage, PromptHistory, group_relative, leave_one_out

R = torch.tensor([[0.0, 1.0, 2.0, 1.0], [10.0, 10.0, 10.0, 10.0]], dtype=torch.float64)


def test_group_scale_by_hand():
    std = math.sqrt(0.5)  # biased std of 0, 1, 2, 1
    expected = torch.tensor([-1.0, 0.0, 1.0, 0.0]).double() / (std + 1e-4)
    assert torch.allclose(group_relative(R)[0], expected, atol=1e-12)
    assert torch.equal(group_relative(R)[1], torch.zeros(4).double())


def test_scale_over_all_is_one_divisor_for_every_group():
    everything = R.std(correction=0)
    assert torch.allclose(
        group_relative(R, "all")[0],
        torch.tensor([-1.0, 0.0, 1.0, 0.0]).double() / (everything + 1e-4),
    )
    assert not torch.allclose(group_relative(R, "all")[0], group_relative(R, "group")[0])


@pytest.mark.parametrize(
    "advantage", [group_relative, leave_one_out, lambda r: group_relative(r, "none")]
)
def test_groups_sum_to_zero(advantage):
    rewards = torch.randn(5, 7, dtype=torch.float64)
    assert advantage(rewards).sum(1).abs().max() < 1e-9


def test_unknown_scale_names_the_valid_ones():
    with pytest.raises(ValueError, match="'group', 'all', 'none'"):
        group_relative(R, "batch")


def test_leave_one_out_is_against_the_others():
    rewards = torch.tensor([[1.0, 2.0, 6.0]], dtype=torch.float64)
    assert torch.allclose(
        leave_one_out(rewards), torch.tensor([[1 - 4.0, 2 - 3.5, 6 - 1.5]]).double()
    )
    with pytest.raises(ValueError, match="at least 2"):
        leave_one_out(torch.zeros(3, 1))


def test_z_sum_ignores_the_scale_of_a_reward_and_sum_does_not():
    a, b = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    weights, prompts = {"a": 1.0, "b": 1.0}, ["x", "y", "z"]
    for combine, same in (("z_sum", True), ("sum", False)):
        small = Advantage("group", combine)({"a": a, "b": b}, weights, prompts)
        large = Advantage("group", combine)({"a": a, "b": 1000 * b}, weights, prompts)
        assert torch.allclose(small, large, atol=1e-2) == same


def test_advantages_are_bounded_and_weighted():
    rewards = {"a": torch.tensor([[0.0] * 99 + [1.0]]).double()}
    assert Advantage("group", bound=5.0)(rewards, {"a": 1.0}, ["x"]).max() == 5.0
    assert Advantage("none")(rewards, {"a": 2.0}, ["x"]).max() == pytest.approx(2 * 0.99)
    assert torch.equal(
        Advantage("leave_one_out")(rewards, {"a": 1.0}, ["x"]), leave_one_out(rewards["a"])
    )


@pytest.mark.parametrize("wrong", [{"kind": "batch"}, {"combine": "mean"}])
def test_unknown_settings_name_the_valid_ones(wrong):
    with pytest.raises(ValueError, match="valid are"):
        Advantage(**wrong)


@pytest.mark.parametrize("combine", ["sum", "z_sum"])
def test_history_of_an_advantage_resumes(combine):
    parts = {name: torch.randn(2, 16, dtype=torch.float64) for name in "ab"}
    one, two = Advantage("prompt_history", combine), Advantage("prompt_history", combine)
    one(parts, {"a": 1.0, "b": 1.0}, ["x", "y"])
    two.load_state_dict(one.state_dict())
    again = ({k: v + 1 for k, v in parts.items()}, {"a": 1.0, "b": 1.0}, ["x", "y"])
    resumed, uninterrupted, fresh = (
        two(*again),
        one(*again),
        Advantage("prompt_history", combine)(*again),
    )
    assert torch.equal(resumed, uninterrupted)
    assert not torch.allclose(resumed, fresh)


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

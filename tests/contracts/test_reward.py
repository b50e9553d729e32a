"""Rewards: what they may return, and what they can't do to each other."""

import pytest
import torch
from torch import Tensor

from genpolicy.contracts.reward import RewardError, WeightedRewards
from genpolicy.contracts.task import Context

PROMPTS = ("a", "b", "c")


def brightness(outputs: Tensor, context: Context) -> Tensor:
    return outputs.flatten(1).mean(1)


def parts(*rewards) -> dict[str, Tensor]:
    """The parts of the rewards, by their numbers, on three pictures."""
    outputs = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    named = {str(i): (reward, 1.0) for i, reward in enumerate(rewards)}
    return WeightedRewards(named).parts(outputs, Context(PROMPTS))


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ((torch.ones(3), {"seen": 1}), "a tuple of Tensor, dict"),
        ((torch.ones(3), torch.ones(3)), "a tuple of Tensor"),
        ([1.0, None, 2.0], "a list of float, NoneType"),
        ({"score": torch.ones(3)}, "a dict"),
        (None, "None"),
        ("good", "a str"),
    ],
)
def test_what_is_no_number_per_output_is_one_sentence(returned, said) -> None:
    with pytest.raises(RewardError, match=f"reward 0 returned {said}; it must return") as caught:
        parts(lambda outputs, context: returned)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("returned", [[1, 2, 3], (0.5, 1.0, 2.0), torch.ones(3, dtype=torch.bool)])
def test_numbers_are_taken_as_they_come(returned) -> None:
    found = parts(lambda outputs, context: returned)["0"]
    assert found.dtype == torch.float64
    assert found.tolist() == [float(value) for value in returned]


def test_a_reward_runs_without_gradients() -> None:
    weight, seen = torch.nn.Parameter(torch.ones(())), []

    def learned(outputs: Tensor, context: Context) -> Tensor:
        seen.append((torch.is_grad_enabled(), (weight * outputs).requires_grad))
        return (weight * outputs).flatten(1).mean(1)

    with torch.enable_grad():
        parts(learned)
    assert seen == [(False, False)]


def test_a_reward_that_writes_changes_nothing_for_the_next_one() -> None:
    def black(outputs: Tensor, context: Context) -> Tensor:
        context.prompts.clear()  # type: ignore[attr-defined]
        return outputs.zero_().flatten(1).mean(1)

    prompts = []

    def seen(outputs: Tensor, context: Context) -> Tensor:
        prompts.append(tuple(context.prompts))
        return brightness(outputs, context)

    found = parts(black, seen)
    assert torch.equal(found["1"], parts(brightness)["0"])
    assert prompts == [PROMPTS]
    assert found["0"].tolist() == [0, 0, 0], "control: it wrote"


def test_pictures_are_shown_as_they_were_drawn_whatever_a_reward_writes() -> None:
    outputs = torch.rand(3, 3, 4, 4)
    kept = outputs.clone()
    reward = lambda outputs, context: outputs.zero_().flatten(1).mean(1)  # noqa: E731
    WeightedRewards({"black": (reward, 1.0)}).parts(outputs, Context(PROMPTS))
    assert torch.equal(outputs, kept)

"""Generalised advantage estimation over decisions,
against numbers worked out by hand and known mistakes.
"""

import pytest
import torch
from torch import Tensor

from genpolicy.learning.advantage import discounted, gae

GAMMA, LAM = 0.9, 0.8


def fp64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def flags(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)


def wrong(mistake: str, rewards, executed, values, next_values, terminated, last, gamma, lam):
    """The same sum with one of the mistakes that are made in public code."""
    factor = (
        torch.full_like(values, gamma)
        if mistake == "gamma, not gamma^n"
        else gamma ** executed.double()
    )
    bootstrap = (
        torch.ones_like(values) if mistake == "bootstrap at the end" else (~terminated).double()
    )
    ended = terminated if mistake == "trace through the cut" else last
    if mistake == "the next episode's first value":
        next_values = torch.where(last, values.roll(-1), next_values)
    if mistake == "rewards of a chunk undiscounted":
        rewards = torch.stack(
            [rewards.sum(1), *[torch.zeros(len(rewards)).double()] * (rewards.shape[1] - 1)], 1
        )
    delta = discounted(rewards, gamma) + factor * next_values * bootstrap - values
    advantage, following = torch.zeros_like(delta), 0.0
    for row in reversed(range(len(delta))):
        following = float(delta[row]) + float(factor[row]) * lam * float(~ended[row]) * following
        advantage[row] = following
    return advantage


# Five single steps to the end of an episode.
# delta_h = r_h + .9 V_{h+1} - V_h, A_h = delta_h + .72 A_{h+1}.
ONE = {
    "rewards": fp64(1, 0, 2, 0, 1)[:, None],
    "executed": torch.ones(5, dtype=torch.long),
    "values": fp64(0.5, 0.4, 0.3, 0.2, 0.1),
    "next_values": fp64(0.4, 0.3, 0.2, 0.1, 99.0),
    "terminated": flags(0, 0, 0, 0, 1),
    "last": flags(0, 0, 0, 0, 1),
}
ONE_EXPECTED = fp64(1.941799424, 1.5024992, 2.26736, 0.538, 0.9)

# Two episodes: one cut after two steps in a state of value .7, one of two steps that ends.
#   A_1 = 1 + .9 .7 - .4 = 1.23             A_0 = 0 + .9 .4 - .5 + .72 1.23 = .7456
#   A_3 = 3 - .2 = 2.8                      A_2 = 0 + .9 .2 - .3 + .72 2.8 = 1.896
TWO = {
    "rewards": fp64(0, 1, 0, 3)[:, None],
    "executed": torch.ones(4, dtype=torch.long),
    "values": fp64(0.5, 0.4, 0.3, 0.2),
    "next_values": fp64(0.4, 0.7, 0.2, 99.0),
    "terminated": flags(0, 0, 0, 1),
    "last": flags(0, 1, 0, 1),
}
TWO_EXPECTED = fp64(0.7456, 1.23, 1.896, 2.8)

# Chunks of up to 3: n = 3, then n = 2 where the episode is cut.
#   delta_1 = 1 + .9 2 + .81 .7 - .4 = 2.967
#   delta_0 = 1 + .9 0 + .81 2 + .729 .4 - .5 = 2.4116,   A_0 = 2.4116 + .729 .8 2.967 = 4.1419544
CHUNKS = {
    "rewards": torch.tensor([[1.0, 0.0, 2.0], [1.0, 2.0, 0.0]], dtype=torch.float64),
    "executed": torch.tensor([3, 2]),
    "values": fp64(0.5, 0.4),
    "next_values": fp64(0.4, 0.7),
    "terminated": flags(0, 0),
    "last": flags(0, 1),
}
CHUNKS_EXPECTED = fp64(4.1419544, 2.967)


@pytest.mark.parametrize(
    ("episodes", "expected"), [(ONE, ONE_EXPECTED), (TWO, TWO_EXPECTED), (CHUNKS, CHUNKS_EXPECTED)]
)
def test_hand_computed_episodes(episodes, expected):
    assert torch.allclose(gae(**episodes, gamma=GAMMA, lam=LAM), expected, atol=1e-12)
    assert torch.allclose(wrong("none", **episodes, gamma=GAMMA, lam=LAM), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("mistake", "episodes", "expected"),
    [
        ("bootstrap at the end", ONE, ONE_EXPECTED),
        ("trace through the cut", TWO, TWO_EXPECTED),
        ("the next episode's first value", TWO, TWO_EXPECTED),
        ("gamma, not gamma^n", CHUNKS, CHUNKS_EXPECTED),
        ("rewards of a chunk undiscounted", CHUNKS, CHUNKS_EXPECTED),
    ],
)
def test_control_a_known_mistake_gives_other_numbers(mistake, episodes, expected):
    assert (wrong(mistake, **episodes, gamma=GAMMA, lam=LAM) - expected).abs().max() > 0.05


def random_episodes(lengths: list[int], chunk: int = 1):
    """Episodes of so many decisions, the last of each cut or ended at random."""
    generator = torch.Generator().manual_seed(3)
    rows = sum(lengths)
    last = torch.zeros(rows, dtype=torch.bool)
    last[torch.tensor(lengths).cumsum(0) - 1] = True
    terminated = last & (torch.rand(rows, generator=generator) < 0.5)
    executed = torch.randint(1, chunk + 1, (rows,), generator=generator)
    rewards = torch.randn(rows, chunk, generator=generator).double() * (
        torch.arange(chunk) < executed[:, None]
    )
    values, next_values = (torch.randn(rows, generator=generator).double() for _ in range(2))
    return {
        "rewards": rewards,
        "executed": executed,
        "values": values,
        "next_values": torch.where(last, next_values, values.roll(-1)),
        "terminated": terminated,
        "last": last,
    }


def test_episodes_together_are_episodes_apart():
    lengths = [3, 1, 5, 2, 4]
    episodes = random_episodes(lengths, chunk=3)
    together = gae(**episodes, gamma=GAMMA, lam=LAM)
    starts = [sum(lengths[:e]) for e in range(len(lengths))]
    apart = [
        gae(
            **{name: v[start : start + length] for name, v in episodes.items()},
            gamma=GAMMA,
            lam=LAM,
        )
        for start, length in zip(starts, lengths, strict=True)
    ]
    assert torch.allclose(together, torch.cat(apart), atol=1e-12)
    through = wrong("trace through the cut", **episodes, gamma=GAMMA, lam=LAM)
    assert not torch.allclose(through, torch.cat(apart), atol=1e-3)


@pytest.mark.parametrize("ended", [False, True])
def test_a_chunk_is_its_single_steps_when_the_trace_does_not_fade(ended):
    """The values in between telescope away with lam 1, whatever they are;
    the reward comes with the last step.
    """
    n, values, final = 4, torch.randn(4).double(), fp64(0.6)
    rewards = fp64(0, 0, 0, 1.5)
    last = flags(0, 0, 0, 1)
    single = gae(
        rewards[:, None],
        torch.ones(n, dtype=torch.long),
        values,
        torch.cat([values[1:], final]),
        last & ended,
        last,
        GAMMA,
        1.0,
    )
    chunk = {
        "rewards": rewards[None],
        "executed": torch.tensor([n]),
        "values": values[:1],
        "next_values": final,
        "terminated": flags(ended),
        "last": flags(1),
        "gamma": GAMMA,
        "lam": 1.0,
    }
    assert torch.allclose(gae(**chunk), single[:1], atol=1e-12)
    assert (wrong("rewards of a chunk undiscounted", **chunk) - single[:1]).abs() > 0.05
    if not ended:
        assert (wrong("gamma, not gamma^n", **chunk) - single[:1]).abs() > 0.05


def test_the_ends_of_lambda():
    """lam 0 is the one-step error;
    lam 1 with exact bootstraps is the discounted return minus the value.
    """
    one_step = gae(**ONE, gamma=GAMMA, lam=0.0)
    assert torch.allclose(one_step, fp64(0.86, -0.13, 1.88, -0.11, 0.9), atol=1e-12)
    returns = fp64(1 + 0.81 * 2 + 0.6561, 0.9 * 2 + 0.729, 2 + 0.81, 0.9, 1)
    assert torch.allclose(gae(**ONE, gamma=GAMMA, lam=1.0), returns - ONE["values"], atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_the_ends_of_gamma(gamma):
    advantage = gae(**CHUNKS, gamma=gamma, lam=LAM)
    second = (3 + 0.7 if gamma else 1) - 0.4
    first = (3 + 0.4 + LAM * second if gamma else 1) - 0.5
    assert torch.allclose(advantage, fp64(first, second), atol=1e-12)


def test_prompts_are_episodes_of_one_decision():
    rewards, values, ended = (
        torch.randn(6, 1).double(),
        torch.randn(6).double(),
        torch.ones(6, dtype=torch.bool),
    )
    advantage = gae(
        rewards, torch.ones(6, dtype=torch.long), values, values.roll(-1), ended, ended, 0.99, 0.95
    )
    assert torch.allclose(advantage, rewards[:, 0] - values, atol=1e-12)

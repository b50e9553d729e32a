"""Targets of critics: Bellman targets over chunks, expectiles, Cal-QL's bound; and IQL made of
them, on a chain of states whose values are worked out by dynamic programming.
"""

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from genpolicy.learning.critic import (
    Critic,
    bellman_target,
    calibrated,
    conservative,
    expectile_loss,
    pessimistic,
    polyak,
)

GAMMA = 0.9


def flags(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)


# -- targets ---------------------------------------------------------------------------------------


def test_a_chunk_is_the_n_steps_it_is_made_of():
    rewards, value = torch.randn(6, 4).double(), torch.randn(6).double()
    executed = torch.tensor([1, 2, 3, 4, 4, 2])
    terminated = flags(0, 0, 1, 0, 1, 1)
    single = value.clone()
    for step in reversed(range(4)):  # from the last step that was carried out to the first
        ends = terminated & (executed == step + 1)
        found = bellman_target(
            rewards[:, step : step + 1], torch.ones_like(executed), ends, single, GAMMA
        )
        single = torch.where(step < executed, found, single)
    assert torch.allclose(
        bellman_target(rewards, executed, terminated, value, GAMMA), single, rtol=1e-12
    )


def test_a_single_step_is_discounted_by_gamma():
    """Also of a policy that plans chunks of 4; gamma^4, as in public code, is another number."""
    args = torch.tensor([[2.0]]), torch.tensor([1]), flags(0), torch.tensor([10.0])
    assert float(bellman_target(*args, GAMMA)) == pytest.approx(2 + 9)
    assert float(bellman_target(*args, GAMMA**4)) != pytest.approx(2 + 9, abs=1)
    in_a_chunk = bellman_target(torch.tensor([[2.0, 0.0, 0.0, 0.0]]), *args[1:], GAMMA)
    assert float(in_a_chunk) == pytest.approx(2 + 9)


def test_nothing_comes_after_the_end_and_something_after_a_cut():
    rewards = torch.tensor([[1.0, 1.0, torch.nan, 100.0]]).expand(2, 4)
    value = torch.tensor(
        [[torch.nan, 10.0], [torch.inf, 20.0]]
    )  # what is seen after an end means nothing
    target = bellman_target(rewards, torch.tensor([2, 2]), flags(1, 0), value, GAMMA)
    assert torch.allclose(target, torch.tensor([[1.9, 1.9 + 8.1], [1.9, 1.9 + 16.2]]))


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_ten_states_to_the_goal(chunk):
    """V(s) = .9^(9-s) whatever the chunk;
    without (1 - terminated) it is more than the 1 that can be had.
    """
    states, goal = torch.arange(10), 10
    executed = (goal - states).clamp(max=chunk)
    after = states + executed
    rewards = torch.zeros(10, chunk)
    rewards[after == goal, executed[after == goal] - 1] = 1.0

    def value(terminated):
        found = torch.zeros(11)
        for _ in range(60):
            found[:10] = bellman_target(rewards, executed, terminated, found[after], GAMMA)
            found[10] = found[9]  # what a network says where nothing was learned
        return found[:10]

    assert torch.allclose(value(after == goal), GAMMA ** (9 - states.float()))
    assert float(value(torch.zeros(10, dtype=torch.bool)).max()) > 1.5


# -- expectiles ------------------------------------------------------------------------------------


def test_expectile_by_hand():
    error = torch.tensor([2.0, -1.0, 0.0])
    assert torch.allclose(expectile_loss(error, 0.7), torch.tensor([0.7 * 4, 0.3 * 1, 0.0]))
    assert torch.allclose(expectile_loss(error, 0.5), error**2 / 2)


def expectile_of(one: Tensor, share: float, other: Tensor, level: float) -> Tensor:
    """The expectile of two values, the first with probability ``share``:
    m where sum p |level - 1{x < m}| (x - m) = 0.
    """
    under = (one < other).double()  # the first is the lesser one
    low = share * (under * (1 - level) + (1 - under) * level)
    high = (1 - share) * (under * level + (1 - under) * (1 - level))
    return (low * one + high * other) / (low + high)


def test_its_minimum_is_the_expectile():
    one, other = torch.tensor(1.0).double(), torch.tensor(3.0).double()
    for level in (0.1, 0.5, 0.9):
        m = expectile_of(one, 0.25, other, level).requires_grad_()
        loss = 0.25 * expectile_loss(one - m, level) + 0.75 * expectile_loss(other - m, level)
        assert abs(float(torch.autograd.grad(loss, m)[0])) < 1e-12
    assert float(expectile_of(one, 0.25, other, 0.5)) == 2.5


# -- IQL on a chain of states ----------------------------------------------------------------------
#
# Five states, the goal behind the last. "left" goes back (or stays at 0), "right" goes on, and
# "leap" goes to the goal at once but is in no data. The data goes right 3 of 4 times.

STATES, LEFT, RIGHT, ACTIONS = 5, 0, 1, 3
S = torch.arange(STATES).repeat_interleave(4)
A = torch.tensor([LEFT, RIGHT, RIGHT, RIGHT]).repeat(STATES)
AFTER = torch.where(A == LEFT, (S - 1).clamp(min=0), S + 1)
END = AFTER == STATES
REWARD = END.float()[:, None]


def fixed_point(level: float) -> Tensor:
    """V(s) = the expectile over the data's actions of r + gamma V(s'), [STATES] in fp64."""
    value = torch.zeros(STATES + 1, dtype=torch.float64)
    for _ in range(200):
        left = GAMMA * value[(torch.arange(STATES) - 1).clamp(min=0)]
        right = GAMMA * value[1:].clone()
        right[-1] = 1.0
        value[:STATES] = expectile_of(left, 0.25, right, level)
    return value[:STATES]


def one_hot(index: Tensor, size: int) -> Tensor:
    return torch.nn.functional.one_hot(index.clamp(max=size - 1), size).float()


def iql(
    level: float, steps: int = 900, sign: float = 1.0, hidden: int = 0
) -> tuple[Tensor, Critic]:
    """V [STATES] and Q after learning. Without hidden layers both are tables."""
    torch.manual_seed(0)
    layers = 1 if hidden else 0
    pairs = STATES * ACTIONS
    value = Critic(STATES, hidden=hidden, layers=layers)
    if hidden:
        seen, done, q = (
            one_hot(S, STATES),
            one_hot(A, ACTIONS),
            Critic(STATES, ACTIONS, 2, hidden, layers),
        )
    else:
        seen, done, q = one_hot(S * ACTIONS + A, pairs), None, Critic(pairs, members=2, layers=0)
    here, after = one_hot(S, STATES), one_hot(AFTER, STATES)
    slow = deepcopy(q)
    optimiser = torch.optim.Adam([*value.parameters(), *q.parameters()], 0.02)
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, steps)
    for _ in range(steps):
        with torch.no_grad():
            known = pessimistic(slow(seen, done), 0.0)
            target = bellman_target(REWARD, torch.ones_like(S), END, value(after)[0], GAMMA)
        loss = (
            expectile_loss(sign * (known - value(here)[0]), level).mean()
            + q.loss(seen, done, target).mean()
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
        polyak(slow, q, 0.2)
    with torch.no_grad():
        return value(torch.eye(STATES))[0].double(), q


OPTIMAL = GAMMA ** torch.arange(STATES - 1, -1, -1).double()


def test_the_reference_itself():
    """The reference follows from linear algebra: V = P (r + gamma V) of the data's policy;
    and the best that its actions can do.
    """
    move = torch.zeros(STATES, STATES).double()
    for s in range(STATES):
        move[s, max(s - 1, 0)] += 0.25
        if s + 1 < STATES:
            move[s, s + 1] += 0.75
    reward = torch.tensor([0, 0, 0, 0, 0.75]).double()
    sarsa = torch.linalg.solve(torch.eye(STATES).double() - GAMMA * move, reward)
    assert torch.allclose(fixed_point(0.5), sarsa, atol=1e-6)
    assert torch.allclose(fixed_point(1 - 1e-9), OPTIMAL, atol=1e-6)
    assert float((OPTIMAL - sarsa).min()) > 0.05, (
        "they must differ for the tests below to say anything"
    )


@pytest.mark.parametrize("level", [0.5, 0.7, 0.99])
def test_iql_finds_the_expectile_over_the_data(level):
    """.5: what the data's policy gets; .99:
    nearly the best of its actions, and nothing of the leap's 1 from anywhere.
    """
    value, q = iql(level)
    assert torch.allclose(value, fixed_point(level), atol=0.01)
    with torch.no_grad():
        table = q(torch.eye(STATES * ACTIONS)).mean(0).view(STATES, ACTIONS).double()
    assert table[:-1, RIGHT] == pytest.approx(GAMMA * fixed_point(level)[1:], abs=0.01)
    assert float(table[-1, RIGHT]) == pytest.approx(1.0, abs=0.01)
    if level == 0.99:
        assert torch.allclose(value, OPTIMAL, atol=0.03)
        assert float((value - fixed_point(0.5)).min()) > 0.04


def test_the_expectile_has_a_side():
    """Prediction - target instead of target - prediction finds nearly the worst
    of the data's actions.
    """
    value, _ = iql(0.9, sign=-1.0)
    assert torch.allclose(value, fixed_point(0.1), atol=0.05)
    assert float((OPTIMAL - value).min()) > 0.5


def test_iql_with_networks():
    value, _ = iql(0.9, hidden=32)
    assert torch.allclose(value, fixed_point(0.9), atol=0.03)
    assert not torch.allclose(value, fixed_point(0.5), atol=0.03)


# -- conservatism ----------------------------------------------------------------------------------


def test_the_bound_is_for_the_policys_actions_only():
    data, policy = torch.tensor([[0.0, 1.0]]), torch.tensor([[[-3.0, 2.0], [0.5, 4.0]]])
    returns = torch.tensor([1.0, 3.0])
    assert calibrated(policy, returns[:, None]).tolist() == [[[1.0, 2.0], [3.0, 4.0]]]

    def by_hand(data, policy):
        every = torch.cat([data[..., None], policy], -1)
        return every.exp().mean(-1).log() - data

    bounded = torch.maximum(policy, returns[:, None])
    assert torch.allclose(conservative(data, policy, returns), by_hand(data, bounded), atol=1e-6)
    assert torch.allclose(conservative(data, policy), by_hand(data, policy), atol=1e-6)
    everywhere = by_hand(torch.maximum(data, returns), bounded)
    assert not torch.allclose(conservative(data, policy, returns), everywhere, atol=0.1)


def test_what_is_below_the_datas_return_is_not_pushed_down():
    data, policy = (
        torch.zeros(2, 1),
        torch.tensor([[[-1.0, 2.0]], [[-1.0, 2.0]]], requires_grad=True),
    )
    (plain,) = torch.autograd.grad(conservative(data, policy).sum(), policy)
    (bound,) = torch.autograd.grad(conservative(data, policy, torch.ones(1)).sum(), policy)
    assert (plain > 0).all(), "CQL pushes all"
    assert bound[..., 0].eq(0).all()
    assert (bound[..., 1] > 0).all()


def test_it_has_a_least_value():
    """However far the data's action is raised: -log of how many actions are compared."""
    assert float(conservative(torch.tensor([[50.0]]), torch.zeros(1, 1, 3))) == pytest.approx(
        -torch.tensor(4.0).log()
    )


# -- slow copies -----------------------------------------------------------------------------------


def test_polyak_is_a_weighted_mean():
    online, target = Critic(3, 2, 2, 8), Critic(3, 2, 2, 8)
    before = [p.detach().clone() for p in target.parameters()]
    polyak(target, online, 0.25)
    for old, new, fast in zip(before, target.parameters(), online.parameters(), strict=True):
        assert torch.allclose(new, 0.75 * old + 0.25 * fast, atol=1e-7)
        assert not torch.allclose(
            new, 0.25 * old + 0.75 * fast, atol=1e-4
        )  # control: the other way round
        assert not new.grad_fn
    polyak(target, online, 1.0)
    assert all(
        torch.equal(a, b) for a, b in zip(target.parameters(), online.parameters(), strict=True)
    )

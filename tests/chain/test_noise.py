"""Noise: a pure function of (seed, iteration, group, member, k)."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from genpolicy.chain import Noise
from genpolicy.chain.noise import PRIOR

SHAPE = (4, 8)
GROUPS = torch.tensor([3, 7, 11])


def noise(seed: int = 0, iteration: int = 0, members: int = 4) -> Noise:
    return Noise.rows(seed, iteration, GROUPS, members)


def one(seed: int, iteration: int, group: int, member: int, k: int, size: int = 32) -> Tensor:
    return Noise(seed, iteration, torch.tensor([group]), torch.tensor([member]))(k, (size,))[0]


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1])


@pytest.mark.parametrize("k", [PRIOR, 0, 5])
def test_same_names_same_draw(k: int) -> None:
    assert torch.equal(noise()(k, SHAPE), noise()(k, SHAPE))
    assert noise()(k, SHAPE).dtype == torch.float32


def row_by_row(noise: Noise, k: int) -> Tensor:
    """The definition: a new generator for every row."""
    decision = torch.zeros_like(noise.group) if noise.decision is None else noise.decision
    names = torch.stack([noise.member + 1, noise.group, (decision << 32) + k + 1], 1).numpy()
    key = np.array([noise.seed % 2**64, noise.iteration % 2**64], dtype=np.uint64)
    rows = []
    for name in names.astype(np.uint64):
        counter = np.array([0, *name], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
        rows.append(generator.standard_normal(SHAPE, dtype=np.float32))
    return torch.as_tensor(np.stack(rows))


@pytest.mark.parametrize("k", [PRIOR, 0, 5])
def test_every_row_is_a_generator_of_its_own_to_the_bit(k: int) -> None:
    plain = noise(seed=-3, iteration=2**40)
    later = plain.at(torch.arange(len(plain)) * 1000)
    for names in (plain, later, later.fan(3), later.trunk(4), later[::5], noise(members=1)):
        assert torch.equal(names(k, SHAPE), row_by_row(names, k))
    assert not torch.equal(later(k, SHAPE), row_by_row(later, k + 1))  # control: the step matters


def test_global_generators_neither_matter_nor_move() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = noise()(0, SHAPE)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(noise()(0, SHAPE), first)


@pytest.mark.parametrize(
    "index", [slice(5, 6), slice(2, 9), slice(None, None, 4), [11, 0, 7, 7]], ids=str
)
def test_any_subset_and_order_of_rows(index: slice | list[int]) -> None:
    rows = torch.tensor(index) if isinstance(index, list) else index
    assert torch.equal(noise()[rows](2, SHAPE), noise()(2, SHAPE)[rows])
    assert len(noise()[rows]) == len(noise()(2, SHAPE)[rows])


def test_control_a_shared_stream_depends_on_the_batch() -> None:
    together = torch.randn(12, *SHAPE, generator=torch.Generator().manual_seed(0))
    alone = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(alone[0], together[5])


def test_order_of_steps_does_not_matter() -> None:
    forward = {k: noise()(k, SHAPE) for k in (PRIOR, 0, 1, 2)}
    backward = {k: noise()(k, SHAPE) for k in (2, 1, 0, PRIOR)}
    assert all(torch.equal(forward[k], backward[k]) for k in forward)


def test_a_longer_event_begins_with_the_shorter_one() -> None:
    """A row is one stream: nothing but its own name decides it."""
    assert torch.equal(noise()(0, (2, 8)), noise()(0, (4, 8))[:, :2])


def test_every_name_has_its_own_draw() -> None:
    names = list(product((0, 1, 2), repeat=4))
    draws = {tuple(one(*name, k, size=2).tolist()) for name in names for k in (PRIOR, 0, 1)}
    assert len(draws) == 3**5


def test_swapping_two_names_is_another_draw() -> None:
    name = [1, 2, 3, 4, 5]
    draws = {tuple(one(*name, size=2).tolist())}
    for i in range(5):
        for j in range(i):
            swapped = list(name)
            swapped[i], swapped[j] = swapped[j], swapped[i]
            draws.add(tuple(one(*swapped, size=2).tolist()))
    assert len(draws) == 11


def test_control_adding_names_up_collides() -> None:
    def additive(seed: int, member: int) -> Tensor:
        return torch.randn(32, generator=torch.Generator().manual_seed(seed + member))

    assert torch.equal(additive(1, 0), additive(0, 1))
    assert not torch.equal(one(1, 0, 0, 0, 0), one(0, 0, 0, 1, 0))
    assert abs(correlation(one(1, 0, 0, 0, 0, 10_000), one(0, 0, 0, 1, 0, 10_000))) < 0.04


@pytest.mark.parametrize("axis", ["seed", "iteration", "group", "member", "k"])
def test_neighbouring_names_are_independent(axis: str) -> None:
    """|r| of 10^4 pairs is under .04 (4 standard errors) for neighbours along every axis."""
    axes = ["seed", "iteration", "group", "member", "k"]
    name = dict.fromkeys(axes, 1)
    for other in (0, 2, 3):
        neighbour = name | {axis: other}
        assert (
            abs(correlation(one(*name.values(), 10_000), one(*neighbour.values(), 10_000))) < 0.04
        )


@pytest.mark.parametrize("axis", range(5))
def test_neighbouring_names_share_no_stretch_of_the_stream(axis: int) -> None:
    """A counter that is counted up where the generator itself counts
    gives the same numbers, shifted.
    """
    name = [1, 1, 1, 1, 1]
    neighbour = [v + (i == axis) for i, v in enumerate(name)]
    ours, theirs = (set(one(*n, size=1000).tolist()) for n in (name, neighbour))
    assert len(ours & theirs) <= 3


def test_control_counting_in_the_generators_own_word_shifts_the_stream() -> None:
    def low_word(member: int) -> set[float]:
        generator = np.random.Generator(np.random.Philox(key=[1, 1], counter=[member, 0, 1, 1]))
        return set(generator.standard_normal(1000, dtype=np.float32).tolist())

    assert len(low_word(1) & low_word(2)) > 900


def test_a_row_is_standard_normal() -> None:
    draw = one(0, 0, 0, 0, 0, 50_000)
    assert kstest(draw.double().numpy(), "norm").pvalue > 1e-3
    assert abs(float(draw.mean())) < 0.02
    assert abs(float(draw.std()) - 1) < 0.02
    assert abs(correlation(draw[:-1], draw[1:])) < 0.02


@pytest.mark.parametrize("axis", [0, 1, 2, 3, 4])
def test_across_names_the_draws_are_standard_normal(axis: int) -> None:
    """The first number of 2000 consecutive names along each axis:
    a counter must not show through.
    """
    first = torch.cat(
        [one(*[i if a == axis else 0 for a in range(5)], size=1) for i in range(2000)]
    )
    assert kstest(first.double().numpy(), "norm").pvalue > 1e-3
    assert abs(correlation(first[:-1], first[1:])) < 0.09


def test_the_trunk_of_a_group_is_nobodys_own() -> None:
    trunk = noise().trunk(4)
    assert len(trunk) == 3
    assert torch.equal(trunk.group, GROUPS)
    for k in (PRIOR, 0):
        shared, own = trunk(k, SHAPE), noise()(k, SHAPE)
        assert not (shared[:, None] == own.unflatten(0, (3, 4))).any()
        assert not torch.equal(shared[0], shared[1])
    assert torch.equal(noise()[4:8].trunk(4)(0, SHAPE), trunk(0, SHAPE)[1:2])


@pytest.mark.parametrize("seed", [-1, 2**31, 2**40 + 1, 2**62, 2**63 - 1])
def test_large_and_negative_seeds(seed: int) -> None:
    draw = one(seed, 0, 0, 0, 0, 1000)
    assert torch.equal(draw, one(seed, 0, 0, 0, 0, 1000))
    assert abs(correlation(draw, one(seed % 2**32 ^ 5, 0, 0, 0, 0, 1000))) < 0.13
    assert kstest(draw.double().numpy(), "norm").pvalue > 1e-3


def test_large_groups_and_iterations() -> None:
    big = one(0, 2**40, 2**50, 0, 0)
    assert not torch.equal(big, one(0, 0, 2**50, 0, 0))
    assert not torch.equal(big, one(0, 2**40, 0, 0, 0))


def test_rows_are_group_major() -> None:
    rows = noise(members=2)
    assert rows.group.tolist() == [3, 3, 7, 7, 11, 11]
    assert rows.member.tolist() == [0, 1, 0, 1, 0, 1]
    assert torch.equal(rows(0, SHAPE)[3], one(0, 0, 7, 1, 0).reshape(SHAPE))

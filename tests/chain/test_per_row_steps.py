"""Steps of each row's own, k [B], and noise of each decision's own."""

import numpy as np
import pytest
import torch

from genpolicy.chain import CPS, DDIM, SDE, Chain, FloorStd, Noise
from genpolicy.chain.noise import PRIOR
from genpolicy.contracts.task import Context
from genpolicy.models.toy import Toy
from genpolicy.policy.parts.base import Base
from genpolicy.policy.policy import ChainPolicy
from tests.chain.exact import SCHEDULES, Network, batch

K, ROWS, EVENT = 6, 8, (2, 3)
KERNELS = {"ddim": DDIM(1.0), "floor": FloorStd(DDIM(1.0), 0.1), "cps": CPS(0.5), "sde": SDE(0.7)}
ON = [
    (kernel, schedule)
    for kernel in KERNELS
    for schedule in ("linear", "vp")
    if (kernel, schedule) != ("sde", "vp")
]
WINDOW = (1, 5)
OWN = torch.tensor([1, 4, 2, 2, 3, 4, 1, 3])
"""A step of each row's own, all inside the window."""


def sampled(kernel="ddim", schedule="linear", window=WINDOW):
    schedule, network = SCHEDULES[schedule], Network(EVENT)
    condition, noise = batch(ROWS, 1)
    chain = Chain(schedule, schedule.grid(K), KERNELS[kernel], window)
    return chain, network, chain.sample(network, condition, noise, EVENT)


@pytest.mark.parametrize(("kernel", "schedule"), ON)
def test_rows_at_steps_of_their_own_are_scored_as_row_by_row(kernel, schedule):
    chain, network, trajectory = sampled(kernel, schedule)
    together = chain.transition(network, trajectory, OWN)
    for row, k in enumerate(OWN.tolist()):
        alone = chain.transition(network, trajectory[row : row + 1], k)
        assert torch.allclose(together.mean[row], alone.mean[0], atol=1e-6)
        assert torch.equal(
            together.std.expand_as(together.mean)[row], alone.std.expand_as(alone.mean)[0]
        )
    neighbour = chain.transition(
        network, trajectory, OWN.flip(0)
    )  # control: other steps are other Gaussians
    assert not torch.allclose(together.mean, neighbour.mean, atol=1e-3)


@pytest.mark.parametrize(("kernel", "schedule"), ON)
def test_replay_of_the_same_weights_gives_the_gaussian_that_acted(kernel, schedule):
    chain, network, trajectory = sampled(kernel, schedule)
    again, acted = chain.transition(network, trajectory, OWN), trajectory.acted(OWN)
    assert torch.allclose(again.mean, acted.mean, atol=1e-6)
    assert torch.equal(again.std, acted.std)
    x = trajectory.after(OWN)
    gap = again.log_prob(x, reduce="mean") - acted.log_prob(x, reduce="mean")
    assert gap.abs().max() < 1e-4
    shifted = again.log_prob(trajectory.before(OWN), reduce="mean") - acted.log_prob(
        x, reduce="mean"
    )
    assert (
        shifted.abs().max() > 0.1
    )  # control: the state before the step is not what the step is scored on


def test_acted_before_and_after_pick_each_row_at_its_step():
    _, _, trajectory = sampled()
    for row, k in enumerate(OWN.tolist()):
        assert torch.equal(trajectory.before(OWN)[row], trajectory.before(k)[row])
        assert torch.equal(trajectory.after(OWN)[row], trajectory.after(k)[row])
        assert torch.equal(trajectory.acted(OWN).mean[row], trajectory.acted(k).mean[row])
        assert torch.equal(trajectory.acted(OWN).std[row], trajectory.acted(k).std[row])
        if k + 1 < WINDOW[1]:
            assert torch.equal(trajectory.after(OWN)[row], trajectory.before(k + 1)[row])
    assert trajectory.before(OWN).shape == (ROWS, *EVENT)


def test_an_index_may_repeat_rows_and_take_them_in_any_order():
    chain, network, trajectory = sampled()
    rows, k = torch.tensor([5, 0, 0, 5, 7]), torch.tensor([1, 1, 4, 4, 2])
    picked = chain.transition(network, trajectory[rows], k)
    whole = [chain.transition(network, trajectory, int(step)) for step in k]
    for place, row in enumerate(rows.tolist()):
        assert torch.allclose(picked.mean[place], whole[place].mean[row], atol=1e-6)
    assert torch.equal(
        trajectory[rows].after(k),
        torch.stack([trajectory.after(int(s))[r] for r, s in zip(rows, k, strict=True)]),
    )


def test_gradients_of_rows_at_their_own_steps_are_the_sum_of_single_ones():
    chain, network, trajectory = sampled()
    parameters = list(network.parameters())

    def gradient(rows, k):
        part = trajectory[rows]
        loss = chain.transition(network, part, k).log_prob(part.after(k), reduce="sum").sum()
        return torch.autograd.grad(loss, parameters)

    together = gradient(slice(0, ROWS), OWN)
    single = [gradient(slice(row, row + 1), int(k)) for row, k in enumerate(OWN)]
    for whole, *parts in zip(together, *single, strict=True):
        assert torch.allclose(whole, torch.stack(parts).sum(0), rtol=1e-4, atol=1e-5)


def test_steps_outside_the_window_are_refused():
    chain, network, trajectory = sampled()
    for wrong in (torch.full((ROWS,), 0), torch.full((ROWS,), 5)):
        with pytest.raises(ValueError, match="has no density"):
            chain.transition(network, trajectory, wrong)
    with pytest.raises(ValueError, match="partly inside and partly outside"):
        chain.transition(network, trajectory, torch.where(OWN == 1, 0, OWN))
    for wrong, named in (
        (0, 0),
        (5, 5),
        (torch.where(OWN == 1, 0, OWN), 0),
        (torch.where(OWN == 4, 5, OWN), 5),
    ):
        for read in (trajectory.acted, trajectory.before, trajectory.after):
            with pytest.raises(
                ValueError, match=f"step {named} was not kept: this trajectory has steps 1..4"
            ):
                read(wrong)


def test_a_shared_start_is_no_place_for_an_index():
    schedule, network = SCHEDULES["linear"], Network(EVENT)
    condition, noise = batch(2, 4)
    chain = Chain(schedule, schedule.grid(K), DDIM(1.0), WINDOW)
    trajectory = chain.sample(network, condition, noise, EVENT, members=4, branch_at=1)
    with pytest.raises(ValueError, match="give a stretch of groups"):
        trajectory[torch.tensor([0, 3])]
    together = chain.transition(
        network, trajectory, OWN
    )  # without an index each row may be at its own step
    for row, k in enumerate(OWN.tolist()):
        assert torch.allclose(
            together.mean[row], chain.transition(network, trajectory, k).mean[row], atol=1e-6
        )


def test_a_policys_gain_and_std_at_steps_of_each_rows_own():
    model = Toy()
    policy = ChainPolicy(model, Chain(model.schedule, model.grid(K), DDIM(1.0), WINDOW))
    for row, k in enumerate(OWN.tolist()):
        assert torch.equal(policy.std(OWN)[row : row + 1], policy.std(k))
        assert torch.equal(policy.gain(OWN)[row : row + 1], policy.gain(k))
    assert policy.std(OWN).shape == policy.gain(OWN).shape == (ROWS,)


def test_a_frozen_base_denoises_above_its_time_and_only_there():
    model = Toy()
    context = Context(["bright"] * 4)
    noise = Noise.rows(0, 0, torch.arange(4), 1)
    chain = Chain(model.schedule, model.grid(K), DDIM(1.0), (3, K))
    plain = ChainPolicy(model, chain)
    old = [p.detach().clone() for p in model.trainable().values()]
    before = plain.sample(model.encode(context), noise, keep=(0, K))
    policy = plain.attach(
        "base", Base(dict(zip(plain.model.trainable(), old, strict=True)), float(chain.grid[3]))
    )
    for parameter in model.trainable().values():
        parameter.data += 0.05 * torch.randn_like(parameter)
    after, unfrozen = (p.sample(model.encode(context), noise, keep=(0, K)) for p in (policy, plain))
    assert torch.equal(after.x[:, :4], before.x[:, :4])
    assert not torch.allclose(after.x[:, 4], before.x[:, 4], atol=1e-3)
    assert not torch.allclose(
        unfrozen.x[:, 1], before.x[:, 1], atol=1e-4
    )  # control: without a base all steps move
    for k in range(K):
        expected = plain if k >= 3 else None
        mean = chain._act(policy.denoiser, after.x[:, k], k, after.condition).mean
        if expected is not None:
            assert torch.equal(
                mean, chain._act(plain.denoiser, after.x[:, k], k, after.condition).mean
            )
        assert torch.equal(mean, after.mean[:, k])


# -- noise of a decision ---------------------------------------------------------------------------


def philox(seed, iteration, group, member, decision, k, size):
    """Draws with key (seed, iteration),
    counter (0, member + 1, group, (decision << 32) + k + 1).
    """
    words = [0, member + 1, group, (decision << 32) + k + 1]
    generator = np.random.Generator(np.random.Philox(key=[seed, iteration], counter=words))
    return torch.from_numpy(generator.standard_normal(size, dtype=np.float32))


def one(group, member, decision=None, k=0, size=16, seed=5, iteration=2):
    noise = Noise(seed, iteration, torch.tensor([group]), torch.tensor([member]))
    noise = noise if decision is None else noise.at(torch.tensor([decision]))
    return noise(k, (size,))[0]


@pytest.mark.parametrize("decision", [0, 1, 7, 2**20])
@pytest.mark.parametrize("k", [PRIOR, 0, 3])
def test_noise_of_a_decision_by_hand(decision, k):
    assert torch.equal(one(3, 1, decision, k), philox(5, 2, 3, 1, decision, k, 16))


@pytest.mark.parametrize("k", [PRIOR, 0, 3])
def test_the_first_decision_draws_what_prompts_always_drew(k):
    assert torch.equal(one(3, 1, 0, k), one(3, 1, None, k))
    assert torch.equal(one(3, 1, None, k), philox(5, 2, 3, 1, 0, k, 16))


def test_golden_numbers_from_before_decisions_had_names():
    """A change of them changes every run that was ever made."""
    for name, k, numbers in (
        ((7, 3, 2, 5), 4, [-1.06098413, 0.112305768, 0.328840315, -0.0201322585]),
        ((0, -1, 0, -1), PRIOR, [-0.172106281, 0.719432831, -0.576999605, -0.391703308]),
    ):
        seed, iteration, group, member = name
        drawn = Noise(seed, iteration, torch.tensor([group]), torch.tensor([member]))(k, (4,))[0]
        assert torch.equal(drawn, torch.tensor(numbers))


def test_every_decision_has_a_stream_of_its_own():
    names = [
        (g, m, h, k) for g in range(3) for m in range(3) for h in range(4) for k in (PRIOR, 0, 1)
    ]
    draws = {tuple(one(g, m, h, k, size=2).tolist()) for g, m, h, k in names}
    assert len(draws) == len(names)
    long = [set(one(0, 0, h, size=500).tolist()) for h in range(3)]
    assert not long[0] & long[1]
    assert not long[1] & long[2]


def test_control_adding_the_decision_to_the_step_collides():
    def added(decision, k):
        return philox(5, 2, 0, 0, 0, k + decision, 4)

    assert torch.equal(added(1, 0), added(0, 1))
    assert not torch.equal(one(0, 0, 1, 0), one(0, 0, 0, 1))


def test_rows_keep_their_decisions_when_they_are_picked():
    noise = Noise.rows(5, 2, torch.arange(3), 2).at(torch.tensor([0, 1, 2, 3, 4, 5]))
    drawn = noise(0, (3,))
    rows = torch.tensor([4, 0, 4])
    assert torch.equal(noise[rows](0, (3,)), drawn[rows])
    assert torch.equal(noise[2:4](0, (3,)), drawn[2:4])
    assert torch.equal(noise[rows].at(torch.tensor([4, 0, 4]))(0, (3,)), drawn[rows])
    assert not torch.equal(noise[rows].at(torch.tensor([0, 0, 0]))(0, (3,)), drawn[rows])
    assert torch.equal(noise.trunk(2).decision, torch.tensor([0, 2, 4]))

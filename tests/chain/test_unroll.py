"""Sampling with gradients: the values of `sample`, and the gradients of what acted."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from genpolicy.chain import (
    CPS,
    DDIM,
    SDE,
    Chain,
    Consistency,
    FloorStd,
    Heun,
    Linear,
    Prediction,
)
from genpolicy.chain.kernel import Kernel
from genpolicy.chain.noise import PRIOR
from genpolicy.chain.schedule import Schedule, step
from genpolicy.chain.values import Denoiser, expand
from tests.chain.exact import DATA, SCHEDULES, Network, Rows, batch

EVENT, ROWS, K = (3, 2), 4, 6
KERNELS: list[Kernel] = [
    DDIM(0.0),
    DDIM(1.0),
    SDE(0.7),
    CPS(0.8),
    FloorStd(DDIM(0.5), 0.2),
    Consistency(),
]


def chain(kernel: Kernel, window: tuple[int, int] | None = None) -> Chain:
    return Chain(Linear(3.0), Linear(3.0).grid(K), kernel, window)


@pytest.mark.parametrize("last", [None, 1, 3, K])
@pytest.mark.parametrize("window", [None, (0, K), (1, 4)], ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_unrolled_is_what_was_sampled_to_the_bit(
    kernel: Kernel, window: tuple[int, int] | None, last: int | None
) -> None:
    network, (condition, noise) = Network(EVENT), batch(ROWS, 1)
    sampled = chain(kernel, window).sample(network, condition, noise, EVENT)
    unrolled = chain(kernel, window).unroll(network, condition, noise, EVENT, last=last)
    assert torch.equal(unrolled, sampled.x0)
    assert unrolled.requires_grad
    assert not sampled.x0.requires_grad


def test_unrolled_from_a_later_step_is_what_was_sampled_to_the_bit() -> None:
    network, (condition, noise) = Network(EVENT), batch(ROWS, 1)
    x = torch.randn(ROWS, *EVENT)
    sampled = chain(SDE(0.7)).sample(network, condition, noise, EVENT, start=(2, x))
    network.times.clear()
    unrolled = chain(SDE(0.7)).unroll(network, condition, noise, EVENT, start=(2, x))
    assert torch.equal(unrolled, sampled.x0)
    assert network.times == chain(SDE(0.7)).grid[2:-1].tolist()


def test_a_learned_std_is_unrolled_too() -> None:
    network, (condition, noise) = Network(EVENT), batch(ROWS, 1)
    log_std = torch.tensor(-1.0, requires_grad=True)

    def noisy(x: Tensor, t: Tensor, condition: Rows) -> Prediction:
        return replace(network(x, t, condition), std=log_std.exp() * torch.ones_like(x))

    sampled = chain(DDIM(0.0)).sample(noisy, condition, noise, EVENT)
    unrolled = chain(DDIM(0.0)).unroll(noisy, condition, noise, EVENT)
    assert torch.equal(unrolled, sampled.x0)
    assert torch.autograd.grad(unrolled.sum(), log_std)[0] != 0


def moved(schedule: Schedule, by: Tensor) -> Denoiser:
    """The exact denoiser of Gaussian data, with ``by`` added to the x0 it says:
    in the dtype of ``by``.
    """

    def predict(x: Tensor, t: Tensor, condition: Rows) -> Prediction:
        x, (alpha, sigma) = (
            x.to(by),
            (expand(f(t), x).to(by) for f in (schedule.alpha, schedule.sigma)),
        )
        slope, offset = DATA.posterior(alpha, sigma)
        x0 = slope * x + offset + by
        return Prediction(x0, (x - alpha * x0) / sigma)

    return predict


def slopes(chain: Chain, last: int) -> tuple[float, float]:
    """(d x0 / d by, d x0 / d x) of `moved`, by hand:
    x_s = a x_t + b (by + ...), over the last steps.
    """
    of_by, of_x = 0.0, 1.0
    for k in range(chain.K - last, chain.K):
        here = step(chain.schedule, chain.grid[k][None], chain.grid[k + 1][None])
        c = chain.kernel_at(k).coefficients(here)
        slope, _ = DATA.posterior(here.alpha_t, here.sigma_t)
        a = c.x + c.x0 * slope + c.eps * (1 - here.alpha_t * slope) / here.sigma_t
        b = c.x0 - c.eps * here.alpha_t / here.sigma_t
        of_by, of_x = float(a) * of_by + float(b), float(a) * of_x
    return of_by, of_x


CASES = [
    *(("shifted", kernel) for kernel in KERNELS),
    *((name, DDIM(eta)) for name in ("vp", "edm") for eta in (0.0, 1.0)),
]


@pytest.mark.parametrize("last", [None, 1, 2, 4])
@pytest.mark.parametrize(("name", "kernel"), CASES, ids=str)
def test_the_gradient_is_the_one_by_hand(name: str, kernel: Kernel, last: int | None) -> None:
    schedule = SCHEDULES[name]
    whole = Chain(schedule, schedule.grid(K), kernel, window=(0, K))
    condition, noise = batch(ROWS, 1)
    by = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x = (10 * torch.randn(ROWS, *EVENT)).requires_grad_()
    x0 = whole.unroll(moved(schedule, by), condition, noise, EVENT, start=(0, x), last=last)
    of_by, of_x = torch.autograd.grad(x0.mean(), (by, x), allow_unused=True)
    wanted_by, wanted_x = slopes(whole, last or K)
    assert float(of_by) == pytest.approx(wanted_by, rel=1e-5)
    if last is None:
        assert torch.allclose(of_x * x.numel(), torch.tensor(wanted_x), rtol=1e-5, atol=1e-7)
    else:
        assert of_x is None
    if not isinstance(kernel, Consistency):  # control: what is before the last steps matters
        assert float(of_by) != pytest.approx(slopes(whole, 3)[0], rel=1e-3)


@pytest.mark.parametrize("name", ["shifted", "vp"])
def test_the_gradient_is_the_finite_difference(name: str) -> None:
    schedule = SCHEDULES[name]
    whole = Chain(schedule, schedule.grid(K), DDIM(1.0))
    condition, noise = batch(ROWS, 1)
    by = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def mean(value: Tensor, last: int | None = None) -> Tensor:
        return whole.unroll(moved(schedule, value), condition, noise, EVENT, last=last).mean()

    difference = (mean(by.detach() + 1e-3) - mean(by.detach() - 1e-3)) / 2e-3
    assert float(torch.autograd.grad(mean(by), by)[0]) == pytest.approx(float(difference), rel=1e-6)
    truncated = float(torch.autograd.grad(mean(by, last=2), by)[0])
    assert truncated != pytest.approx(float(difference), rel=1e-3)  # control


def test_no_gradient_flows_through_the_steps_before_the_last() -> None:
    """The graph holds the last evaluations only;
    a network of its own before them gets no gradient.
    """
    early, late, (condition, noise) = Network(EVENT), Network(EVENT), batch(ROWS, 1)
    with torch.no_grad():
        early.body[0].weight.add_(0.1)
    whole = chain(DDIM(1.0))
    graphs: list[bool] = []

    def relay(x: Tensor, t: Tensor, condition: Rows) -> Prediction:
        graphs.append(torch.is_grad_enabled())
        return (early if t[0] > whole.grid[K - 2] else late)(x, t, condition)

    def gradients(last: int | None) -> list[Tensor | None]:
        graphs.clear()
        loss = whole.unroll(relay, condition, noise, EVENT, last=last).square().mean()
        weights = [early.body[0].weight, late.body[0].weight]
        return list(torch.autograd.grad(loss, weights, allow_unused=True))

    through_early, through_late = gradients(2)
    assert graphs == [False] * (K - 2) + [True] * 2
    assert through_early is None
    assert through_late is not None
    control, whole_late = gradients(None)
    assert graphs == [True] * K
    assert control is not None
    assert torch.allclose(through_late, whole_late)
    with torch.no_grad():
        assert not whole.unroll(relay, condition, noise, EVENT).requires_grad
    assert graphs[K:] == [False] * K


def test_the_gradient_reaches_the_noise_that_a_chain_starts_from() -> None:
    network, (condition, noise) = Network(EVENT), batch(ROWS, 1)
    x = noise(PRIOR, EVENT).requires_grad_()
    x0 = chain(DDIM(0.0)).unroll(network, condition, noise, EVENT, start=(0, x))
    assert torch.equal(x0, chain(DDIM(0.0)).unroll(network, condition, noise, EVENT))
    own = torch.autograd.grad(x0[1].sum(), x)[0]
    assert bool((own[1] != 0).all())
    assert not bool(own[[0, 2, 3]].any())


@pytest.mark.parametrize(("last", "start"), [(0, 0), (-1, 0), (K + 1, 0), (3, K - 2)])
def test_steps_that_are_not_taken_refuse(last: int, start: int) -> None:
    condition, noise = batch(ROWS, 1)
    given = (start, torch.zeros(ROWS, *EVENT))
    with pytest.raises(ValueError, match="it must lie between 1 and"):
        chain(DDIM()).unroll(Network(EVENT), condition, noise, EVENT, start=given, last=last)


def test_a_solver_refuses() -> None:
    condition, noise = batch(ROWS, 1)
    with pytest.raises(ValueError, match="is a solver"):
        chain(Heun()).unroll(Network(EVENT), condition, noise, EVENT)

"""Squashed Gaussians: their density, and the weight of their entropy."""

import math

import pytest
import torch
from torch import Tensor

from genpolicy.chain.values import Gaussian
from genpolicy.learning.squashed import HIGH, LOW, EntropyWeight, Squashed, SquashedActor

CASES = [(0.0, 0.5, 1.0), (0.7, 0.9, 0.3), (-1.2, 0.3, 1.5), (0.4, 2.0, 0.05)]
"""Mean and std before the squashing, and size."""


def one(mean: float, std: float, size: float, rows: int) -> Squashed:
    """The same distribution of one number in every row, in double precision."""
    value = torch.full((rows, 1), mean, dtype=torch.float64)
    return Squashed(Gaussian(value, torch.full_like(value, std)), size)


@pytest.mark.parametrize(("mean", "std", "size"), CASES)
def test_the_density_integrates_to_one_and_is_that_of_the_draws(mean, std, size) -> None:
    """By the trapezoid rule over the draws of a fine grid of noise; without the change of variables
    it does not.
    """
    noise = torch.linspace(-9, 9, 200_001, dtype=torch.float64)[:, None]
    draws, density = (x.flatten() for x in one(mean, std, size, len(noise)).drawn(noise))
    p, u = density.exp(), draws
    assert float(torch.trapezoid(p, u)) == pytest.approx(1, abs=1e-4)
    # the probability of an interval is that of its noise
    low, high = 80_000, 120_000
    interval = torch.special.ndtr(noise[[low, high]]).flatten().diff()
    part = torch.trapezoid(p[low : high + 1], u[low : high + 1])
    assert float(part) == pytest.approx(float(interval), abs=1e-4)
    # controls: the density of x, and the one without the size
    slope = (1 - (u / size) ** 2).clamp_min(1e-300).log()
    for wrong in (density + slope, density + math.log(size)):
        if not torch.allclose(wrong, density):
            assert abs(float(torch.trapezoid(wrong.exp(), u)) - 1) > 0.05


def test_every_number_has_a_density_of_its_own() -> None:
    mean, std = torch.randn(3, 2, 2, dtype=torch.float64), torch.rand(3, 2, 2).double() + 0.1
    noise = torch.randn(3, 2, 2, dtype=torch.float64)
    draws, density = Squashed(Gaussian(mean, std), 0.7).drawn(noise)
    flat = (value.view(-1, 1) for value in (mean, std, noise))
    alone = Squashed(Gaussian(next(flat), next(flat)), 0.7).drawn(next(flat))
    assert torch.equal(draws.view(-1, 1), alone[0])
    assert torch.equal(density.view(-1, 1), alone[1])
    assert torch.equal(draws, Squashed(Gaussian(mean, std), 0.7).sample(noise))


def test_draws_and_density_are_finite_far_out() -> None:
    draws, density = one(0.0, math.exp(HIGH), 1.5, 3).drawn(torch.tensor([[-40.0], [0], [40]]))
    assert bool(draws.isfinite().all() & density.isfinite().all())
    assert float(draws.abs().max()) <= 1.5


def test_an_actor_begins_at_zero_with_the_std_that_is_asked_for() -> None:
    actor = SquashedActor(3, 4, size=0.6, hidden=16, std=0.8)
    found = actor(torch.randn(5, 3), (2, 2))
    assert torch.equal(found.mode, torch.zeros(5, 2, 2))
    assert torch.allclose(found.before.std, torch.full((5, 2, 2), 0.8))
    with torch.no_grad():
        actor.readout.bias[4:] = torch.tensor([-50.0, 50.0, -50.0, 50.0])
    std = actor(torch.randn(5, 3), (2, 2)).before.std
    assert torch.allclose(std[..., 0], torch.full((5, 2), math.exp(LOW)))
    assert torch.allclose(std[..., 1], torch.full((5, 2), math.exp(HIGH)))


class Blind(torch.nn.Module):
    """A LayerNorm of what is seen, in the place of standardising it."""

    def forward(self, seen: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(seen, seen.shape[1:])


def error(actor: SquashedActor, inputs: int) -> float:
    """The mean square of mode - mean(seen) / 2 after 200 updates on it."""
    optimizer = torch.optim.Adam(actor.parameters(), 1e-2)
    for _ in range(200):
        seen = torch.rand(64, inputs) * 2 - 1
        square = (actor(seen, (1,)).mode - seen.mean(1, keepdim=True) / 2).square().mean()
        optimizer.zero_grad()
        square.backward()
        optimizer.step()
    return float(square.detach())


@pytest.mark.parametrize("inputs", [1, 2])
def test_an_actor_sees_what_its_numbers_have_in_common(inputs: int) -> None:
    assert error(SquashedActor(inputs, 1, 1.0, 16), inputs) < 1e-3
    blind = SquashedActor(inputs, 1, 1.0, 16)
    blind.scale = Blind()  # type: ignore[assignment]  # control
    assert error(blind, inputs) > 1e-2


def test_what_it_sees_is_standardised() -> None:
    actor, seen = SquashedActor(2, 1, 1.0, 16), 50 + 3 * torch.randn(64, 2)
    before = actor.network(actor.scale(seen)).std(0).mean()
    actor.scale.fit(seen)
    assert float(actor.network(actor.scale(seen)).std(0).mean()) > 3 * float(before)


@pytest.mark.parametrize(("log_prob", "rises"), [(3.0, True), (-3.0, False)])
def test_alpha_rises_while_the_entropy_is_too_small(log_prob: float, rises: bool) -> None:
    """Entropy -3 is below the target of -1, and 3 above it."""
    weight = EntropyWeight(0.1, target=-1.0)
    optimizer = torch.optim.SGD(weight.parameters(), 0.1)
    for _ in range(5):
        loss, metrics = weight.loss(torch.full((4,), log_prob), torch.zeros(4))
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    assert (float(weight.log_alpha.detach().exp()) > 0.1) == rises
    assert torch.equal(metrics["entropy"], torch.full((4,), -log_prob))
    at_target, _ = weight.loss(torch.ones(4), torch.zeros(4))
    (still,) = torch.autograd.grad(at_target.sum(), weight.log_alpha)
    assert float(still) == 0


def loss_of(actor: SquashedActor, seen: Tensor, noise: Tensor, weight: EntropyWeight) -> Tensor:
    """The actor's loss with Q = -(a - 1)^2, [b]."""
    action, log_prob = actor(seen, (1,)).drawn(noise)
    return weight.loss(log_prob.sum(1), -((action - 1) ** 2).sum(1))[0]


def test_the_gradient_of_an_actor_is_that_of_its_loss() -> None:
    """Against central differences in double precision; alpha is a constant for the actor."""
    actor, weight = SquashedActor(2, 1, 0.8, 4).double(), EntropyWeight(0.2, -0.5).double()
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    seen, noise = torch.randn(6, 2).double(), torch.randn(6, 1).double()
    parameters = list(actor.parameters())
    gradients = torch.autograd.grad(loss_of(actor, seen, noise, weight).mean(), parameters)
    # the term of alpha is a constant for the actor too: it is left out of the differences
    step = 1e-5

    def worth() -> float:
        action, log_prob = actor(seen, (1,)).drawn(noise)
        return float((0.2 * log_prob.sum(1) + ((action - 1) ** 2).sum(1)).mean().detach())

    for parameter, gradient in zip(parameters, gradients, strict=True):
        flat = parameter.data.view(-1)
        for place in range(0, len(flat), 3):
            before = float(flat[place])
            flat[place] = before + step
            above = worth()
            flat[place] = before - step
            below = worth()
            flat[place] = before
            assert float(gradient.view(-1)[place]) == pytest.approx(
                (above - below) / (2 * step), abs=1e-6
            )
    assert max(float(g.abs().max()) for g in gradients) > 1e-3

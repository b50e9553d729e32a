"""Guidance: its value, where its gradient goes, when it is skipped, and what it costs."""

import pytest
import torch
from torch import Tensor

from genpolicy.chain import DDIM, SDE, Chain, Guidance, Linear, Prediction
from tests.chain.exact import Network, Rows, batch, relative

SHAPE = (4, 3)
TIME = 0.5


def empty(condition: Rows) -> Rows:
    """The negative prompt."""
    return Rows(torch.full_like(condition.value, 9.0))


def inputs(rows: int = 6, t: float = TIME) -> tuple[Tensor, Tensor, Rows]:
    x = torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(0))
    return x, torch.full((rows,), t, dtype=torch.float64), Rows(torch.linspace(-1, 1, rows))


def velocity(p: Prediction) -> Tensor:
    return p.eps - p.x0


def published(network: Network, scale: float, *, detach: bool) -> Prediction:
    """Both branches in one batch and one graph, as the public scripts do;
    some detach the negative one.
    """
    x, t, condition = inputs()
    both = Rows(torch.cat([empty(condition).value, condition.value]))
    p = network(torch.cat([x, x]), torch.cat([t, t]), both)
    negative, positive = velocity(p).chunk(2)
    v = (negative.detach() if detach else negative) * (1 - scale) + scale * positive
    return Prediction.of("velocity", v, x, 1 - t, t)


def loss(p: Prediction) -> Tensor:
    weight = torch.linspace(-1, 2, p.x0.numel()).reshape(p.x0.shape)
    return (weight * p.x0).sum() + (p.eps**2).sum()


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 4.5, 7.5])
def test_guided_value(scale: float) -> None:
    network = Network(SHAPE)
    ours = Guidance(network, empty, scale)(*inputs())
    theirs = published(network, scale, detach=False)
    assert relative(ours.x0, theirs.x0) <= 1e-6
    assert relative(ours.eps, theirs.eps) <= 1e-6


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.5, 7.5])
@pytest.mark.parametrize("detach", [True, False])
def test_gradient_is_the_published_one(scale: float, detach: bool) -> None:
    network = Network(SHAPE)
    ours = network.gradient(
        loss(Guidance(network, empty, scale, negative_gradient=not detach)(*inputs()))
    )
    theirs = network.gradient(loss(published(network, scale, detach=detach)))
    assert relative(ours, theirs) <= 1e-5


def test_control_the_two_published_gradients_differ() -> None:
    network = Network(SHAPE)
    detached, whole = (
        network.gradient(loss(published(network, 4.5, detach=d))) for d in (True, False)
    )
    assert relative(detached, whole) > 0.1


@pytest.mark.parametrize("negative_gradient", [True, False])
def test_negative_branch_stays_out_of_the_graph(negative_gradient: bool) -> None:
    seen: list[bool] = []

    def watched(x: Tensor, t: Tensor, condition: Rows) -> Prediction:
        seen.append(torch.is_grad_enabled())
        return network(x, t, condition)

    network = Network(SHAPE)
    Guidance(watched, empty, 4.5, negative_gradient=negative_gradient)(*inputs())
    assert seen == [True, negative_gradient]
    with torch.no_grad():
        Guidance(watched, empty, 4.5, negative_gradient=negative_gradient)(*inputs())
    assert seen[2:] == [False, False]


def test_scale_1_is_the_positive_prediction() -> None:
    network = Network(SHAPE)
    plain, guided = network(*inputs()), Guidance(network, empty, 1.0)(*inputs())
    assert relative(guided.x0, plain.x0) <= 1e-6
    assert relative(guided.eps, plain.eps) <= 1e-6
    assert relative(network.gradient(loss(guided)), network.gradient(loss(plain))) <= 1e-6


@pytest.mark.parametrize(
    ("t", "guided"), [(0.2, False), (0.200001, True), (0.5, True), (0.8, True), (0.800001, False)]
)
def test_interval_is_open_below_and_closed_above(t: float, guided: bool) -> None:
    network = Network(SHAPE)
    ours = Guidance(network, empty, 4.5, interval=(0.2, 0.8))(*inputs(t=t))
    assert len(network.rows) == (2 if guided else 1)
    reference = (Guidance(network, empty, 4.5) if guided else network)(*inputs(t=t))
    assert torch.equal(ours.x0, reference.x0)
    assert torch.equal(ours.eps, reference.eps)


def test_rows_of_one_batch_may_lie_in_and_outside_the_interval() -> None:
    network = Network(SHAPE)
    x, _, condition = inputs()
    t = torch.tensor([0.1, 0.5, 0.9, 0.5, 0.1, 0.8], dtype=torch.float64)
    mixed = Guidance(network, empty, 4.5, interval=(0.2, 0.8))(x, t, condition)
    plain, guided = network(x, t, condition), Guidance(network, empty, 4.5)(x, t, condition)
    inside = (t > 0.2) & (t <= 0.8)
    assert torch.equal(mixed.x0[inside], guided.x0[inside])
    assert relative(mixed.x0[~inside], plain.x0[~inside]) <= 1e-6
    assert relative(mixed.x0[~inside], guided.x0[~inside]) > 0.1


def test_networks_own_std_passes_through() -> None:
    std = torch.rand(6, *SHAPE)
    network = Network(SHAPE)

    def noisy(x: Tensor, t: Tensor, condition: Rows) -> Prediction:
        p = network(x, t, condition)
        return Prediction(p.x0, p.eps, std)

    assert Guidance(noisy, empty, 4.5)(*inputs()).std is std


@pytest.mark.parametrize(
    ("interval", "guided_steps"),
    [((0.0, float("inf")), 8), ((0.0, 0.5), 4), ((0.5, 1.0), 4), ((2.0, 3.0), 0)],
    ids=str,
)
def test_evaluations_of_a_chain(interval: tuple[float, float], guided_steps: int) -> None:
    """8 steps of 6 rows cost 8 + (guided steps) evaluations of 6 rows;
    replay of one guided step costs 2.
    """
    network = Network(SHAPE)
    chain = Chain(Linear(), Linear().grid(8), SDE(0.7))
    condition, noise = batch(groups=2, members=3)
    guidance = Guidance(network, empty, 4.5, interval)
    trajectory = chain.sample(guidance, condition, noise, SHAPE)
    assert sum(network.rows) == 6 * (8 + guided_steps)
    network.rows.clear()
    chain.transition(guidance, trajectory, 0)
    assert network.rows == ([6, 6] if interval[0] < 1.0 <= interval[1] else [6])


@pytest.mark.parametrize("kernel", [DDIM(1.0), SDE(0.7)], ids=str)
def test_replay_under_guidance_is_exact(kernel: DDIM | SDE) -> None:
    network = Network(SHAPE)
    chain = Chain(Linear(), Linear().grid(8), kernel)
    condition, noise = batch(groups=2, members=3)
    guidance = Guidance(network, empty, 4.5, interval=(0.3, 0.9))
    trajectory = chain.sample(guidance, condition, noise, SHAPE)
    for k in trajectory.steps:
        assert torch.equal(chain.transition(guidance, trajectory, k).mean, trajectory.acted(k).mean)
    unguided = chain.transition(network, trajectory, 2)  # what acted must be what is scored
    assert relative(unguided.mean, trajectory.acted(2).mean) > 1e-2

"""Encoders: what they must not see (the points' order), what they must (where something is),
what learns and when.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genpolicy.chain import DDIM, Chain, Noise
from genpolicy.contracts.task import Context
from genpolicy.models._encoders import FEATURES, CloudEncoder, Eye, PictureEncoder, chamfer, shifted
from genpolicy.models.mlp import MLP
from genpolicy.policy.policy import ChainPolicy

STATE, PICTURE, POINTS = "observation.state", "observation.images.top", "observation.points"
SHAPES = {STATE: (4,), PICTURE: (3, 32, 32), POINTS: (40, 3)}


class Recorded:
    """Statistics of random frames of a state, a camera and a point cloud;
    what is seen decides what is done.
    """

    fps = 10

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.shapes: dict[str, tuple[int, ...]] = {**SHAPES, "action": (2,)}
        self.values = {
            STATE: torch.randn(64, 4, generator=generator) * 3 + 1,
            PICTURE: torch.rand(64, 3, 32, 32, generator=generator),
            POINTS: torch.randn(64, 40, 3, generator=generator) * 0.2
            + torch.tensor([0.0, 0.6, 0.1]),
            "action": torch.rand(64, 2, generator=generator),
        }
        self.stats = {
            name: {
                "mean": v.mean(0),
                "std": v.std(0, correction=0),
                "min": v.amin(0),
                "max": v.amax(0),
            }
            for name, v in self.values.items()
        }

    def __len__(self) -> int:
        return 64

    def context(self, index: Tensor, history: int) -> Context:
        past = (index[:, None] + torch.arange(1 - history, 1)).clamp_min(0)
        return Context([""] * len(index), {name: self.values[name][past] for name in SHAPES})


def made(**settings: Any) -> MLP:
    torch.manual_seed(0)
    model = MLP(**{"hidden": 32, **settings})
    model.initialise(Recorded())  # type: ignore[arg-type]  # it is asked for no rows
    return model


def seen(model: MLP, count: int = 6) -> Context:
    return Recorded().context(torch.arange(count), model.history)


def uniform(model: MLP, count: int = 6, seed: int = 0) -> Tensor:
    return torch.rand(
        count, model.draws, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def test_a_cloud_has_no_order() -> None:
    encoder, clouds = CloudEncoder((40, 3)), torch.randn(5, 40, 3)
    features = encoder(clouds)
    assert features.shape == (5, FEATURES)
    assert (features - encoder(clouds[:, torch.randperm(40)])).abs().max() < 1e-6
    assert (features - encoder(torch.cat([clouds, clouds[:, :7]], 1))).abs().max() < 1e-6
    mixed = clouds.flip(2)  # not the points, but their coordinates
    assert (features - encoder(mixed)).abs().max() > 1e-3


def test_a_picture_has() -> None:
    """The features change with the place of a thing and with its colour."""
    encoder, pictures = PictureEncoder((3, 64, 64)), torch.zeros(3, 3, 64, 64)
    pictures[0, 0, 10:14, 10:14] = pictures[1, 0, 40:44, 50:54] = pictures[2, 1, 10:14, 10:14] = 1
    features = encoder(pictures)
    assert features.shape == (3, FEATURES)
    assert torch.pdist(features).min() > 0.05
    assert PictureEncoder((1, 30, 50))(torch.rand(2, 1, 30, 50)).shape == (2, FEATURES)


def test_shifted_moves_the_content() -> None:
    pictures = torch.rand(3, 2, 8, 10)
    moved = shifted(pictures, torch.tensor([[0, 0], [2, -1], [-3, 4]]))
    assert torch.equal(moved[0], pictures[0])
    assert torch.equal(moved[1, :, 2:, :-1], pictures[1, :, :-2, 1:])
    assert torch.equal(moved[1, :, 0], moved[1, :, 2])  # the edge is repeated
    assert torch.equal(moved[2, :, :-3, 4:], pictures[2, :, 3:, :-4])


def test_chamfer() -> None:
    first, second = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    slow = ((first[:, :, None] - second[:, None]) ** 2).sum(-1)
    assert torch.allclose(
        chamfer(first, second), slow.amin(2).mean(1) + slow.amin(1).mean(1), atol=1e-5
    )
    assert chamfer(first, first[:, [3, 1, 0, 4, 2]]).abs().max() < 1e-5
    moved = torch.zeros(1, 1, 3), torch.tensor([[[0.0, 3.0, 4.0]]])
    assert chamfer(*moved).item() == pytest.approx(50.0)


def test_the_bottleneck_is_the_gaussians() -> None:
    eye, clouds = Eye((40, 3), 0, True, False), torch.randn(400, 40, 3)
    features, divergence = eye.drawn(clouds, torch.randn(400, FEATURES))
    mean, log_std = eye.spread(eye.encoder(clouds)).chunk(2, -1)  # type: ignore[misc]  # it has one
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(mean, log_std.exp()), normal(0.0, 1.0)).sum(-1)
    assert torch.allclose(divergence, exact, atol=1e-4)
    assert torch.equal(eye(clouds), mean)
    assert (((features - mean) / log_std.exp()).std() - 1).abs() < 0.02


@pytest.mark.parametrize("network", ["residual", "unet"])
@pytest.mark.parametrize("inputs", [None, [PICTURE], [POINTS, STATE]])
def test_it_sees_what_it_is_given(network: Any, inputs: list[str] | None) -> None:
    model = made(network=network, inputs=inputs, history=2)
    names = inputs or list(SHAPES)
    assert list(model.shapes) == names
    condition = model.encode(seen(model))
    assert condition.shape == (6, 2 * sum(4 if name == STATE else FEATURES for name in names))
    for name in SHAPES:
        other = seen(model)
        other = Context(other.prompts, {**other.observation, name: other.observation[name].flip(0)})
        assert torch.equal(model.encode(other), condition) == (name not in names)


def test_frames_follow_one_another_oldest_first() -> None:
    model = made(inputs=[PICTURE], history=2)
    context = seen(model)
    condition = model.encode(context).view(6, 2, FEATURES)
    alone = model._sight.eyes[0](context.observation[PICTURE][:, 0])
    assert (condition[:, 0] - alone).abs().max() < 1e-6


def test_a_cloud_is_standardised_as_a_whole() -> None:
    """All its points alike, so that their order still does not matter."""
    model, all_points = made(inputs=[POINTS]), Recorded().values[POINTS]
    standard = model._sight.standardised(Recorded().context(torch.arange(64), 1))[POINTS]
    assert standard.mean((0, 1, 2)).abs().max() < 1e-5
    assert (standard.std((0, 1, 2), correction=0) - 1).abs().max() < 1e-4
    assert model._scaling.tensors[f"{POINTS}.mean"].shape == (3,)
    shuffled = Context([""] * 64, {POINTS: all_points[:, None, torch.randperm(40)]})
    plain = Context([""] * 64, {POINTS: all_points[:, None]})
    assert (model.encode(shuffled) - model.encode(plain)).abs().max() < 1e-5


def test_the_encoder_learns_where_there_are_gradients_alone() -> None:
    model = made(history=2)
    for how, learns in ((torch.enable_grad, True), (torch.no_grad, False)):
        with how():
            condition = model.encode(seen(model))
        x, t = torch.randn(6, *model.event_shape), model.times(torch.rand(6).double())
        for parameter in model.trainable().values():
            parameter.grad = None
        model.denoise(x, t, condition).eps.square().sum().backward()
        moved = {
            name
            for name, p in model.trainable().items()
            if p.grad is not None and bool(p.grad.abs().max() > 0)
        }
        eyes = {name for name in model.trainable() if name.startswith("eyes.")}
        assert len(eyes) > 20
        assert moved == set(model.trainable()) - (set() if learns else eyes)
    assert not model.features(model.encode(seen(model))).requires_grad


REGULARISED = {"shift": 3, "bottleneck": 1e-3, "reconstruction": 0.5}


def test_encode_draws_nothing_with_gradients_or_without() -> None:
    """Rescoring sees the very condition that acted: no setting makes `encode` random."""
    model = made(**REGULARISED)
    state = torch.get_rng_state()
    with torch.no_grad():
        acted = model.encode(seen(model))
    assert torch.equal(model.encode(seen(model)), acted)
    assert torch.equal(torch.get_rng_state(), state)
    drawn = [model.supervised(seen(model), uniform(model, seed=seed))[0] for seed in (0, 1)]
    assert (
        drawn[0] - acted
    ).abs().max() > 1e-2  # the negative control: what imitation sees is random
    assert (drawn[0] - drawn[1]).abs().max() > 1e-2
    policy = ChainPolicy(model, Chain(model.schedule, model.grid(5), DDIM(1.0)))
    trajectory = policy.sample(acted, Noise.rows(0, 0, torch.arange(6), 1))
    again = policy.transition(trajectory, 1).log_prob(trajectory.after(1), reduce="mean")
    assert (
        again - trajectory.acted(1).log_prob(trajectory.after(1), reduce="mean")
    ).abs().max() <= 1e-6


def test_without_settings_supervised_is_encode() -> None:
    model = made(history=2)
    assert model.draws == 0
    condition, penalty = model.supervised(seen(model), uniform(model))
    assert torch.equal(condition, model.encode(seen(model)))
    assert torch.equal(penalty, torch.zeros(6))


@pytest.mark.parametrize(
    "settings", [{name: value} for name, value in REGULARISED.items()] + [REGULARISED]
)
def test_supervised_is_a_function_of_each_row_and_its_numbers(settings: dict[str, Any]) -> None:
    model = made(history=2, **settings)
    draws = uniform(model)
    condition, penalty = model.supervised(seen(model), draws)
    assert penalty.shape == (6,)
    assert bool((penalty > 0).all()) == (settings.keys() != {"shift"})
    for row in range(6):
        one = torch.tensor([row])
        alone, own = model.supervised(seen(model)[one], draws[one])
        assert (alone[0] - condition[row]).abs().max() < 1e-5
        assert own.item() == pytest.approx(penalty[row].item(), rel=1e-4)
    model.supervised(seen(model), draws)[1].sum().backward() if penalty.requires_grad else None
    if "reconstruction" in settings:
        decoders = [p for n, p in model.trainable().items() if "decoder" in n or "own" in n]
        assert decoders
        assert all(p.grad is not None for p in decoders)


def test_a_shift_of_nothing_is_nothing() -> None:
    model = made(shift=3, inputs=[PICTURE])
    middle = torch.full((6, model.draws), 0.5, dtype=torch.float64)
    assert torch.equal(model.supervised(seen(model), middle)[0], model.encode(seen(model)))
    edge = torch.zeros(6, model.draws, dtype=torch.float64)
    moved = shifted(seen(model).observation[PICTURE][:, 0], torch.full((6, 2), -3))
    assert torch.equal(model.supervised(seen(model), edge)[0], model._sight.eyes[0](moved))


@pytest.mark.parametrize("settings", [{}, REGULARISED])
def test_a_saved_one_is_restored_bit_for_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    model = made(history=2, **settings)
    model.save(tmp_path)
    again = MLP(pretrained=str(tmp_path), shift=model.shift)
    assert MLP(pretrained=str(tmp_path)).shift == 0, "of a run's imitation, not of the network"
    assert torch.equal(again.encode(seen(model)), model.encode(seen(model)))
    assert again.trainable().keys() == model.trainable().keys()
    draws = uniform(model)
    for ours, theirs in zip(
        model.supervised(seen(model), draws), again.supervised(seen(model), draws), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_many_rows_are_encoded_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    with torch.no_grad():
        whole = model.encode(seen(model, 20))
        monkeypatch.setattr("genpolicy.models._mlp_condition.AT_ONCE", 7)
        assert (model.encode(seen(model, 20)) - whole).abs().max() < 1e-5


@pytest.mark.parametrize("name", [PICTURE, POINTS])
def test_it_learns_to_see(name: str) -> None:
    """The place of a bright spot, or of the highest point, decides the action:
    after 150 updates most of it is explained.
    """
    dataset, model = Recorded(), made(inputs=[name], chunk=1)
    policy = ChainPolicy(model, Chain(model.schedule, model.grid(5), DDIM(0.0)))
    optimiser = torch.optim.AdamW(model.trainable().values(), 3e-3)

    def drawn(count: int) -> tuple[Context, Tensor]:
        at = torch.rand(count, 2)
        if name == POINTS:
            clouds = dataset.values[POINTS][: len(at)].clone()
            clouds[:, 7] = torch.cat([at - torch.tensor([0.5, -0.1]), torch.ones(count, 1)], 1)
            return Context([""] * count, {name: clouds[:, None]}), (2 * at - 1)[:, None]
        grid = torch.arange(32) / 32
        near = (grid[:, None] - at[:, 0, None, None]).abs() + (
            grid - at[:, 1, None, None]
        ).abs() < 0.12
        pictures = dataset.values[PICTURE][:count] * 0.3
        return Context([""] * count, {name: (pictures + 0.7 * near[:, None])[:, None]}), (
            2 * at - 1
        )[:, None]

    for _ in range(150):
        context, event = drawn(64)
        t, noise = model.times(torch.rand(64).double()), torch.randn_like(event)
        optimiser.zero_grad()
        policy.supervised_loss(model.encode(context), event, t, noise).mean().backward()
        optimiser.step()
    context, event = drawn(64)
    with torch.no_grad():
        condition = model.encode(context)
    error = (
        (policy.sample(condition, Noise.rows(0, 0, torch.arange(64), 1)).x0 - event).square().mean()
    )
    blind = (
        (policy.sample(condition.flip(0), Noise.rows(0, 0, torch.arange(64), 1)).x0 - event)
        .square()
        .mean()
    )
    assert error < 0.3 * event.var()
    assert blind > event.var()
    assert math.isfinite(float(error))


def test_wrong_settings_are_told_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"policy\.shift is -1; it must be at least 0"):
        MLP(shift=-1)
    with pytest.raises(
        ValueError, match=r"observation\.images\.top comes as \[1, 3, 9, 9\]; this policy needs"
    ):
        made(inputs=[PICTURE]).encode(Context([""], {PICTURE: torch.zeros(1, 1, 3, 9, 9)}))
    odd, model = Recorded(), MLP(inputs=["observation.matrix"])
    odd.shapes["observation.matrix"] = (4, 4)
    with pytest.raises(ValueError, match=r"matrix is no observation \[q\], \[C,H,W\] or \[P,3\]"):
        model.initialise(odd)  # type: ignore[arg-type]

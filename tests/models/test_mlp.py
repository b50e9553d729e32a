from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from genpolicy.chain import DDIM, Chain, Noise
from genpolicy.contracts.task import Context
from genpolicy.models._mlp_scaling import REACH_FLOOR
from genpolicy.models.mlp import LEVELS, MLP, squared_cosine
from genpolicy.policy.policy import ChainPolicy

STATE, WORLD = "observation.state", "observation.environment_state"
KINDS = [(network, family) for network in ("residual", "unet") for family in ("vp", "flow")]


class Recorded:
    """Statistics of 200 frames; the last dim of the state and of the actions stood still."""

    fps = 10

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.values = {
            name: torch.randn(200, dim, generator=generator) * torch.linspace(0.5, 40, dim) + 3
            for name, dim in ((STATE, 3), (WORLD, 5), ("action", 4))
        }
        for name in (STATE, "action"):
            self.values[name][:, -1] = 0.7
        self.shapes: dict[str, tuple[int, ...]] = {n: (v.shape[1],) for n, v in self.values.items()}
        self.stats = {
            name: {"mean": v.mean(0), "std": v.std(0), "min": v.amin(0), "max": v.amax(0)}
            for name, v in self.values.items()
        }

    def __len__(self) -> int:
        return 200

    def rows(self, index: Tensor, history: int, actions: range) -> Any:
        seen = {n: self.values[n][index][:, None].repeat(1, history, 1) for n in (STATE, WORLD)}
        chunk = self.values["action"][index][:, None].repeat(1, len(actions), 1)
        return (
            Context([""] * len(index), seen),
            chunk,
            torch.zeros(len(index), len(actions), dtype=torch.bool),
        )


def made(**settings: Any) -> MLP:
    model = MLP(**{"hidden": 32, **settings})
    model.initialise(Recorded())
    return model


def rows(model: MLP, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, t with a time of each row's own, condition."""
    context, _, _ = Recorded().rows(torch.arange(count), model.history, model.horizon)
    return (
        torch.randn(count, *model.event_shape),
        model.times(torch.rand(count).double()),
        model.encode(context),
    )


def test_the_default_network_has_the_size_that_learns_metaworld_in_seconds() -> None:
    model, dataset = MLP(), Recorded()
    dataset.shapes = {WORLD: (39,), "action": (4,)}
    dataset.stats = {
        WORLD: {"mean": torch.zeros(39), "std": torch.ones(39)},
        "action": dataset.stats["action"],
    }
    model.initialise(dataset)
    assert sum(p.numel() for p in model.trainable().values()) == 290_832
    assert (model.event_shape, model.executed, model.horizon, model.action_dim) == (
        (4, 4),
        4,
        range(4),
        4,
    )


@pytest.mark.parametrize(("network", "family"), KINDS)
def test_a_saved_one_is_restored_bit_for_bit(network: Any, family: Any, tmp_path: Path) -> None:
    settings = {
        "network": network,
        "family": family,
        "history": 2,
        "chunk": 8,
        "blocks": 3,
        "inputs": [WORLD],
    }
    model = made(**settings)
    model.save(tmp_path)
    again = MLP(pretrained=str(tmp_path))
    assert {name: getattr(again, name) for name in settings} == settings
    assert (again.shapes, again.event_shape, again.clip) == (model.shapes, (8, 4), model.clip)
    x, t, condition = rows(model, 6)
    context, actions, _ = Recorded().rows(torch.arange(6), 2, model.horizon)
    assert torch.equal(again.encode(context), condition)
    assert torch.equal(again.denoise(x, t, condition).eps, model.denoise(x, t, condition).eps)
    assert torch.equal(again.event(actions), model.event(actions))
    assert torch.equal(again.decode(x), model.decode(x))


def test_weights_come_from_torchs_generator() -> None:
    torch.manual_seed(5)
    first = made().trainable()
    torch.manual_seed(5)
    same, other = made().trainable(), made().trainable()
    assert all(torch.equal(first[n], same[n]) for n in first)
    assert not all(torch.equal(first[n], other[n]) for n in first)


@pytest.mark.parametrize(("network", "family"), KINDS)
def test_rows_have_times_of_their_own(network: Any, family: Any) -> None:
    model = made(network=network, family=family)
    x, t, condition = rows(model, 8)
    together = model.denoise(x, t, condition)
    for row in range(8):
        alone = model.denoise(x[row : row + 1], t[row : row + 1], condition[row : row + 1])
        assert (together.eps[row] - alone.eps[0]).abs().max() < 1e-5
    swapped = model.denoise(x, t.flip(0), condition)
    assert (together.eps - swapped.eps).abs().max() > 1e-3  # the time does matter


@pytest.mark.parametrize("network", ["residual", "unet"])
def test_every_parameter_learns_and_the_condition_is_seen(network: Any) -> None:
    model = made(network=network, chunk=8, history=2)
    x, t, condition = rows(model, 4)
    condition.requires_grad_(True)
    model.denoise(x, t, condition).eps.square().sum().backward()
    assert all(
        p.grad is not None and bool(p.grad.abs().max() > 0) for p in model.trainable().values()
    )
    assert condition.grad is not None
    assert bool((condition.grad.abs().amax(0) > 0).all())  # every dim of every frame


def test_observations_are_standardised_and_what_stood_still_is_only_shifted() -> None:
    model, dataset = made(), Recorded()
    assert list(model.shapes) == [STATE, WORLD]  # in the data set's order
    context, _, _ = dataset.rows(torch.arange(200), 1, model.horizon)
    condition = model.encode(context)
    assert condition.shape == (200, 8)
    moving = [0, 1, 3, 4, 5, 6, 7]
    assert condition.mean(0).abs().max() < 1e-3
    assert (condition[:, moving].std(0) - 1).abs().max() < 1e-3
    assert condition[:, 2].abs().max() < 1e-6
    far = Context(context.prompts, {n: v + 1e4 for n, v in context.observation.items()})
    assert model.encode(far).max() == 5.0
    assert torch.equal(
        made(inputs=[WORLD, STATE]).encode(context), condition[:, [3, 4, 5, 6, 7, 0, 1, 2]]
    )


def test_frames_follow_one_another_oldest_first() -> None:
    model = made(inputs=[STATE], history=2)
    frames = Recorded().values[STATE][:6].view(3, 2, 3)
    condition = model.encode(Context([""] * 3, {STATE: frames}))
    older, newer = (
        made(inputs=[STATE]).encode(Context([""] * 3, {STATE: frames[:, j : j + 1]}))
        for j in (0, 1)
    )
    assert torch.equal(condition, torch.cat([older, newer], -1))


def test_event_and_decode_are_inverse_and_the_data_lies_in_the_unit_box() -> None:
    model, actions = made(), Recorded().values["action"][:, None].repeat(1, 4, 1)
    event = model.event(actions)
    assert event.abs().max() <= 1 + 1e-6
    assert (event.amax(0) - 1).abs()[:, :3].max() < 1e-6
    assert (event.amin(0) + 1).abs()[:, :3].max() < 1e-6
    assert (model.decode(event) - actions).abs().max() < 1e-5
    reach = model.decode(torch.ones(1, 4, 4)) - model.decode(-torch.ones(1, 4, 4))
    assert reach[..., 3].max() <= 2 * REACH_FLOOR + 1e-6  # what never moved hardly moves


def test_the_table_is_diffusers() -> None:
    theirs = DDPMScheduler(
        num_train_timesteps=LEVELS, beta_schedule="squaredcos_cap_v2"
    ).alphas_cumprod.double()
    assert (squared_cosine(LEVELS) / theirs - 1).abs().max() < 1e-4  # theirs is fp32


def test_training_times() -> None:
    uniform = torch.cat(
        [torch.rand(1000).double(), torch.tensor([0, 1 - 1e-12], dtype=torch.float64)]
    )
    levels = made().times(uniform) * LEVELS
    assert torch.equal(levels.round().unique(), torch.arange(1, LEVELS + 1).double())
    assert (levels - levels.round()).abs().max() < 1e-9
    flow = made(family="flow").times(uniform)
    assert 0 < flow.min() < 0.02
    assert flow.max() == 1.0


@pytest.mark.parametrize(("network", "family"), KINDS)
def test_replay_is_exact(network: Any, family: Any) -> None:
    model = made(network=network, family=family)
    _, _, condition = rows(model, 6)
    policy = ChainPolicy(model, Chain(model.schedule, model.grid(5), DDIM(1.0)))
    trajectory = policy.sample(condition, Noise.rows(0, 0, torch.arange(6), 1))
    assert model.evaluations == 6 * 5
    for k in trajectory.steps:
        again, acted = policy.transition(trajectory, k), trajectory.acted(k)
        x = trajectory.after(k)
        ratio = again.log_prob(x, reduce="mean") - acted.log_prob(x, reduce="mean")
        assert ratio.abs().max() <= 1e-6
    assert model.evaluations == 6 * 5 + 4 * 6 * 2  # four steps with a graph: forward and backward
    next(iter(model.trainable().values())).data.mul_(1.01)
    x = trajectory.after(1)
    moved = policy.transition(trajectory, 1).log_prob(x, reduce="mean")
    assert (moved - trajectory.acted(1).log_prob(x, reduce="mean")).abs().max() > 1e-6


@pytest.mark.parametrize("family", ["vp", "flow"])
def test_the_supervised_loss_is_that_of_the_networks_own_output(family: Any) -> None:
    model = made(family=family)
    x0, t, condition = rows(model, 16)
    noise = torch.randn_like(x0)
    ours = (
        ChainPolicy(model, Chain(model.schedule, model.grid(5)))
        .supervised_loss(condition, x0, t, noise)
        .mean()
    )
    alpha, sigma = (
        model.schedule.alpha(t).float()[:, None, None],
        model.schedule.sigma(t).float()[:, None, None],
    )
    output = model._network(alpha * x0 + sigma * noise, model._time(t), condition)
    target = noise if family == "vp" else noise - x0
    assert ours.item() == pytest.approx(((output - target) ** 2).mean().item(), rel=1e-4)


@pytest.mark.parametrize(("network", "family"), KINDS)
def test_it_learns_to_act(network: Any, family: Any) -> None:
    """Actions are a function of what is seen:
    after 300 updates the ODE's actions are close to it.
    """
    model = made(network=network, family=family, hidden=64)
    policy = ChainPolicy(model, Chain(model.schedule, model.grid(10), DDIM(0.0)))
    optimiser = torch.optim.AdamW(model.trainable().values(), 3e-3)

    def seen(count: int) -> tuple[Tensor, Tensor]:
        condition = torch.randn(count, 8)
        return condition, condition[:, None, :4].tanh() * torch.tensor([0.9, -0.9, 0.9, -0.9])[
            :, None
        ]

    for _ in range(300):
        condition, event = seen(128)
        t, noise = model.times(torch.rand(128).double()), torch.randn_like(event)
        optimiser.zero_grad()
        policy.supervised_loss(condition, event, t, noise).mean().backward()
        optimiser.step()
    condition, event = seen(64)
    error = policy.sample(condition, Noise.rows(0, 0, torch.arange(64), 1)).x0 - event
    assert error.square().mean() < 0.15 * event.var()


def test_wrong_settings_are_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no saved mlp"):
        MLP(pretrained=str(tmp_path))
    with pytest.raises(ValueError, match=r"chunk 6 can't be halved 2 times .* multiple of 4"):
        MLP(network="unet", chunk=6, blocks=3)
    with pytest.raises(ValueError, match="hidden 48 of a unet must be a multiple of 32"):
        MLP(network="unet", hidden=48)
    with pytest.raises(ValueError, match="history is 0; it must be at least 1"):
        MLP(history=0)
    with pytest.raises(
        ValueError,
        match=r"inputs: observation\.effort is no observation .* it has observation\.state",
    ):
        made(inputs=["observation.effort"])
    with pytest.raises(ValueError, match="no unconditional branch"):
        made().negative(torch.zeros(1, 8))
    context, _, _ = Recorded().rows(torch.arange(2), 2, range(4))
    with pytest.raises(
        ValueError, match=r"observation\.state comes as \[2, 3\]; this policy needs \[1, 3\]"
    ):
        made().encode(context)
    with pytest.raises(ValueError, match=r"observation\.environment_state is missing"):
        made(inputs=[WORLD]).encode(Context(["", ""], {STATE: context.observation[STATE]}))

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from genpolicy.chain import DDIM, Chain, ClipX0, Noise
from genpolicy.chain.values import joined
from genpolicy.config.errors import ConfigError
from genpolicy.contracts.task import Context
from genpolicy.models import _lerobot as theirs
from genpolicy.models._lerobot_processors import steady
from genpolicy.models.lerobot_diffusion import LeRobotDiffusion, Seen
from genpolicy.policy.policy import ChainPolicy
from tests.lerobot_tiny import FRONT, STATE, TOP, WORLD, Recorded, diffusion, saved

SEES = {"world": (STATE, WORLD), "camera": (STATE, TOP), "everything": (STATE, WORLD, TOP, FRONT)}
TRAINING = range(-1, 7)
"""Offsets of an event: a horizon of 8 from the older of two frames on."""


def chain(model: LeRobotDiffusion, eta: float, steps: int = 10) -> ChainPolicy:
    """Every step but the last stochastic; LeRobot's DDPM draws no noise in its last step either."""
    return ChainPolicy(model, Chain(model.schedule, model.grid(steps), DDIM(eta)))


def seen(model: LeRobotDiffusion, rows: int, *names: str) -> tuple[Context, Tensor | Seen]:
    context, _, _ = Recorded(*names).rows(torch.arange(5, 5 + rows), model.history, model.horizon)
    return context, model.encode(context)


def lerobots_conditioning(model: LeRobotDiffusion, context: Context) -> Tensor:
    """The condition that LeRobot's own forward hands to its U-Net, by its own preprocessor."""
    batch = model.processors.pre(dict(context.observation))
    if model.policy.config.image_features:
        batch["observation.images"] = torch.stack(
            [batch[n] for n in model.policy.config.image_features], dim=-4
        )
    return model.policy.diffusion._prepare_global_conditioning(batch)


@pytest.mark.parametrize("sees", SEES)
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_the_ode_is_lerobots_ddim(sees: str, prediction: str) -> None:
    """Clip on, its own grid, the same initial noise: the same horizon of actions."""
    model = diffusion(*SEES[sees], prediction_type=prediction, num_inference_steps=7)
    context, condition = seen(model, 4, *SEES[sees])
    noise = torch.randn(4, *model.event_shape)
    with torch.no_grad():
        known = lerobots_conditioning(model, context)
        expected = model.policy.diffusion.conditional_sample(
            4, global_cond=known, noise=noise.clone()
        )
    policy = chain(model, 0.0, steps=7)
    rows = Noise.rows(0, 0, torch.arange(4), 1)
    ours = policy.sample(condition, rows, start=(0, noise)).x0
    apart = (ours - expected).abs()
    assert apart.mean() <= 2e-7
    assert (
        apart.max() <= 2e-6
    )  # seven steps of fp32 rounding: 1e-6 on most processors, 1.013e-6 seen on one
    assert expected.abs().max() > 0.1
    clipped = ClipX0(
        model.denoise, model.schedule, 1.0, recompute_eps=True
    )  # what DDPM does, and DDIM does not
    wrong = policy.chain.sample(clipped, condition, rows, model.event_shape, start=(0, noise)).x0
    assert (wrong - expected).abs().max() > 1e-3


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_eta_1_is_lerobots_ddpm_with_the_same_noise(
    prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sees = SEES["world"]
    model = diffusion(
        *sees, noise_scheduler_type="DDPM", prediction_type=prediction, num_inference_steps=10
    )
    assert model.clip == (1.0, True)
    context, condition = seen(model, 4, *sees)
    noise = Noise.rows(3, 0, torch.arange(4), 1)
    handed = iter(noise(k, model.event_shape) for k in range(9))
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(handed)
    )
    start = torch.randn(4, *model.event_shape)
    with torch.no_grad():
        known = lerobots_conditioning(model, context)
        expected = model.policy.diffusion.conditional_sample(
            4, global_cond=known, noise=start.clone()
        )
    assert next(handed, None) is None  # it drew nine times, not in the last step
    ours = chain(model, 1.0).sample(condition, noise, start=(0, start)).x0
    assert (ours - expected).abs().max() <= 1e-5
    other = chain(model, 0.9).sample(condition, noise, start=(0, start)).x0
    assert (other - expected).abs().max() > 1e-3


def test_lerobots_grid_never_visits_the_top_and_ours_begins_there() -> None:
    model = diffusion(STATE, WORLD)
    assert (model.native_grid(1) * 100).tolist() == pytest.approx(
        [1, 0]
    )  # one step that denoises nothing
    assert (model.native_grid(4) * 100).tolist() == pytest.approx([76, 51, 26, 1, 0])
    model.spacing = "trailing"
    assert (model.grid(1) * 100).tolist() == pytest.approx([100, 0])
    assert (model.grid(4) * 100).tolist() == pytest.approx([100, 75, 50, 25, 0])
    levels = model.times(torch.rand(2000).double()) * 100
    assert torch.equal(levels.round().unique(), torch.arange(1, 101).double())


@pytest.mark.parametrize("sees", ["world", "camera"])
@pytest.mark.parametrize("train", ["full", "denoiser"])
def test_replay_is_exact(sees: str, train: str) -> None:
    model = diffusion(*SEES[sees], train=train, spacing="trailing")
    _, condition = seen(model, 4, *SEES[sees])
    policy = chain(model, 1.0, steps=5)
    trajectory = policy.sample(condition, Noise.rows(0, 0, torch.arange(4), 1))
    assert model.evaluations == 4 * 5
    for k in trajectory.steps:
        x, again = trajectory.after(k), policy.transition(trajectory, k)
        ratio = again.log_prob(x, reduce="mean") - trajectory.acted(k).log_prob(x, reduce="mean")
        assert ratio.abs().max() <= 1e-6
    assert model.evaluations == 4 * 5 + 4 * 4 * 2
    model.policy.diffusion.unet.final_conv[1].bias.data += 0.01
    x = trajectory.after(2)
    moved = policy.transition(trajectory, 2).log_prob(x, reduce="mean") - trajectory.acted(
        2
    ).log_prob(x, reduce="mean")
    assert moved.abs().max() > 1e-5


def test_joined_conditions_are_those_of_all_rows() -> None:
    model = diffusion(STATE, TOP, train="full")
    context, whole = seen(model, 5, STATE, TOP)
    assert isinstance(whole, Seen)
    parts = [model.encode(context[:2]), model.encode(context[2:])]
    x, t = torch.randn(5, *model.event_shape), torch.full((5,), 0.5)
    with torch.no_grad():
        found, wanted = (model.denoise(x, t, each).eps for each in (joined(parts), whole))
        swapped = model.denoise(x, t, joined(parts[::-1])).eps
    assert torch.equal(found, wanted)
    assert not torch.equal(found, swapped), "control"


def test_rows_have_times_of_their_own() -> None:
    model = diffusion(STATE, WORLD)
    _, condition = seen(model, 6, STATE, WORLD)
    x, t = torch.randn(6, *model.event_shape), model.times(torch.rand(6).double())
    together = model.denoise(x, t, condition).eps
    alone = [model.denoise(x[r : r + 1], t[r : r + 1], condition[r : r + 1]).eps for r in range(6)]
    assert (together - torch.cat(alone)).abs().max() < 1e-5
    assert (together - model.denoise(x, t.flip(0), condition).eps).abs().max() > 1e-4


@pytest.mark.parametrize(("train", "reached"), [("full", True), ("denoiser", False)])
def test_what_learns(train: str, reached: bool) -> None:
    model = diffusion(STATE, TOP, train=train)
    _, condition = seen(model, 2, STATE, TOP)
    event = torch.rand(2, *model.event_shape)
    t = torch.tensor([0.5, 0.1], dtype=torch.float64)
    chain(model, 0.0).supervised_loss(
        condition, event, t, torch.randn_like(event)
    ).mean().backward()
    reach = {
        name
        for name, p in model.policy.named_parameters()
        if p.grad is not None and bool(p.grad.abs().max() > 0)
    }
    assert set(model.trainable()) == reach
    assert any("rgb_encoder" in name for name in reach) == reached
    assert any("unet" in name for name in reach)


def test_an_encoder_that_learns_is_never_stale() -> None:
    """Scoring without gradients after an update sees the new encoder; a frozen one is run once."""
    learning, frozen = diffusion(STATE, TOP), diffusion(STATE, TOP, train="denoiser")
    x, t = torch.randn(2, *learning.event_shape), torch.tensor([0.5, 0.5], dtype=torch.float64)
    for model in (learning, frozen):
        _, condition = seen(model, 2, STATE, TOP)
        with torch.no_grad():
            before = model.denoise(x, t, condition).eps
            model.policy.diffusion.rgb_encoder[0].out.bias += 1.0
            changed = (model.denoise(x, t, condition).eps - before).abs().max()
        assert bool(changed > 1e-6) == (model is learning)


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("sees", ["world", "camera"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_supervised_loss_is_lerobots(
    prediction: str, sees: str, masked: bool, monkeypatch: Any
) -> None:
    model = diffusion(*SEES[sees], prediction_type=prediction, do_mask_loss_for_padding=masked)
    context, actions, pad = Recorded(*SEES[sees]).rows(
        torch.tensor([0, 3, 30, 57]), model.history, model.horizon
    )
    assert bool(pad.any())
    noise, level = torch.randn(4, *model.event_shape), torch.tensor([0, 7, 60, 99])
    monkeypatch.setattr(torch, "randn", lambda *_, **__: noise)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: level)
    batch = model.processors.pre({**context.observation, "action": actions, "action_is_pad": pad})
    expected = model.policy.forward(batch)[0]
    monkeypatch.undo()
    policy, event, t = chain(model, 0.0), model.event(actions), (level + 1).double() / 100
    mask = model.event_mask(pad)
    assert (mask is not None) == masked
    ours = policy.supervised_loss(model.encode(context), event, t, noise, mask)
    # LeRobot divides by the actions that count in the whole batch, not row by row
    weight = (~pad).sum(1) / (~pad).sum() if masked else torch.full((4,), 0.25)
    assert (ours * weight).sum().item() == pytest.approx(expected.item(), rel=2e-5)
    if masked:
        unmasked = policy.supervised_loss(model.encode(context), event, t, noise).mean()
        assert unmasked.item() != pytest.approx(expected.item(), rel=1e-3)


def test_actions_are_normalised_and_executed_as_lerobot_does() -> None:
    model, dataset = diffusion(STATE, WORLD, num_inference_steps=5), Recorded(STATE, WORLD)
    assert (model.horizon, model.executed, model.event_shape) == (TRAINING, 4, (8, 2))
    assert list(model.horizon) == model.policy.config.action_delta_indices
    _, actions, _ = dataset.rows(torch.arange(60), 2, model.horizon)
    event = model.event(actions)
    assert event.abs().max() <= 1 + 1e-5
    assert (model.decode(event) - actions[:, 1:5]).abs().max() < 1e-4  # from the current frame on
    context, condition = seen(model, 3, STATE, WORLD)
    noise = torch.randn(3, *model.event_shape)
    batch = model.processors.pre(dict(context.observation))
    expected = model.processors.post(model.policy.predict_action_chunk(batch, noise=noise.clone()))
    rows = Noise.rows(0, 0, torch.arange(3), 1)
    ours = model.decode(chain(model, 0.0, steps=5).sample(condition, rows, start=(0, noise)).x0)
    assert ours.shape == (3, 4, 2)
    assert (ours - expected).abs().max() < 1e-5


def test_what_stood_still_in_the_data_is_only_shifted() -> None:
    """LeRobot's own statistics would turn a movement of a thousandth into two hundred thousand."""
    model, dataset = diffusion(STATE, WORLD), Recorded(STATE, WORLD)
    context, _, _ = dataset.rows(torch.arange(4), 2, model.horizon)
    moved = {name: value.clone() for name, value in context.observation.items()}
    moved[WORLD][..., -1] += 1e-3
    first, second = (
        model.encode(Context(context.prompts, o)) for o in (context.observation, moved)
    )
    assert (first - second).abs().max() < 2e-3
    fixed = steady("action", {"min": torch.tensor([1.0, 2.0]), "max": torch.tensor([1.0, 5.0])})
    assert fixed["max"] - fixed["min"] == pytest.approx(torch.tensor([2e-3, 3.0]), rel=1e-3)


@pytest.mark.parametrize("sees", SEES)
def test_a_saved_one_loads_here_and_in_lerobot(sees: str, tmp_path: Path) -> None:
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
    from lerobot.policies.factory import make_pre_post_processors

    model = diffusion(*SEES[sees], num_inference_steps=4)
    folder = saved(model, tmp_path / "policy")
    again = LeRobotDiffusion(pretrained=str(folder), spacing="lerobot", device="cpu")
    x, t = torch.randn(3, *model.event_shape), torch.tensor([0.9, 0.5, 0.01], dtype=torch.float64)
    context, condition = seen(model, 3, *SEES[sees])
    with torch.no_grad():
        assert torch.equal(
            again.denoise(x, t, again.encode(context)).eps, model.denoise(x, t, condition).eps
        )
    assert (again.shapes, again.event_shape, again.horizon) == (
        model.shapes,
        model.event_shape,
        model.horizon,
    )
    assert torch.equal(again.decode(x), model.decode(x))

    policy = DiffusionPolicy.from_pretrained(folder)
    pre, post = make_pre_post_processors(policy.config, pretrained_path=str(folder))
    policy.reset()
    for frame in range(2):
        batch = pre({name: value[:, frame] for name, value in context.observation.items()})
        policy._queues["action"].clear()
        action = post(policy.select_action(batch, noise=x.clone()))
    rows = Noise.rows(0, 0, torch.arange(3), 1)
    ours = again.decode(
        chain(again, 0.0, steps=4).sample(again.encode(context), rows, start=(0, x)).x0
    )
    assert (action - ours[:, 0]).abs().max() < 1e-5


def test_the_backbones_own_weights_are_not_downloaded_to_load_a_policy(
    tmp_path: Path, monkeypatch: Any
) -> None:
    from torchvision.models import resnet18

    name = "ResNet18_Weights.IMAGENET1K_V1"
    monkeypatch.setattr("torchvision.models.resnet18", lambda weights: resnet18(weights=None))
    folder = saved(
        diffusion(STATE, TOP, use_group_norm=False, pretrained_backbone_weights=name),
        tmp_path / "policy",
    )
    asked: list[Any] = []
    monkeypatch.setattr(
        "torchvision.models.resnet18",
        lambda weights: (asked.append(weights), resnet18(weights=None))[1],
    )
    again = LeRobotDiffusion(pretrained=str(folder), device="cpu")
    assert asked == [None]
    assert again.policy.config.pretrained_backbone_weights == name
    again.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )


def test_weights_that_did_not_load_are_found(tmp_path: Path) -> None:
    folder = saved(diffusion(STATE, WORLD), tmp_path / "policy")
    weights = load_file(folder / "model.safetensors")
    first = next(iter(weights))
    save_file({n: v for n, v in weights.items() if n != first}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"1 of the weights \({first}, ...\) are not in the file"):
        LeRobotDiffusion(pretrained=str(folder), device="cpu")
    save_file({**weights, "else": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"1 of the weights \(else, ...\) are unknown to the policy"
    ):
        LeRobotDiffusion(pretrained=str(folder), device="cpu")
    save_file(weights, folder / "model.safetensors")
    model = LeRobotDiffusion(pretrained=str(folder), device="cpu")
    with torch.no_grad():
        model.policy.diffusion.unet.final_conv[1].bias += 1
    with pytest.raises(ValueError, match=r"were not loaded"):
        theirs.verify(model.policy, weights, folder)


def test_statistics_that_are_missing_are_told(tmp_path: Path) -> None:
    folder = saved(diffusion(STATE, WORLD), tmp_path / "policy")
    (file,) = folder.glob("policy_preprocessor*normalizer*.safetensors")
    stats = load_file(file)
    save_file({n: v for n, v in stats.items() if not n.startswith(f"{WORLD}.max")}, file)
    with pytest.raises(
        ValueError, match=rf"has no statistic max of {WORLD}, which it normalises by MIN_MAX"
    ):
        LeRobotDiffusion(pretrained=str(folder), device="cpu")


def test_wrong_settings_are_told_in_one_sentence(tmp_path: Path) -> None:
    def fails(error: type[Exception], words: str, **settings: Any) -> None:
        with pytest.raises(error, match=words) as caught:
            LeRobotDiffusion(device="cpu", **settings)
        assert "\n" not in str(caught.value)

    fails(
        FileNotFoundError,
        "is no saved LeRobot policy: it has no config.json",
        pretrained=str(tmp_path),
    )
    fails(FileNotFoundError, "no such folder, and no hub id", pretrained="nowhere")
    fails(OSError, "hub repository can't be read", pretrained="nobody/nothing-of-the-kind")
    fails(
        ConfigError, "policy.config has no key 'horizn'; did you mean horizon", config={"horizn": 8}
    )
    fails(ConfigError, "horizon should be an integer multiple", config={"horizon": 9})
    fails(ConfigError, "down_dims is 'wide'; it must be", config={"down_dims": "wide"})
    fails(ValueError, "input_features can't be set there", config={"input_features": {}})
    folder = saved(diffusion(STATE, WORLD), tmp_path / "policy")
    (folder / "policy_preprocessor.json").rename(folder / "kept.json")
    fails(FileNotFoundError, "LeRobot before 0.4 made it", pretrained=str(folder))
    (folder / "kept.json").rename(folder / "policy_preprocessor.json")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "type": "act"}))
    fails(ValueError, "of type act; valid here: diffusion", pretrained=str(folder))

    with pytest.raises(ValueError, match=rf"needs {STATE} and {WORLD} or a camera"):
        diffusion(STATE)
    with pytest.raises(ValueError, match="use_group_norm must be true"):
        diffusion(STATE, TOP, use_group_norm=False)
    model = diffusion(STATE, WORLD)
    context, condition = seen(model, 2, STATE, WORLD)
    with pytest.raises(ValueError, match="no unconditional branch"):
        model.negative(condition)
    with pytest.raises(
        ValueError, match=rf"observation {WORLD} is missing; this policy needs \[2, 5\]"
    ):
        model.encode(Context(context.prompts, {STATE: context.observation[STATE]}))


def test_a_hub_id_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(diffusion(STATE, WORLD), tmp_path / "policy")
    asked: list[Any] = []

    def download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = LeRobotDiffusion(pretrained="somebody/reach", revision="v2", device="cpu")
    assert asked == [("somebody/reach", "v2")]
    assert model.shapes == {STATE: (3,), WORLD: (5,)}


def test_without_lerobot_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lerobot.policies.diffusion.configuration_diffusion", None)
    with pytest.raises(ValueError, match=r"need lerobot .* pip install genpolicy\[robots\]"):
        LeRobotDiffusion(device="cpu")

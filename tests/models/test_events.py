"""Pictures and videos as samples, and what supervised training needs of a picture model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from genpolicy.chain import Chain
from genpolicy.contracts.task import Context
from genpolicy.models.diffusers_pipeline import DiffusersPipeline
from genpolicy.models.toy import Toy
from genpolicy.policy.policy import ChainPolicy
from genpolicy.rewards import _shapes
from tests import tiny
from tests.models import test_diffusers_pipeline as pipelines

FAMILIES = pipelines.FAMILIES
FRAMES = {"wan": 5, "ltx": 9, "cogvideox": 8}
SHAPES = Path(__file__).parents[2] / "assets" / "shapes-sd3"


def outputs(family: str, rows: int = 2) -> Tensor:
    """Random pictures or videos of the size that the family's call asks for."""
    side = tiny.CALL[family]["height"]
    frames = (FRAMES[family],) if family in FRAMES else ()
    return torch.rand(rows, *frames, 3, side, side, generator=torch.Generator().manual_seed(2))


def by_hand(model: DiffusersPipeline, family: str, made: Tensor) -> Tensor:
    """The family's own formula of encoding, as its image pipelines and its training have it."""
    vae, pipeline = model.pipeline.vae, model.pipeline
    made = made if made.ndim == 4 else made.permute(0, 2, 1, 3, 4)
    with torch.no_grad():
        z = vae.encode(2 * made - 1).latent_dist.mode()
    config = vae.config
    if family in ("sd3", "flux"):
        z = (z - config.shift_factor) * config.scaling_factor
    if family == "flux":
        z = pipeline._pack_latents(z, *z.shape)
    if family in ("sd15", "sdxl", "cogvideox"):
        z = z * config.scaling_factor
    if family == "cogvideox":
        z = z.permute(0, 2, 1, 3, 4)
    if family == "wan":
        mean, std = (
            torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std)
        )
        z = (z - mean) / std
    if family == "ltx":
        z = pipeline._normalize_latents(z, vae.latents_mean, vae.latents_std, config.scaling_factor)
        z = pipeline._pack_latents(z, 1, 1)
    return z


@pytest.mark.parametrize("family", FAMILIES)
def test_an_event_is_the_families_own_encoding(family: str) -> None:
    model, made = pipelines.learner(family), outputs(family)
    assert model.decode(torch.zeros(2, *model.event_shape)).shape == made.shape
    event = model.event(made)
    assert event.shape == (2, *model.event_shape)
    assert event.dtype == torch.float32
    torch.testing.assert_close(event, by_hand(model, family, made), rtol=1e-4, atol=1e-5)
    assert torch.equal(model.event(made), event)  # nothing is drawn
    wrong = by_hand(model, family, made.flip(-1))
    assert (event - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_vae_decodes_an_events_own_latents(family: str) -> None:
    """The tail undoes `event`, to rounding; the VAE itself, untrained here, is no identity."""
    model, made = pipelines.learner(family), outputs(family)
    with torch.no_grad():
        pixels = made if made.ndim == 4 else made.transpose(1, 2)
        latents = model.pipeline.vae.encode(2 * pixels - 1).latent_dist.mode()
        torch.testing.assert_close(
            model._vae.tail(model.event(made)), latents, rtol=1e-4, atol=1e-5
        )
    decoded = model.decode(torch.zeros(1, *model.event_shape))  # its VAE decodes again
    assert decoded.shape[1:] == made.shape[1:]


def varied(family: str, folder: Path) -> DiffusersPipeline:
    """A pipeline whose VAE has a mean and a std of its own for each channel."""
    pipeline = tiny.build(family)
    spread = torch.linspace(0.5, 2.0, 4 if family == "sdxl" else 8)
    if family == "sdxl":
        pipeline.vae.register_to_config(
            latents_mean=(spread - 1).tolist(), latents_std=spread.tolist()
        )
    else:
        pipeline.vae.latents_mean, pipeline.vae.latents_std = spread - 1, spread
    pipeline.save_pretrained(folder)
    return pipelines.load(family, folder)


def test_means_and_stds_of_channels_are_undone(tmp_path: Path) -> None:
    ltx, made = varied("ltx", tmp_path / "ltx"), outputs("ltx")
    torch.testing.assert_close(ltx.event(made), by_hand(ltx, "ltx", made), rtol=1e-4, atol=1e-5)
    sdxl, made = varied("sdxl", tmp_path / "sdxl"), outputs("sdxl")
    config = sdxl.pipeline.vae.config
    with torch.no_grad():
        z = sdxl.pipeline.vae.encode(2 * made - 1).latent_dist.mode()
    mean, std = (torch.tensor(v).view(4, 1, 1) for v in (config.latents_mean, config.latents_std))
    expected = (z - mean) * config.scaling_factor / std
    torch.testing.assert_close(sdxl.event(made), expected, rtol=1e-4, atol=1e-5)
    plain = pipelines.learner("sdxl").event(made)
    assert (plain - expected).abs().max() > 1e-2


def test_a_vae_that_is_told_a_noise_level_encodes_without_noise(tmp_path: Path) -> None:
    pipeline = tiny.ltx()
    pipeline.vae = type(pipeline.vae).from_config(
        pipeline.vae.config, timestep_conditioning=True, decoder_inject_noise=(False,) * 5
    )
    pipeline.save_pretrained(tmp_path)
    call = {**tiny.CALL["ltx"], "decode_timestep": 0.1, "decode_noise_scale": 0.3}
    model, made = pipelines.load("ltx", tmp_path, call=call), outputs("ltx")
    torch.testing.assert_close(model.event(made), by_hand(model, "ltx", made), rtol=1e-4, atol=1e-5)


def test_events_are_encoded_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = pipelines.learner("sd3"), outputs("sd3", rows=5)
    whole = model.event(made)
    rows: list[int] = []
    own = model.pipeline.vae.encode
    monkeypatch.setattr(
        model.pipeline.vae, "encode", lambda x: (rows.append(len(x)), own(x))[1], raising=False
    )
    monkeypatch.setattr("genpolicy.models._diffusers_vae.DECODED_ELEMENTS", 2 * whole[0].numel())
    torch.testing.assert_close(model.event(made), whole, rtol=0, atol=1e-5)
    assert rows == [2, 2, 1]


def test_pictures_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[3, 64, 64\] are latents \[4, 32, 32\] .* policy.call"):
        pipelines.learner("sd3").event(torch.rand(1, 3, 64, 64))


def test_a_tail_that_mixes_elements_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pipelines.load("sd3")
    own = model._vae.tail
    monkeypatch.setattr(model._vae, "tail", lambda x0: own(x0) + own(x0).roll(1, -1))
    with pytest.raises(ValueError, match="can't be encoded as its samples"):
        model.event(outputs("sd3"))


def test_offloaded_it_is_the_same() -> None:
    made = outputs("sd3")
    assert torch.equal(
        pipelines.load("sd3", offload=True).event(made), pipelines.load("sd3").event(made)
    )


def decibels(made: Tensor, pictures: Tensor) -> Tensor:
    """The peak signal-to-noise ratio of each picture, [B]."""
    return -10 * (made - pictures).square().flatten(1).mean(1).log10()


def test_true_pictures_of_shapes_come_back() -> None:
    """A trained VAE: decode(event(picture)) is the picture, and the checker accepts it."""
    model = DiffusersPipeline(str(SHAPES), device="cpu", call={"max_sequence_length": 1})
    scenes, generator = _shapes.captions()[::8], np.random.default_rng(0)
    drawn = np.stack([_shapes.render(_shapes.parse(text), generator) for text in scenes])
    pictures = torch.from_numpy(drawn).float().permute(0, 3, 1, 2) / 255
    event = model.event(pictures)
    assert event.std() == pytest.approx(1, abs=0.1)  # its scaling is that of true pictures
    back = model.decode(event)
    noise = decibels(back, pictures)
    assert noise.min() > 36  # 37.5 dB at least, 40.3 on average
    assert noise.mean() > 39
    assert _shapes.scores(_shapes.to_uint8(back), scenes)[:, 0].mean() == 1
    config = model.pipeline.vae.config
    unshifted = model.decode(event + config.shift_factor * config.scaling_factor)
    assert decibels(unshifted, pictures).mean() < noise.mean() - 3


@pytest.mark.parametrize("frames", [None, 3])
def test_a_toys_event_inverts_its_decoding(frames: Any) -> None:
    model = Toy(frames=frames)
    x0 = torch.rand(3, *model.event_shape) - 0.5  # nothing is clamped
    torch.testing.assert_close(model.event(model.decode(x0)), x0, rtol=0, atol=1e-5)
    far = 10 * x0
    assert (model.event(model.decode(far)) - far).abs().max() > 1


# What supervised training needs


def test_flows_train_at_shifted_logit_normal_times() -> None:
    uniform = torch.linspace(0, 1 - 1e-9, 4001, dtype=torch.float64)
    sd3, flux = pipelines.learner("sd3"), pipelines.learner("flux")
    times = sd3.times(uniform)
    assert times.dtype == torch.float64
    assert 0 < times.min() < 0.03
    assert 0.99 < times.max() < 1
    assert times[2000] == pytest.approx(0.75)  # sigmoid(0), shifted by 3
    low = torch.sigmoid(torch.tensor(-1.0)).item()  # one std below the mean
    expected = 3 * low / (1 + 2 * low)
    assert (times < expected).double().mean() == pytest.approx(0.1587, abs=2e-3)
    shift = flux.schedule.shift
    assert flux.times(uniform)[2000] == pytest.approx(shift / (1 + shift))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)  # the shift as training code applies it
    assert times[2000] == pytest.approx(float(scheduler.sigmas[500]), abs=1e-3)


def test_others_train_at_all_levels_alike() -> None:
    for model, levels in ((pipelines.learner("sd15"), 1000), (Toy(family="vp"), 1000)):
        uniform = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
        assert torch.equal(
            (model.times(uniform) * levels).round(), torch.arange(1.0, levels + 1).double()
        )
    assert Toy().times(torch.zeros(1).double()) == 1


@pytest.mark.parametrize("kind", ["sd15", "sd3", "toy"])
def test_a_picture_model_can_be_taught_by_pictures(kind: str) -> None:
    model: Any = Toy() if kind == "toy" else pipelines.learner(kind)
    made = torch.rand(2, 3, 8, 8) if kind == "toy" else outputs(kind)
    context = Context(pipelines.PROMPTS)
    assert model.draws == 0
    condition, penalty = model.supervised(context, torch.zeros(2, model.draws))
    assert torch.equal(penalty, torch.zeros(2))
    assert model.event_mask(torch.zeros(2, 1, dtype=torch.bool)) is None
    policy = ChainPolicy(model, Chain(model.schedule, model.grid(2)))
    event, t = model.event(made), model.times(torch.tensor([0.2, 0.9], dtype=torch.float64))
    loss = policy.supervised_loss(condition, event, t, torch.randn_like(event)) + penalty
    gradients = torch.autograd.grad(loss.sum(), list(model.trainable().values()), allow_unused=True)
    assert any(g is not None and bool((g != 0).any()) for g in gradients)

"""The script of the video model: what it writes is a small pipeline that genpolicy loads with its
own call, and its autoencoder begins with frames that see themselves alone.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from genpolicy.policy.files import saved
from genpolicy.rewards import _motion as world

ASSETS = Path(__file__).parents[1] / "assets"


@pytest.fixture(scope="module")
def script():
    """assets/make_motion_model.py."""
    sys.path.insert(0, str(ASSETS))
    try:
        import make_motion_model
    finally:
        sys.path.remove(str(ASSETS))
    return make_motion_model


@pytest.mark.parametrize("name", world.Split._fields)
def test_the_shipped_caption_files_are_the_split(name):
    file = ASSETS / "motion-wan" / f"captions_{name}.txt"
    assert tuple(file.read_text(encoding="utf-8").splitlines()) == getattr(world.split(), name)


def test_what_is_written_is_small_and_comes_with_its_call_and_sampler(script, tmp_path):
    """Wan's own call would draw 81 frames of 480 x 832."""
    folder = tmp_path / "model"
    script.write(script.new_pipeline(), folder)
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 10e6
    assert isinstance(script.load(folder), WanPipeline)
    found = saved(str(folder))
    assert (found.policy["call"], found.sampler.steps) == (script.CALL, 8)
    assert found.load().model.event_shape == (16, 3, 4, 4)


def test_the_share_of_paused_videos_is_the_share(script):
    texts = world.split().pictured
    drawn = script.videos(texts, 4, script.PAUSED, seed=0)
    strict = world.scores(drawn, [text for text in texts for _ in range(4)])[:, 0]
    assert 1 - strict.mean() == pytest.approx(script.PAUSED, abs=0.15)


def test_frames_that_see_themselves_alone(script):
    """Each latent is that of the last frame of its four, and is decoded as four equal frames; the
    control, the network's own beginning, mixes frames.
    """
    torch.manual_seed(0)
    vae = script.new_pipeline().vae.eval()
    video = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    last = video.clone()
    last[:, :, 1:4], last[:, :, 5:8] = 0.0, 0.0

    def differences() -> tuple[float, float]:
        with torch.no_grad():
            latents = [vae.encode(x).latent_dist.mean for x in (video, last)]
            frames = vae.decode(latents[0]).sample
        held = (frames[:, :, 2:5] - frames[:, :, 1:2]).abs().max()
        return float((latents[0] - latents[1]).abs().max()), float(held)

    assert min(differences()) > 1e-3, "control"
    script.flatten_time(vae)
    np.testing.assert_allclose(differences(), 0, atol=1e-5)


def test_what_the_autoencoder_learns_from_is_cut_by_its_last_step_alone(script):
    torch.manual_seed(0)
    vae = script.new_pipeline().vae.eval()
    latents = torch.randn(2, 16, 3, 4, 4)
    with torch.no_grad():
        vae.decoder.conv_out.bias.fill_(1.0)  # so that much is beyond 1
        whole, cut = script.decode(vae, latents), vae.decode(latents).sample
    assert whole.max() > 1
    assert torch.equal(whole.clamp(-1, 1), cut)

"""The embedded video model: a plain WanPipeline of a few megabytes, whose autoencoder shows the
checker what was drawn.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from genpolicy.policy.files import saved
from genpolicy.rewards import _motion as world

ASSET = Path(__file__).parents[1] / "assets" / "motion-wan"


@pytest.mark.parametrize("name", world.Split._fields)
def test_the_shipped_caption_files_are_the_split(name):
    lines = (ASSET / f"captions_{name}.txt").read_text(encoding="utf-8").splitlines()
    assert tuple(lines) == getattr(world.split(), name)


def test_it_is_small():
    assert sum(file.stat().st_size for file in ASSET.rglob("*") if file.is_file()) < 10e6


def test_true_videos_pass_through_the_autoencoder():
    vae = AutoencoderKLWan.from_pretrained(ASSET, subfolder="vae", torch_dtype=torch.float32)
    rng = np.random.default_rng(5)
    texts = world.captions()
    drawn = np.stack([world.render(world.parse(text), rng) for text in texts])
    with torch.no_grad():
        x = torch.from_numpy(drawn).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample
    seen = ((y + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()
    assert world.scores(seen, texts)[:, 0].mean() >= 0.95


def test_it_is_loaded_with_its_own_call_and_sampler():
    """Wan's own call would draw 81 frames of 480 x 832."""
    found = saved(str(ASSET))
    assert found.policy["call"]["num_frames"] == world.FRAMES
    assert found.sampler.steps == 8
    assert found.load().model.event_shape == (16, 3, 4, 4)

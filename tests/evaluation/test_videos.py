"""Videos as files show what they were given, and a missing writer of MP4s is said once."""

import importlib.util
import logging

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from genpolicy.evaluation import pictures, videos

FRAMES = np.zeros((5, 17, 23, 3), np.uint8)
FRAMES[:] = np.linspace(20, 220, 5).astype(np.uint8)[:, None, None, None]


@pytest.fixture(autouse=True)
def asked_anew():
    videos._mp4_is_written.cache_clear()
    yield
    videos._mp4_is_written.cache_clear()


def levels(frames) -> list[int]:
    """The level of each frame, in its middle."""
    return [
        int(np.asarray(f)[f.shape[0] // 2, f.shape[1] // 2, 0]) for f in map(np.asarray, frames)
    ]


def test_both_files_play_every_frame_in_order_and_are_magnified(tmp_path):
    videos.write(FRAMES, tmp_path / "a.b")  # a stem may have a dot
    gif = Image.open(tmp_path / "a.b.gif")
    seen = [frame.convert("RGB") for frame in ImageSequence.Iterator(gif)]
    assert gif.info["duration"] == 1000 // videos.RATE
    played = imageio.imread(tmp_path / "a.b.mp4", plugin="pyav")
    assert imageio.immeta(tmp_path / "a.b.mp4", plugin="pyav")["fps"] == videos.RATE
    assert len(seen) == len(played) == 5
    for frames in (seen, played):
        np.testing.assert_allclose(levels(frames), FRAMES[:, 0, 0, 0], atol=6)
    assert gif.size == (5 * 23, 5 * 17)
    assert played.shape[1:3] == (86, 116), "odd sides get one more pixel"


def test_without_its_writer_there_is_a_gif_alone_and_one_line(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        videos.write(FRAMES, tmp_path / "one")
        videos.write(FRAMES, tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.gif", "two.gif"]
    assert caplog.messages == [
        "videos are written as GIFs alone: for MP4s pip install 'genpolicy[videos]'"
    ]


def test_sheets_of_videos_move(tmp_path):
    """And those of pictures do not."""
    moving = torch.from_numpy(FRAMES).movedim(-1, 1).float()[None].repeat(2, 1, 1, 1, 1) / 255
    prompts, rewards = ["a", "b"], torch.tensor([0.0, 1.0])
    pictures.grid(moving, prompts, tmp_path / "grid.png")
    pictures.before_after(moving, moving.flip(1), prompts, tmp_path / "pairs.png")
    pictures.group(moving, "a", rewards, rewards, tmp_path / "group.png")
    for name in ("grid", "pairs", "group"):
        assert Image.open(tmp_path / f"{name}.gif").n_frames == 5
        assert (tmp_path / f"{name}.mp4").is_file()
    pictures.grid(moving[:, 0], prompts, tmp_path / "still.png")
    assert not (tmp_path / "still.gif").exists()

"""Videos as files: a GIF, and an MP4 where what writes it is installed."""

import importlib.util
import logging
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from genpolicy.config.whole_file import replacing

log = logging.getLogger(__name__)

RATE = 10
"""Frames per second."""
SMALLEST = 96
"""Pixels of the longer side of a frame, at least: smaller frames are magnified (pixels stay
pixels).
"""


def write(frames: np.ndarray, stem: Path) -> None:
    """Writes uint8 frames [F,H,W,3] as ``stem``.gif and ``stem``.mp4.

    The MP4 (H.264) is written by imageio through PyAV. Where one of them is missing, a line says
    once how to install both.
    """
    scale = -(-SMALLEST // max(frames.shape[1:3]))
    frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    first, *others = [Image.fromarray(frame) for frame in frames]
    with replacing(stem.with_name(f"{stem.name}.gif")) as staged:
        first.save(
            staged, "GIF", save_all=True, append_images=others, duration=1000 // RATE, loop=0
        )
    if _mp4_is_written():
        _write_mp4(frames, stem.with_name(f"{stem.name}.mp4"))


def _write_mp4(frames: np.ndarray, path: Path) -> None:
    """Writes an MP4; H.264 halves the colours' resolution, so an odd side gets one more pixel."""
    import imageio.v3 as imageio

    odd = [(0, side % 2) for side in frames.shape[1:3]]
    even = np.pad(frames, ((0, 0), *odd, (0, 0)), mode="edge")
    with replacing(path) as staged:
        imageio.imwrite(staged, even, plugin="pyav", extension=".mp4", codec="libx264", fps=RATE)


@cache
def _mp4_is_written() -> bool:
    """Returns whether an MP4 can be written, and logs once where it can't."""
    if all(importlib.util.find_spec(name) is not None for name in ("imageio", "av")):
        return True
    log.warning("videos are written as GIFs alone: for MP4s pip install 'genpolicy[videos]'")
    return False

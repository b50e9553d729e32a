"""A PaliGemma of transformers' own class, tiny, with random weights, on disk: under a second."""

import functools
import tempfile
from pathlib import Path

from assets.make_tiny_paligemma import write_paligemma

WIDTH = 32


def build(folder: Path, width: int = WIDTH) -> Path:
    """Write a PaliGemma and its processor into a folder."""
    write_paligemma(folder, width=width, layers=2)
    return folder


@functools.cache
def saved() -> Path:
    """The tiny PaliGemma on disk, once a test session."""
    return build(Path(tempfile.mkdtemp(prefix="tiny-paligemma-")))

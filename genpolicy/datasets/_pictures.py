"""Reads one picture of whatever size and kind, or a video, as the pixels that a model learns
from.
"""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Kinds of files that are read. Pillow knows more, of which some start programs (EPS)."""
UNREADABLE = (OSError, Image.DecompressionBombError, SyntaxError, ValueError)
"""Errors of Pillow for a file that is no picture, too large a one, or a damaged one."""


def require_pixels(height: int, width: int) -> None:
    """Raises `ValueError` for a size without pixels."""
    if height < 1 or width < 1:
        raise ValueError(f"height {height} and width {width} must be at least 1 pixel")


def read(source: Path | BinaryIO, height: int, width: int, where: str) -> Tensor:
    """Reads a picture, Float[3,H,W] in [0,1]: upright, scaled to cover ``height`` x ``width`` and
    cut around its middle; of a file with several the first. Raises `ValueError` for what can't be
    read, which ``where`` names.
    """
    return read_frames(source, height, width, where, 1)[0]


def read_frames(source: Path | BinaryIO, height: int, width: int, where: str, count: int) -> Tensor:
    """Reads the first ``count`` pictures of a file, Float[F,3,H,W] in [0,1], each as `read` does.
    Raises `ValueError` also where it has fewer.
    """
    frames = []
    try:
        with Image.open(source, formats=FORMATS) as picture:
            held = getattr(picture, "n_frames", 1)
            for frame in range(min(count, held)):
                picture.seek(frame)
                upright = ImageOps.exif_transpose(picture)  # as the camera was held
                fitted = ImageOps.fit(upright.convert("RGB"), (width, height))
                frames.append(torch.from_numpy(np.array(fitted)).movedim(-1, 0).float() / 255)
    except UnidentifiedImageError:
        kinds = ", ".join(FORMATS)
        raise ValueError(f"{where} is no picture that can be read: it is none of {kinds}") from None
    except UNREADABLE as error:
        raise ValueError(f"{where} is no picture that can be read: {error}") from None
    if held < count:
        raise ValueError(f"{where} has {held} frame{'s' * (held > 1)}, and {count} are asked for")
    return torch.stack(frames)


def stacked(pictures: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Pictures or videos of a shape as [B,*shape], also where there is none."""
    return torch.stack(pictures) if pictures else torch.zeros(0, *shape)

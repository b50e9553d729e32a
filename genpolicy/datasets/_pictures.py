"""Reads one picture of whatever size and kind as the pixels that a model learns from."""

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
    cut around its middle. Raises `ValueError` for what can't be read, which ``where`` names.
    """
    try:
        with Image.open(source, formats=FORMATS) as picture:
            upright = ImageOps.exif_transpose(picture)  # as the camera was held
            fitted = ImageOps.fit(upright.convert("RGB"), (width, height))
    except UnidentifiedImageError:
        kinds = ", ".join(FORMATS)
        raise ValueError(f"{where} is no picture that can be read: it is none of {kinds}") from None
    except UNREADABLE as error:
        raise ValueError(f"{where} is no picture that can be read: {error}") from None
    return torch.from_numpy(np.array(fitted)).movedim(-1, 0).float() / 255


def stacked(pictures: list[Tensor], height: int, width: int) -> Tensor:
    """Pictures [3,H,W] as [B,3,H,W], also where there is none."""
    return torch.stack(pictures) if pictures else torch.zeros(0, 3, height, width)

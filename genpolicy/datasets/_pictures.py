"""Reads one picture of whatever size and kind as the pixels that a model learns from."""

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Kinds of files that are read. Pillow knows more, of which some start programs (EPS)."""
DEEP = ("I", "F")
"""Pillow's modes of more than 8 bits, which it cuts off at 255 where it makes 8 of them."""


def require_pixels(height: int, width: int) -> None:
    """Raises `ValueError` for a size without pixels."""
    if height < 1 or width < 1:
        raise ValueError(f"height {height} and width {width} must be at least 1 pixel")


def read(source: Path | BinaryIO, height: int, width: int, where: str) -> Tensor:
    """Reads a picture, Float[3,H,W] in [0,1]: upright, scaled to cover ``height`` x ``width`` and
    cut around its middle. Raises `ValueError` for what can't be read, which ``where`` names.
    """
    try:
        # a path would be mapped into memory, and a grey TIFF that is mapped is turned twice
        file = io.BytesIO(source.read_bytes()) if isinstance(source, Path) else source
        with Image.open(file, formats=FORMATS) as picture:
            upright = ImageOps.exif_transpose(picture)  # as the camera was held
            fitted = ImageOps.fit(_eight_bits(upright).convert("RGB"), (width, height))
    except UnidentifiedImageError:
        kinds = ", ".join(FORMATS)
        raise ValueError(f"{where} is no picture that can be read: it is none of {kinds}") from None
    except Exception as error:  # its decoders raise whatever they stumble over (struct.error)
        raise ValueError(f"{where} is no picture that can be read: {error}") from None
    return torch.from_numpy(np.array(fitted)).movedim(-1, 0).float() / 255


def _eight_bits(picture: Image.Image) -> Image.Image:
    """A picture, by its upper 8 bits where it has 16 of grey. Raises `ValueError` for numbers of no
    known range.
    """
    if picture.mode.startswith("I;16"):
        deep = np.asarray(picture).astype(np.uint16)
        return Image.fromarray((deep >> 8).astype(np.uint8))
    if picture.mode in DEEP:
        raise ValueError(f"its numbers have no known range (mode {picture.mode}): save it as RGB")
    return picture


def stacked(pictures: list[Tensor], height: int, width: int) -> Tensor:
    """Pictures [3,H,W] as [B,3,H,W], also where there is none."""
    return torch.stack(pictures) if pictures else torch.zeros(0, 3, height, width)

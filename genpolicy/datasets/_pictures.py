"""Reads one picture of whatever size and kind, or a video, as the pixels that a model learns
from.
"""

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
        # a path would be mapped into memory, and a grey TIFF that is mapped is turned twice
        file = io.BytesIO(source.read_bytes()) if isinstance(source, Path) else source
        with Image.open(file, formats=FORMATS) as picture:
            held = getattr(picture, "n_frames", 1)
            for frame in range(min(count, held)):
                picture.seek(frame)
                upright = ImageOps.exif_transpose(picture)  # as the camera was held
                fitted = ImageOps.fit(_eight_bits(upright).convert("RGB"), (width, height))
                frames.append(torch.from_numpy(np.array(fitted)).movedim(-1, 0).float() / 255)
    except UnidentifiedImageError:
        kinds = ", ".join(FORMATS)
        raise ValueError(f"{where} is no picture that can be read: it is none of {kinds}") from None
    except Exception as error:  # its decoders raise whatever they stumble over (struct.error)
        raise ValueError(f"{where} is no picture that can be read: {error}") from None
    if held < count:
        raise ValueError(f"{where} has {held} frame{'s' * (held > 1)}, and {count} are asked for")
    return torch.stack(frames)


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


def stacked(pictures: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Pictures or videos of a shape as [B,*shape], also where there is none."""
    return torch.stack(pictures) if pictures else torch.zeros(0, *shape)

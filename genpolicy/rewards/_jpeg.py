"""Size of a picture as a JPEG file: the arithmetic of jpeg_compressibility and
jpeg_incompressibility.
"""

from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor

from genpolicy.contracts.reward import RewardError

QUALITY = 95
"""Pillow's quality setting in DDPO (kvablack/ddpo-pytorch, ddpo_pytorch/rewards.py) and Flow-GRPO.
"""
BYTES_PER_KB = 1000
"""The kilobyte is decimal, as in DDPO: 1024 would make every reward 2.3 % smaller."""


def kilobytes(outputs: Tensor) -> Tensor:
    """Bytes of each picture's JPEG file / 1000, averaged over the frames of a video.

    Pixels become round(255 x), clipped to 0..255, as in DDPO; half-precision pictures are widened
    first. Chroma subsampling is Pillow's default, 4:2:0; the bytes are those of Pillow's own
    libjpeg.

    Args:
        outputs: pictures [B, 3, H, W] or videos [B, F, 3, H, W], in [0, 1], on any device.

    Returns:
        Decimal kilobytes, float32 [B], on the device of `outputs`. No gradient flows through a
        file size.
    """
    if outputs.ndim not in (4, 5) or outputs.shape[-3] != 3:
        raise ValueError(
            f"pictures must be [B, 3, H, W] or [B, F, 3, H, W], not {list(outputs.shape)}."
        )
    if not torch.isfinite(outputs).all():
        raise RewardError(
            "pictures hold NaN or infinity, which a JPEG would hide as plain black or white."
        )
    pixels = (outputs.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)
    frames = pixels.flatten(0, -4).permute(0, 2, 3, 1).cpu().numpy()
    sizes = torch.tensor([_bytes(Image.fromarray(frame)) for frame in frames], dtype=torch.float32)
    return (sizes / BYTES_PER_KB).view(len(outputs), -1).mean(1).to(outputs.device)


def _bytes(picture: Image.Image) -> int:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell()

"""Pictures prepared for a CLIP encoder as float tensors, so that gradients pass: resized, cropped
and normalised as the encoder's own transform of 8-bit pictures does it.
"""

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional


def resize(pictures: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Antialiased resize of [M, 3, H, W] in [0, 1] to `size` (height, width), as PIL does: along W,
    then H.

    Clipped to [0, 1] after each, as 8-bit pictures are: a bicubic filter overshoots at edges. A
    tensor resize that clips once, at the end, is up to 25 of 255 levels away from PIL's there.
    """
    for target in ((pictures.shape[-2], size[1]), size):
        pictures = functional.interpolate(pictures, target, mode=mode, antialias=True).clamp(0, 1)
    return pictures


def shortest_edge(pictures: Tensor, edge: int) -> tuple[int, int]:
    """(height, width): the shorter one `edge`, the longer in proportion and rounded down."""
    height, width = pictures.shape[-2:]
    return (
        (edge, int(edge * width / height))
        if height <= width
        else (int(edge * height / width), edge)
    )


def centre_crop(
    pictures: Tensor, size: tuple[int, int], rounded: Callable[[float], int] = round
) -> Tensor:
    """The middle `size` (height, width) of pictures that are at least as large.

    Of an odd margin, torchvision (so open_clip) rounds the half; transformers truncates it
    (`rounded=int`).
    """
    top, left = (
        rounded((have - want) / 2) for have, want in zip(pictures.shape[-2:], size, strict=True)
    )
    return pictures[..., top : top + size[0], left : left + size[1]]


def normalise(pictures: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(pictures - mean) / std, channel by channel."""
    centre, scale = (pictures.new_tensor(values)[:, None, None] for values in (mean, std))
    return (pictures - centre) / scale

"""A pipeline's own way from samples to what its VAE decodes, read off and inverted.

Every pipeline's tail unpacks, permutes, scales and shifts (one factor, or a mean and a std for each
channel) before it calls its VAE: each element of the VAE's latent is scale * one element of the
sample + shift. Probing the tail once with known samples gives this map without knowing the family.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BASE = 1024
"""Places of a sample's elements are told to the tail as three digits of this base."""
DIGITS = 3

Tail = Callable[[Tensor], Tensor]
"""Samples [B,*E] -> what the pipeline would have its VAE decode, [B,*L]."""


class VaeReachedError(Exception):
    """Raised in the VAE's place, with what it was to decode."""

    def __init__(self, latents: Tensor) -> None:
        super().__init__("the pipeline's tail has called its VAE")
        self.latents = latents


@dataclass(frozen=True)
class Layout:
    """latent[i] = scale[i] * sample[place[i]] + shift[i] over the flattened n elements of both.

    shape: *L of the VAE's latent. sample: *E. place [n] is a permutation.
    """

    shape: tuple[int, ...]
    sample: tuple[int, ...]
    place: Tensor
    scale: Tensor
    shift: Tensor

    @classmethod
    def probe(cls, tail: Tail, sample: tuple[int, ...], device: torch.device) -> "Layout":
        """Asks the tail for five samples: 0, `BASE`, and the digits of each element's place.

        Raises `ValueError` where it is no such map.
        """
        count = int(torch.Size(sample).numel())
        places = torch.arange(count, device=device)
        digits = torch.stack([places // BASE**d % BASE for d in range(DIGITS)])
        fixed = torch.stack([torch.zeros_like(places), torch.full_like(places, BASE)])
        asked = torch.cat([fixed, digits]).float().view(-1, *sample)
        answered = tail(asked)
        shape = tuple(answered.shape[1:])
        shift, most, *found = answered.float().flatten(1)
        scale = (most - shift) / BASE
        read = [((value - shift) / scale).round().long() for value in found]
        place = sum((digit * BASE**d for d, digit in enumerate(read)), torch.zeros_like(read[0]))
        if len(place) != count or not torch.equal(place.sort().values, places):
            raise ValueError(
                f"this pipeline's samples {list(sample)} are not its VAE's latents {list(shape)} in"
                " another order and scale, so that pictures can't be encoded as its samples"
            )
        return cls(shape, sample, place, scale, shift)

    def event(self, latents: Tensor) -> Tensor:
        """The samples [B,*E] that the tail turns into ``latents`` [B,*L]."""
        flat = (latents.flatten(1) - self.shift) / self.scale
        return torch.empty_like(flat).index_copy_(1, self.place, flat).view(-1, *self.sample)


def pixels(outputs: Tensor) -> Tensor:
    """Pictures [B,3,H,W], or videos [B,F,3,H,W] as [B,3,F,H,W], from [0,1] to the VAEs' [-1,1]."""
    return 2 * (outputs if outputs.ndim == 4 else outputs.transpose(1, 2)) - 1


def mode(vae: Any, outputs: Tensor) -> Tensor:
    """The mode of the VAE's posterior, [B,*L]: nothing is drawn."""
    return vae.encode(pixels(outputs)).latent_dist.mode()

"""Small denoisers of action chunks x_t [B,T,D], told a time embedding [B,C_t] and a condition
[B,C]: network output [B,T,D].
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

FREQUENCIES = 16
"""Sines, and cosines, of a time embedding."""
TIME = 2 * FREQUENCIES
"""C_t."""
GROUPS = 8
"""Groups of a group norm of the U-Net."""


def embed(position: Tensor) -> Tensor:
    """Sines and cosines of ``position`` [B] at angular frequencies 1 down to 1/1000, [B,TIME]."""
    exponents = torch.linspace(0, 1, FREQUENCIES, dtype=position.dtype, device=position.device)
    angles = position[:, None] * 1000.0**-exponents
    return torch.cat([angles.sin(), angles.cos()], -1)


def residual_blocks(hidden: int, blocks: int) -> nn.ModuleList:
    """The branches W2 silu(W1 silu(LN h)) of ``blocks`` residual blocks, each to be added to h."""
    return nn.ModuleList(
        nn.Sequential(
            nn.LayerNorm(hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
        )
        for _ in range(blocks)
    )


class Residual(nn.Module):
    """One input of everything, ``blocks`` times h + W2 silu(W1 silu(LN h)), then silu and a linear
    readout.
    """

    def __init__(
        self, event_shape: tuple[int, ...], condition: int, hidden: int, blocks: int
    ) -> None:
        super().__init__()
        event = math.prod(event_shape)
        self.enter = nn.Linear(event + TIME + condition, hidden)
        self.blocks = residual_blocks(hidden, blocks)
        self.leave = nn.Linear(hidden, event)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        hidden = self.enter(torch.cat([x.flatten(1), time, condition], -1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.leave(functional.silu(hidden)).view_as(x)


class FilmBlock(nn.Module):
    """Two convolutions over the chunk's time axis; between them channels are scaled and shifted by
    what is known.
    """

    def __init__(self, channels_in: int, channels_out: int, known: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv1d(channels_in, channels_out, 5, padding=2),
            nn.GroupNorm(GROUPS, channels_out),
            nn.SiLU(),
        )
        self.film = nn.Linear(known, 2 * channels_out)
        self.second = nn.Sequential(
            nn.Conv1d(channels_out, channels_out, 5, padding=2),
            nn.GroupNorm(GROUPS, channels_out),
            nn.SiLU(),
        )
        self.skip = (
            nn.Conv1d(channels_in, channels_out, 1)
            if channels_in != channels_out
            else nn.Identity()
        )

    def forward(self, x: Tensor, known: Tensor) -> Tensor:
        scale, shift = self.film(known)[..., None].chunk(2, 1)
        return self.second(self.first(x) * (1 + scale) + shift) + self.skip(x)


class UNet(nn.Module):
    """A 1-D U-Net over the chunk's time axis with ``channels[i]`` at level i, each level half as
    long as the one above.

    T must be divisible by 2^(levels - 1), and the channels by `GROUPS`.
    """

    def __init__(self, event_shape: tuple[int, ...], condition: int, channels: list[int]) -> None:
        super().__init__()
        dim = event_shape[-1]
        known = TIME + condition
        top = channels[0]
        self.time = nn.Sequential(nn.Linear(TIME, 4 * TIME), nn.SiLU(), nn.Linear(4 * TIME, TIME))
        self.enter = FilmBlock(dim, top, known)
        self.down, self.shrink, self.grow, self.up = (nn.ModuleList() for _ in range(4))
        for above, below in pairwise(channels):
            self.shrink.append(nn.Conv1d(above, above, 3, stride=2, padding=1))
            self.down.append(FilmBlock(above, below, known))
            self.grow.append(nn.ConvTranspose1d(below, above, 4, stride=2, padding=1))
            self.up.append(FilmBlock(2 * above, above, known))
        self.middle = FilmBlock(channels[-1], channels[-1], known)
        self.leave = nn.Conv1d(top, dim, 1)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        known = functional.silu(torch.cat([self.time(time), condition], -1))
        levels = [self.enter(x.movedim(-1, -2), known)]
        for shrink, down in zip(self.shrink, self.down, strict=True):
            levels.append(down(shrink(levels[-1]), known))
        hidden = self.middle(levels.pop(), known)
        for grow, up in zip(reversed(self.grow), reversed(self.up), strict=True):
            hidden = up(torch.cat([grow(hidden), levels.pop()], 1), known)
        return self.leave(hidden).movedim(-2, -1)

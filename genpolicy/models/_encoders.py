"""Eyes: small encoders of pictures [n,C,H,W] in [0,1] and of point clouds [n,P,3], standardised, to
`FEATURES` numbers [n,F].

Beside each, where asked for, what keeps its features honest (RL-100, arXiv 2510.14830, its
representation losses): a bottleneck N(mu, s^2) with KL to N(0, I), and a decoder that must find
from the features what was seen, and the robot's own state.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

FEATURES = 64
"""F of one frame."""
CHANNELS = (16, 32, 64)
"""Channels of the convolutions, each of which halves the picture."""
SMALL = 16
"""Height and width of the picture that a decoder has to find."""
SPREAD = 4.0
"""log s of the bottleneck is kept within +- this."""


class PictureEncoder(nn.Module):
    """Three strided convolutions with group norm; where each channel of the last is active on
    average, and how much; linear, layer norm.

    The average place (x, y in [-1, 1] under a softmax over the picture) is the "spatial softmax" of
    arXiv 1504.00702, with a learned temperature.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels_in = shape[0]
        for channels in CHANNELS:
            layers += [
                nn.Conv2d(channels_in, channels, 5, stride=2, padding=2),
                nn.GroupNorm(8, channels),
                nn.ReLU(),
            ]
            channels_in = channels
        self.convolutions = nn.Sequential(*layers)
        self.temperature = nn.Parameter(torch.ones(()))
        self.leave = nn.Sequential(nn.Linear(3 * channels_in, FEATURES), nn.LayerNorm(FEATURES))

    def forward(self, pictures: Tensor) -> Tensor:
        maps = self.convolutions(2 * pictures - 1)
        height, width = maps.shape[-2:]
        weight = (maps * self.temperature).flatten(2).softmax(-1).view_as(maps)
        x = (weight.sum(-2) * _axis(width, maps)).sum(-1)
        y = (weight.sum(-1) * _axis(height, maps)).sum(-1)
        return self.leave(torch.cat([x, y, maps.mean((-2, -1))], -1))


class CloudEncoder(nn.Module):
    """PointNet as 3D Diffusion Policy has it (arXiv 2403.03954): each point 3 -> 64 -> 128 -> 256
    with layer norm and ReLU, the largest over the points, linear, layer norm. The points' order
    does not matter.
    """

    def __init__(self, _shape: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for wide_in, wide_out in ((3, 64), (64, 128), (128, 256)):
            layers += [nn.Linear(wide_in, wide_out), nn.LayerNorm(wide_out), nn.ReLU()]
        self.each = nn.Sequential(*layers)
        self.leave = nn.Sequential(nn.Linear(256, FEATURES), nn.LayerNorm(FEATURES))

    def forward(self, clouds: Tensor) -> Tensor:
        return self.leave(self.each(clouds).amax(-2))


class Eye(nn.Module):
    """One encoder with its bottleneck and its decoders, where wanted. own: dims of the robot's own
    state, to be found too.
    """

    def __init__(self, shape: tuple[int, ...], own: int, bottleneck: bool, decode: bool) -> None:
        super().__init__()
        self.picture = len(shape) == 3
        self.encoder = PictureEncoder(shape) if self.picture else CloudEncoder(shape)
        self.spread = nn.Linear(FEATURES, 2 * FEATURES) if bottleneck else None
        if decode:
            seen = shape[0] * SMALL**2 if self.picture else 3 * shape[0]
            self.decoder = nn.Sequential(
                nn.Linear(FEATURES, 512),
                nn.ReLU(),
                nn.Linear(512, 1024),
                nn.ReLU(),
                nn.Linear(1024, seen),
            )
            self.own = (
                nn.Sequential(nn.Linear(FEATURES, 128), nn.ReLU(), nn.Linear(128, own))
                if own
                else None
            )

    def forward(self, seen: Tensor) -> Tensor:
        """Features [n,F], with nothing drawn: where there is a bottleneck, its mean."""
        features = self.encoder(seen)
        return features if self.spread is None else self.spread(features)[..., :FEATURES]

    def drawn(self, seen: Tensor, normal: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features mu + s ``normal`` [n,F], and KL(N(mu, s^2) || N(0, I)) [n], summed over the
        features; without a bottleneck the plain ones and 0.
        """
        features = self.encoder(seen)
        if self.spread is None or normal is None:
            return features, features.new_zeros(len(features))
        mean, log_std = self.spread(features).chunk(2, -1)
        log_std = log_std.clamp(-SPREAD, SPREAD)
        divergence = 0.5 * (mean**2 + (2 * log_std).exp() - 1) - log_std
        return mean + log_std.exp() * normal, divergence.sum(-1)

    def missed(self, features: Tensor, seen: Tensor, own: Tensor | None) -> Tensor:
        """The error [n] of decoding, from features [n,F], what was seen and the robot's own state
        [n,q].

        Pictures: mean squared error of the picture shrunk to 16 x 16; clouds: `chamfer`; the state:
        squared distance.
        """
        found = self.decoder(features)
        if self.picture:
            small = functional.adaptive_avg_pool2d(seen, SMALL).flatten(1)
            error = (found - small).square().mean(-1)
        else:
            error = chamfer(found.view_as(seen), seen)
        return (
            error
            if self.own is None or own is None
            else error + (self.own(features) - own).square().sum(-1)
        )


def chamfer(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared distance from each point of one cloud [n,P,3] to the nearest of the other, both
    ways, summed: [n].
    """
    here, there = first.square().sum(-1), second.square().sum(-1)
    squared = (here[:, :, None] + there[:, None] - 2 * first @ second.mT).clamp_min(0)
    return squared.amin(2).mean(1) + squared.amin(1).mean(1)


def shifted(pictures: Tensor, by: Tensor) -> Tensor:
    """Pictures [n,C,H,W], each moved by its own whole number of pixels ``by`` [n,2] (down, right);
    edges are repeated.
    """
    height, width = pictures.shape[-2:]
    down = (torch.arange(height, device=by.device) - by[:, :1]).clamp(0, height - 1)
    right = (torch.arange(width, device=by.device) - by[:, 1:]).clamp(0, width - 1)
    rows = torch.arange(len(pictures), device=by.device)[:, None, None]
    return (
        pictures.movedim(1, -1)[rows, down[:, :, None], right[:, None]].movedim(-1, 1).contiguous()
    )


def _axis(length: int, like: Tensor) -> Tensor:
    return torch.linspace(-1, 1, length, dtype=like.dtype, device=like.device)

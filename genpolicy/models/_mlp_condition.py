"""The condition of an mlp: what it sees, standardised, and pictures and point clouds through the
encoders that learn with it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from genpolicy.contracts.dataset import Dataset
from genpolicy.contracts.task import Context
from genpolicy.models._encoders import FEATURES, Eye, shifted
from genpolicy.models._mlp_scaling import Scaling
from genpolicy.models._observed import observed

STATE = "observation.state"
AT_ONCE = 256
"""Rows whose pictures are encoded together where nothing is learned: a whole rollout's would not
fit.
"""
EDGE = 1e-6
"""Uniform numbers are kept so far from 0 and 1 before they are made normal ones."""


def visible(name: str, shape: tuple[int, ...]) -> bool:
    """Returns whether a feature of a data set is an observation of a kind that an mlp can see."""
    return name.startswith("observation.") and (
        len(shape) in (1, 3) or (len(shape) == 2 and shape[1] == 3)
    )


def chosen(inputs: list[str] | None, dataset: Dataset) -> list[str]:
    """Returns the names of the observations that are seen: ``inputs``, or all of a data set.

    Raises `ValueError` for a name that is no visible observation of the data set.
    """
    there = [name for name, shape in dataset.shapes.items() if visible(name, shape)]
    names = inputs or there
    wrong = [name for name in names if name not in there]
    if wrong or not names:
        raise ValueError(
            f"policy.inputs: {wrong[0] if wrong else 'the data set'} is no observation [q],"
            f" [C,H,W] or [P,3] of the data set; it has {', '.join(there) or 'none'}"
        )
    return names


def width(shapes: dict[str, tuple[int, ...]], history: int) -> int:
    """Returns C of the condition [B,C]."""
    features = (FEATURES if len(shape) > 1 else math.prod(shape) for shape in shapes.values())
    return history * sum(features)


@dataclass(eq=False)
class Sight:
    """The map from B rows of observations to the condition [B,C].

    shapes: what is seen, in the order of the condition, name -> shape.
    history: frames of each.
    shift, bottleneck, reconstruction: see `genpolicy.models.mlp.MLP`.
    """

    shapes: dict[str, tuple[int, ...]]
    history: int
    scaling: Scaling
    device: torch.device
    shift: int
    bottleneck: float
    reconstruction: float

    def __post_init__(self) -> None:
        """Draws the encoders' weights from torch's global generator."""
        own = math.prod(self.shapes.get(STATE, (0,)))
        wants = self.bottleneck > 0, self.reconstruction > 0
        names = [name for name, shape in self.shapes.items() if len(shape) > 1]
        eyes = torch.nn.ModuleList(Eye(self.shapes[name], own, *wants) for name in names)
        self.eyes = eyes.to(self.device)
        self._named = [(cast(Eye, eye), name) for eye, name in zip(self.eyes, names, strict=True)]

    @property
    def draws(self) -> int:
        """The count of uniform numbers that `supervised` takes per row."""
        moves = 2 * (self.shift > 0) * sum(eye.picture for eye, _ in self._named)
        return moves + self.history * FEATURES * (self.bottleneck > 0) * len(self._named)

    def encode(self, context: Context) -> Tensor:
        """The condition [B,C]; nothing is random here."""
        if torch.is_grad_enabled() or not self._named or len(context) <= AT_ONCE:
            return self._encoded(context)
        starts = range(0, len(context), AT_ONCE)
        return torch.cat(
            [
                self._encoded(context[slice(begin, min(begin + AT_ONCE, len(context)))])
                for begin in starts
            ]
        )

    def _encoded(self, context: Context) -> Tensor:
        seen = self.standardised(context)
        features = {name: eye(seen[name].flatten(0, 1)) for eye, name in self._named}
        return self._joined(seen | features, len(context))

    def _joined(self, values: dict[str, Tensor], rows: int) -> Tensor:
        return torch.cat([_flat(values[name], rows) for name in self.shapes], -1)

    def standardised(self, context: Context) -> dict[str, Tensor]:
        """Standardises every observation [B,history,*shape]; pictures stay in [0,1]."""
        found: dict[str, Tensor] = {}
        for name, shape in self.shapes.items():
            seen = observed(context, name, (self.history, *shape)).to(self.device)
            found[name] = self.scaling.standardised(name, seen) if len(shape) < 3 else seen
        return found

    def observations(self, standard: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inverts `standardised`; pictures stay in [0,1]."""
        return {
            name: value if len(self.shapes[name]) == 3 else self.scaling.observed(name, value)
            for name, value in standard.items()
        }

    def supervised(self, context: Context, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """The condition [B,C] to imitate from, and the encoders' own losses of each row, [B].

        uniform [B,`draws`] in [0,1): first the moves of each row's pictures, then the draws of its
        bottlenecks, eye by eye.
        """
        rows = len(context)
        seen = self.standardised(context)
        own = seen[STATE].flatten(0, 1) if STATE in seen else None
        draws = uniform.to(self.device, torch.float64)
        penalty = torch.zeros(rows, device=self.device)
        values = dict(seen)
        for eye, name in self._named:
            frames = seen[name].flatten(0, 1)
            normal = None
            # the pictures of a row are moved, all frames of a camera alike
            if self.shift and eye.picture:
                by = (draws[:, :2] * (2 * self.shift + 1)).long() - self.shift
                frames = shifted(frames, by.repeat_interleave(self.history, 0))
                draws = draws[:, 2:]
            # features, drawn where there is a bottleneck
            if self.bottleneck:
                mine, draws = draws.tensor_split([self.history * FEATURES], 1)
                clamped = mine.clamp(EDGE, 1 - EDGE)
                normal = torch.special.ndtri(clamped).float().reshape(-1, FEATURES)
            values[name], divergence = eye.drawn(frames, normal)
            # the losses of the encoder
            losses = self.bottleneck * divergence
            if self.reconstruction:
                losses = losses + self.reconstruction * eye.missed(values[name], frames, own)
            penalty = penalty + losses.view(rows, self.history).mean(1)
        return self._joined(values, rows), penalty


def _flat(value: Tensor, rows: int) -> Tensor:
    """All frames of each row as one vector; of no rows as of any."""
    return (
        value.reshape(rows, value.numel() // rows)
        if rows
        else value.new_zeros(0, math.prod(value.shape[1:]))
    )

"""Examples to learn from: rows of recorded frames, of captioned pictures or of pairs of pictures as
a model's events.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from genpolicy.config.errors import ConfigError
from genpolicy.contracts.dataset import Dataset, Pairs, Pictures
from genpolicy.contracts.model import ControlModel, Model
from genpolicy.contracts.task import Context


def shown(data: Dataset | Pictures, model: Model, index: Tensor) -> Context:
    """The contexts of the rows ``index`` [B]: captions, or observations with their history."""
    return _rows(data, model, index)[0]


def examples(
    data: Dataset | Pictures, model: Model, index: Tensor
) -> tuple[Context, Tensor, Tensor | None]:
    """The contexts of the rows ``index`` [B], their events [B,*E], and which of an event's dims
    count, bool, broadcastable to [B,*E] (None: all). Raises `ConfigError` for a picture that is no
    event of the model.
    """
    context, outputs, pad = _rows(data, model, index)
    if isinstance(data, Pictures):
        return context, _events(data, model, index, outputs), None
    mask = None if pad is None else model.event_mask(pad)
    return context, model.event(outputs), mask


def paired(data: Pairs, model: Model, index: Tensor) -> tuple[Context, Tensor, Tensor]:
    """The captions of the pairs ``index`` [B], the events [B,*E] of their preferred pictures and
    those of the others. Raises `ConfigError` as `examples` does.
    """
    sides = (_Side(data, preferred=True), _Side(data, preferred=False))
    try:
        context, *pictures = data.pairs(index)
    except (RuntimeError, ValueError):
        for side in sides:
            require_pictures(side, model, index.tolist())
        raise
    preferred, other = (
        _events(side, model, index, shown) for side, shown in zip(sides, pictures, strict=True)
    )
    return context, preferred, other


@dataclass(frozen=True)
class _Side:
    """The preferred pictures of pairs, or the others, as
    `genpolicy.contracts.dataset.Pictures`.
    """

    data: Pairs
    preferred: bool

    def __len__(self) -> int:
        return len(self.data)

    def pictures(self, index: Tensor) -> tuple[Context, Tensor]:
        context, preferred, other = self.data.pairs(index)
        return context, preferred if self.preferred else other


def _rows(
    data: Dataset | Pictures, model: Model, index: Tensor
) -> tuple[Context, Tensor, Tensor | None]:
    """Contexts, outputs in the task's units, and what of them lies outside of an episode."""
    if isinstance(data, Pictures):
        try:
            context, pictures = data.pictures(index)
        except (RuntimeError, ValueError):  # torch can't put pictures of several sizes together
            require_pictures(data, model, index.tolist())
            raise
        return context, pictures, None
    control = cast(ControlModel, model)
    return data.rows(index, control.history, control.horizon)


def _events(data: Pictures, model: Model, index: Tensor, pictures: Tensor) -> Tensor:
    """The events [B,*E] of the pictures of the rows ``index`` [B]."""
    try:
        event = model.event(pictures)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError):
        require_pictures(data, model, index.tolist())
        raise
    if tuple(event.shape[1:]) != tuple(model.event_shape):
        require_pictures(data, model, index.tolist())
    return event


def require_pictures(data: Pictures, model: Model, rows: Iterable[int]) -> None:
    """Raise `ConfigError` for the first of these rows whose picture can't be read or is no event of
    the model.
    """
    for row in rows:
        try:
            context, picture = data.pictures(torch.tensor([row]))
        except ValueError as error:
            raise ConfigError(f"data: row {row}: {error}") from None
        height, width = picture.shape[-2:]
        which = (
            f"data: the picture of row {row}, {context.prompts[0]!r}, of {height} x {width} pixels"
        )
        drawn = list(model.event_shape)
        try:
            shape = list(model.event(picture).shape[1:])
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"{which} does not fit the policy: {error}") from None
        if shape != drawn:
            raise ConfigError(
                f"{which} is an event of shape {shape}, and the policy's have {drawn}: set"
                " data.height and data.width to its own size"
            )

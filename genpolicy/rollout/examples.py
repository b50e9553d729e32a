"""Examples to imitate: rows of recorded frames or captioned pictures as a model's events."""

from typing import cast

from torch import Tensor

from genpolicy.contracts.dataset import Dataset, Pictures
from genpolicy.contracts.model import ControlModel, Model
from genpolicy.contracts.task import Context


def shown(data: Dataset | Pictures, model: Model, index: Tensor) -> Context:
    """The contexts of the rows ``index`` [B]: captions, or observations with their history."""
    return _rows(data, model, index)[0]


def examples(
    data: Dataset | Pictures, model: Model, index: Tensor
) -> tuple[Context, Tensor, Tensor | None]:
    """The contexts of the rows ``index`` [B], their events [B,*E], and which of an event's dims
    count, bool, broadcastable to [B,*E] (None: all).
    """
    context, outputs, pad = _rows(data, model, index)
    mask = None if pad is None else model.event_mask(pad)
    return context, model.event(outputs), mask


def _rows(
    data: Dataset | Pictures, model: Model, index: Tensor
) -> tuple[Context, Tensor, Tensor | None]:
    """Contexts, outputs in the task's units, and what of them lies outside of an episode."""
    if isinstance(data, Pictures):
        context, pictures = data.pictures(index)
        return context, pictures, None
    control = cast(ControlModel, model)
    return data.rows(index, control.history, control.horizon)

"""Choosing among several candidates of each state by their values."""

import torch
from torch import Tensor

LEAST_SPREAD = 1e-6
"""Least std that values are divided by."""


def highest(values: Tensor, count: int) -> Tensor:
    """The indices [B,count] of the ``count`` highest values [B,N] of each row, the highest first;
    of equals the earlier one.

    Each value's rank is counted, because ONNX has no stable sort.
    """
    place = torch.arange(values.shape[1], device=values.device)
    one, other = values[:, :, None], values[:, None, :]
    ahead = (other > one) | ((other == one) & (place < place[:, None]))
    ranks = ahead.sum(2)[:, None, :]
    return (ranks == place[:count, None]).long().argmax(2)


def standardised(values: Tensor) -> Tensor:
    """(values - mean) / std over the N of each row, [B,N]: what a temperature means is then the
    same in every state and for rewards of every size. Rows of equal values become 0.
    """
    spread = values.std(1, correction=0, keepdim=True).clamp_min(LEAST_SPREAD)
    return (values - values.mean(1, keepdim=True)) / spread


def drawn(logits: Tensor, uniform: Tensor) -> Tensor:
    """An index of each row, [B], drawn with softmax(logits [B,N]) by uniform numbers [B] in
    [0,1).
    """
    below = logits.double().softmax(1).cumsum(1)
    index = torch.searchsorted(below, uniform.double().to(below.device)[:, None], right=True)
    return index.squeeze(1).clamp_max(logits.shape[1] - 1)

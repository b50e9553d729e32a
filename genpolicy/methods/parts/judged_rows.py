"""The rows of recorded examples that are worth imitating, and those that are not."""

import torch
from torch import Tensor

from genpolicy.contracts.dataset import Dataset, Pictures, recordings
from genpolicy.rollout.replay import outcome


def good(data: Dataset | Pictures) -> Tensor:
    """True for the rows of examples to follow, bool [F]: every picture, and the frames of the
    episodes that succeeded (`genpolicy.rollout.replay.outcome`).
    """
    if isinstance(data, Pictures):
        return torch.ones(len(data), dtype=torch.bool)
    found = []
    for _, part in recordings(data, "data"):
        number = part.episode.unique_consecutive(return_inverse=True)[1]
        found.append(outcome(part)[1][number])
    return torch.cat(found)

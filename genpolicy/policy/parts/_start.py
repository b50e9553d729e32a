"""The pieces of every learned start: its place in a policy, and how its files are called."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from genpolicy.chain import Condition
from genpolicy.chain.values import Gaussian
from genpolicy.contracts.model import Model
from genpolicy.policy.policy import ChainPolicy

WEIGHTS, SETTINGS = "start.safetensors", "start.json"


class Start(Protocol):
    """A distribution of the chain's first state: features [B,F] and the chain's scale -> a Gaussian
    over [B,*E].
    """

    shape: tuple[int, ...]

    def __call__(self, features: Tensor, scale: float) -> Gaussian: ...


def begun_by(start: Start, policy: ChainPolicy) -> ChainPolicy:
    """The policy whose chain starts as ``start`` says; `ValueError` where its events have another
    shape.
    """
    if tuple(policy.model.event_shape) != start.shape:
        raise ValueError(
            f"the policy's learned start has shape {list(start.shape)}, its events"
            f" {list(policy.model.event_shape)}"
        )
    return replace(policy, chain=replace(policy.chain, prior=_Prior(start, policy.model)))


@dataclass(frozen=True)
class _Prior:
    """A learned start as the chain's prior."""

    start: Start
    model: Model

    def __call__(
        self, condition: Condition, shape: tuple[int, ...], scale: float, device: torch.device
    ) -> Gaussian:
        return self.start(self.model.features(condition), scale)

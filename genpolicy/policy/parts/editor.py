"""An editor of actions: a small network that says where each sample is to be moved."""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genpolicy.config.errors import at_least, positive
from genpolicy.contracts.model import Model
from genpolicy.learning.squashed import Squashed, SquashedActor
from genpolicy.policy.parts._settings import read
from genpolicy.policy.policy import ChainPolicy

WEIGHTS, SETTINGS = "editor.safetensors", "editor.json"


@dataclass
class _Settings:
    """What rebuilds an `Editor`."""

    features: int  # numbers that are seen
    dims: int  # numbers of an event
    size: float  # bound of an edit, event units
    bound: float = 1.0  # events are clipped to +-bound
    edited: int | None = None  # of several samples so many, the highest valued, are edited
    hidden: int = 256  # units of each of two layers

    def __post_init__(self) -> None:
        at_least("editor", self, features=1, dims=1, edited=1, hidden=1)
        positive("editor", self, "size", "bound")


class Editor(nn.Module):
    """a~ = clip(a + size u), u = tanh(N(mean(s, a), std(s, a)^2)) (EXPO, arXiv 2507.07986); what
    acts takes u at its mean, and of a~ and a the one that the policy's critic prefers. At first
    the mean of u is 0.

    features, dims: numbers that are seen, and of an event. size: event units, in which edits are
    bounded. bound: events are clipped to +-bound. edited: of several samples so many, the highest
    valued, are edited; None: all.
    """

    kind: ClassVar[str] = "editor"
    slot: ClassVar[str] = "refiner"
    version: ClassVar[int] = 1

    def __init__(
        self,
        features: int,
        dims: int,
        size: float,
        bound: float = 1.0,
        edited: int | None = None,
        hidden: int = 256,
    ) -> None:
        super().__init__()
        self.settings = _Settings(features, dims, size, bound, edited, hidden)
        self.actor = SquashedActor(features + dims, dims, size, hidden)

    def clip_at(self, bound: float) -> None:
        """Clips events to +-bound from now on, event units."""
        self.settings.bound = bound

    def edits(self, features: Tensor, event: Tensor) -> Squashed:
        """The distribution of size u: features [B,F], event [B,*E] -> over [B,*E]."""
        return self.actor(torch.cat([features, event.flatten(1)], 1), tuple(event.shape[1:]))

    def moved(self, event: Tensor, edit: Tensor) -> Tensor:
        """The event, edited, [B,*E] each."""
        return (event + edit).clamp(-self.settings.bound, self.settings.bound)

    def forward(self, policy: ChainPolicy, features: Tensor, event: Tensor) -> Tensor:
        assert policy.judge is not None
        scored = policy.model.scored
        edited = self.moved(event, self.edits(features, event).mode)
        better = policy.judge(features, scored(edited)) > policy.judge(features, scored(event))
        return torch.where(better.view(-1, *[1] * (event.ndim - 1)), edited, event)

    def attach(self, policy: ChainPolicy) -> ChainPolicy:
        """The policy whose samples are edited; `ValueError` where it has no critic, or another
        event.
        """
        dims = math.prod(policy.model.event_shape)
        if policy.judge is None:
            raise ValueError("an editor follows the policy's critic: attach a best_of part first")
        if dims != self.settings.dims:
            raise ValueError(
                f"the policy's editor edits {self.settings.dims} numbers, its events have {dims}"
            )
        return replace(policy, refiner=self, refined=self.settings.edited)

    def save(self, folder: Path) -> None:
        """Write the network as safetensors and what rebuilds it as json."""
        (folder / SETTINGS).write_text(json.dumps(asdict(self.settings), indent=1) + "\n")
        save_file(self.state_dict(), folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path, model: Model) -> Self:
        """Read the editor."""
        settings = read(_Settings, folder / SETTINGS)
        with torch.device("meta"):  # no weights are drawn that the file's would replace
            made = cls(**asdict(settings))
        made.load_state_dict(load_file(folder / WEIGHTS, device=str(model.device)), assign=True)
        return made

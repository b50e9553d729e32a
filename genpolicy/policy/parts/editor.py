"""An editor of actions: a small network that says where each sample is to be moved."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genpolicy.contracts.model import Model
from genpolicy.learning.squashed import Squashed, SquashedActor
from genpolicy.policy.policy import ChainPolicy

WEIGHTS, SETTINGS = "editor.safetensors", "editor.json"


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
        self.settings = {
            "features": features,
            "dims": dims,
            "size": size,
            "bound": bound,
            "edited": edited,
            "hidden": hidden,
        }
        self.bound, self.edited = bound, edited
        self.actor = SquashedActor(features + dims, dims, size, hidden)

    def edits(self, features: Tensor, event: Tensor) -> Squashed:
        """The distribution of size u: features [B,F], event [B,*E] -> over [B,*E]."""
        return self.actor(torch.cat([features, event.flatten(1)], 1), tuple(event.shape[1:]))

    def moved(self, event: Tensor, edit: Tensor) -> Tensor:
        """The event, edited, [B,*E] each."""
        return (event + edit).clamp(-self.bound, self.bound)

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
        if dims != self.settings["dims"]:
            raise ValueError(
                f"the policy's editor edits {self.settings['dims']} numbers, its events have {dims}"
            )
        return replace(policy, refiner=self, refined=self.edited)

    def save(self, folder: Path) -> None:
        """Write the network as safetensors and what rebuilds it as json."""
        (folder / SETTINGS).write_text(json.dumps(self.settings, indent=1) + "\n")
        save_file(self.state_dict(), folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path, model: Model) -> Self:
        """Read the editor."""
        made = cls(**json.loads((folder / SETTINGS).read_text(encoding="utf-8")))
        made.load_state_dict(load_file(folder / WEIGHTS))
        return made.to(model.device)

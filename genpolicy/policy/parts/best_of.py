"""The critic of a best-of-N sampler: it says which of several samples is carried out."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from genpolicy.config.errors import at_least, at_most
from genpolicy.contracts.model import Model
from genpolicy.learning.critic import Critic, Support, pessimistic
from genpolicy.policy.parts._settings import read
from genpolicy.policy.policy import ChainPolicy

WEIGHTS, SETTINGS = "judge.safetensors", "judge.json"
DEEPEST = 100
"""Hidden layers of a critic that is read at most: even without weights, each takes time."""


@dataclass
class _Settings:
    """What rebuilds and reads a `BestOf`."""

    inputs: int  # numbers that its networks see: features and events together
    members: int
    hidden: int  # units of each layer
    layers: int  # hidden ones
    support: Support | None
    pessimism: float

    def __post_init__(self) -> None:
        at_least("judge", self, inputs=1, members=1, hidden=1, layers=0, pessimism=0)
        at_most("judge", self, layers=DEEPEST)


@dataclass(frozen=True, eq=False)
class BestOf:
    """mean - pessimism * std over the critic's members of a decision's value.

    It is called with features [B,F] and scored events [B,*E] and returns [B]. How many samples it
    chooses from is the sampler's ``best_of``.
    """

    critic: Critic
    pessimism: float

    kind: ClassVar[str] = "best_of"
    slot: ClassVar[str] = "judge"
    version: ClassVar[int] = 1

    def __call__(self, features: Tensor, event: Tensor) -> Tensor:
        return pessimistic(self.critic(features, event), self.pessimism)

    def attach(self, policy: ChainPolicy) -> ChainPolicy:
        """The policy whose samples this critic chooses among."""
        return replace(policy, judge=self)

    def save(self, folder: Path) -> None:
        """Write the critic's weights as safetensors, and as json what rebuilds and reads it."""
        first = self.critic.weights[0]
        members, inputs, hidden = first.shape
        layers, support = len(self.critic.weights) - 1, self.critic.support
        settings = asdict(_Settings(inputs, members, hidden, layers, support, self.pessimism))
        (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
        save_file(self.critic.state_dict(), folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path, model: Model) -> Self:
        """Read the critic, not to be trained any further."""
        found = read(_Settings, folder / SETTINGS)
        with torch.device("meta"):  # no weights are drawn that the file's would replace
            critic = Critic(
                found.inputs,
                members=found.members,
                hidden=found.hidden,
                layers=found.layers,
                support=found.support,
            )
        weights = load_file(folder / WEIGHTS, device=str(model.device))
        critic.load_state_dict(weights, assign=True)
        return cls(critic.requires_grad_(False), found.pessimism)

    def state_dict(self) -> dict[str, Any]:
        """Return the critic's weights."""
        return self.critic.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the critic's weights."""
        self.critic.load_state_dict(state)

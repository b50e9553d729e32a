"""A refiner of actions: gradient steps on the critic before an action is carried out."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from genpolicy.config.errors import ConfigError, at_least
from genpolicy.contracts.model import Model
from genpolicy.policy.parts._settings import read
from genpolicy.policy.policy import ChainPolicy

SETTINGS = "refiner.json"


@dataclass(frozen=True)
class Refiner:
    """a <- clip(a + rate dQ/da, low, high), ``steps`` times from each sampled event a.

    The iterate with the highest Q is taken, the sampled one among them (PA-RL, arXiv 2412.06685).
    Q is the policy's critic (the part `BestOf`), which must be attached first.
    """

    steps: int  # gradient steps per sample
    rate: float  # event units per unit of dQ/da
    low: float = -1.0  # event units
    high: float = 1.0  # event units
    # of several samples so many, the highest valued, are moved; None: all
    refined: int | None = None

    kind: ClassVar[str] = "refiner"
    slot: ClassVar[str] = "refiner"
    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        at_least("refiner", self, steps=0, refined=1)
        if not self.low < self.high:
            raise ConfigError(f"refiner: low is {self.low:g}; it must be below high, {self.high:g}")

    def __call__(self, policy: ChainPolicy, features: Tensor, event: Tensor) -> Tensor:
        return self.climbed(policy, features, event)[0]

    def climbed(
        self, policy: ChainPolicy, features: Tensor, event: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The best iterate of each event [B,*E], and its number, [B]: 0 is the event as it came."""
        assert policy.judge is not None
        best, at = event, event
        highest = torch.full((len(event),), -torch.inf, device=event.device)
        number = torch.zeros(len(event), dtype=torch.long, device=event.device)
        for step in range(self.steps + 1):
            with torch.enable_grad():
                at = at.detach().requires_grad_(True)
                value = policy.judge(features, policy.model.scored(at))
            # keep the best iterate of each row
            better = value.detach() > highest
            highest = torch.where(better, value.detach(), highest)
            number = torch.where(better, step, number)
            best = torch.where(better.view(-1, *[1] * (at.ndim - 1)), at.detach(), best)
            if step < self.steps:
                gradient = torch.autograd.grad(value, at, torch.ones_like(value))[0]
                at = (at.detach() + self.rate * gradient).clamp(self.low, self.high)
        return best, number

    def attach(self, policy: ChainPolicy) -> ChainPolicy:
        """The policy whose samples are refined; `ValueError` where it has no critic."""
        if policy.judge is None:
            raise ValueError("a refiner follows the policy's critic: attach a best_of part first")
        return replace(policy, refiner=self, refined=self.refined)

    def save(self, folder: Path) -> None:
        """Write the settings as json."""
        (folder / SETTINGS).write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, folder: Path, model: Model) -> Self:
        """Read the settings."""
        return read(cls, folder / SETTINGS)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: a refiner does not learn."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing."""

"""A learned start of the chain: the distribution of the initial noise given the condition."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar, Self

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genpolicy.chain.prior import USUAL, Bounds
from genpolicy.chain.values import Gaussian
from genpolicy.contracts.model import Model
from genpolicy.learning.critic import Standard
from genpolicy.policy.parts._start import SETTINGS, WEIGHTS, begun_by
from genpolicy.policy.policy import ChainPolicy


class LearnedStart(nn.Module):
    """x at the first time ~ N(scale mu, (scale sigma)^2), the standard normal at first.

    mu [B,*E] and log sigma [B,*E] are linear in the standardised features [B,F] of the condition,
    and brought between ``bounds``. scale: of the chain's own start (`Chain.scale`).
    """

    kind: ClassVar[str] = "learned_start"
    slot: ClassVar[str] = "prior"
    version: ClassVar[int] = 3

    def __init__(self, features: int, shape: tuple[int, ...], bounds: Bounds = USUAL) -> None:
        super().__init__()
        self.features, self.shape, self.bounds = features, tuple(shape), bounds
        self.scale = Standard(features)
        self.mean = nn.Linear(features, math.prod(shape))
        self.log_std = nn.Linear(features, math.prod(shape))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor, scale: float) -> Gaussian:
        """The distribution of the chain's first state, features [B,F] -> a Gaussian over [B,*E]."""
        seen = self.scale(features)
        mean = self.mean(seen).view(len(seen), *self.shape)
        mean, std = self.bounds(mean, self.log_std(seen).view_as(mean))
        return Gaussian(scale * mean, scale * std)

    def attach(self, policy: ChainPolicy) -> ChainPolicy:
        """The policy whose chain starts here; `ValueError` where the event has another shape."""
        return begun_by(self, policy)

    def save(self, folder: Path) -> None:
        """Write the two layers as safetensors and what rebuilds them as json."""
        size = {"features": self.features, "shape": self.shape}
        settings = {**size, **asdict(self.bounds)}
        (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
        save_file(self.state_dict(), folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path, model: Model) -> Self:
        """Read the start."""
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        features, shape = settings.pop("features"), settings.pop("shape")
        made = cls(features, tuple(shape), Bounds.read(settings))
        made.load_state_dict(load_file(folder / WEIGHTS))
        return made.to(model.device)

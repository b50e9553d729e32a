"""A learned start of the chain: the distribution of the initial noise given the condition."""

import json
import math
from pathlib import Path
from typing import ClassVar, Self

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genpolicy.chain.prior import typical
from genpolicy.chain.values import Gaussian
from genpolicy.contracts.model import Model
from genpolicy.learning.critic import Standard
from genpolicy.policy.parts._start import SETTINGS, WEIGHTS, begun_by
from genpolicy.policy.policy import ChainPolicy


class LearnedStart(nn.Module):
    """x at the first time ~ N(scale mu, (scale sigma)^2), the standard normal at first.

    mu [B,*E] and log sigma [B,*E] are linear in the standardised features [B,F] of the condition;
    log sigma is kept in [``low``, ``high``]. scale: of the chain's own start (`Chain.scale`). band:
    how far the mean of mu^2 + sigma^2 over the dims may be from 1 (`typical`); None is any.
    """

    kind: ClassVar[str] = "learned_start"
    version: ClassVar[int] = 2

    def __init__(
        self,
        features: int,
        shape: tuple[int, ...],
        low: float = -4.0,
        high: float = 0.3,
        band: float | None = None,
    ) -> None:
        super().__init__()
        self.features, self.shape = features, tuple(shape)
        self.low, self.high, self.band = low, high, band
        self.scale = Standard(features)
        self.mean = nn.Linear(features, math.prod(shape))
        self.log_std = nn.Linear(features, math.prod(shape))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor, scale: float) -> Gaussian:
        """The distribution of the chain's first state, features [B,F] -> a Gaussian over [B,*E]."""
        seen = self.scale(features)
        mean = self.mean(seen).view(len(seen), *self.shape)
        std = self.log_std(seen).view(len(seen), *self.shape).clamp(self.low, self.high).exp()
        if self.band is not None:
            mean, std = typical(mean, std, self.band)
        return Gaussian(scale * mean, scale * std)

    def attach(self, policy: ChainPolicy) -> ChainPolicy:
        """The policy whose chain starts here; `ValueError` where the event has another shape."""
        return begun_by(self, policy)

    def save(self, folder: Path) -> None:
        """Write the two layers as safetensors and what rebuilds them as json."""
        names = ("features", "shape", "low", "high", "band")
        settings = {name: getattr(self, name) for name in names}
        (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
        save_file(self.state_dict(), folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path, model: Model) -> Self:
        """Read the start."""
        made = cls(**json.loads((folder / SETTINGS).read_text(encoding="utf-8")))
        made.load_state_dict(load_file(folder / WEIGHTS))
        return made.to(model.device)

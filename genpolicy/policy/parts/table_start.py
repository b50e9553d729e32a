"""A table of learned starts: a distribution of the initial noise for each of a few conditions."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genpolicy.chain.prior import USUAL, Bounds
from genpolicy.chain.values import Gaussian, expand
from genpolicy.contracts.model import Model
from genpolicy.policy.parts._start import SETTINGS, WEIGHTS, begun_by
from genpolicy.policy.policy import ChainPolicy

NEAR = 1e-3
"""The distance, as a share of a key's length, up to which features are those of the key: a text
encoder says the same prompt with another rounding in another batch.
"""


class TableStart(nn.Module):
    """x at the first time ~ N(scale mu_i, (scale sigma_i)^2) where the features of what is seen are
    those of row i, and the standard normal elsewhere and at first.

    keys [P,F]: the rows' features. mu, log sigma [P,*E]: a row each, brought between ``bounds``.
    Raises `ValueError` for keys that can't be told apart.
    """

    kind: ClassVar[str] = "table_start"
    slot: ClassVar[str] = "prior"
    version: ClassVar[int] = 2
    keys: Tensor

    def __init__(self, keys: Tensor, shape: tuple[int, ...], bounds: Bounds = USUAL) -> None:
        super().__init__()
        self.shape, self.bounds = tuple(shape), bounds
        self.register_buffer("keys", keys.detach().float().clone())
        if bool((self._distance(self.keys).fill_diagonal_(math.inf) <= 2 * NEAR).any()):
            raise ValueError("two rows of a table of starts have the same features")
        self.mean = nn.Parameter(keys.new_zeros(len(keys), *self.shape, dtype=torch.float32))
        self.log_std = nn.Parameter(torch.zeros_like(self.mean))

    def forward(self, features: Tensor, scale: float) -> Gaussian:
        """The distribution of the chain's first state, features [B,F] -> a Gaussian over [B,*E]."""
        row = self._distance(features).argmin(1)
        known = expand(self.known(features).to(features), self.mean)
        mean, std = self.bounds(known * self.mean[row], known * self.log_std[row])
        return Gaussian(scale * mean, scale * std)

    def known(self, features: Tensor) -> Tensor:
        """True where features [B,F] are those of a row, [B]."""
        return self._distance(features).min(1).values <= NEAR

    def _distance(self, features: Tensor) -> Tensor:
        """Each row's distance from every key, as a share of the key's length, [B,P]."""
        apart = (features.float()[:, None] - self.keys).norm(dim=2)
        return apart / self.keys.norm(dim=1).clamp_min(NEAR)

    def attach(self, policy: ChainPolicy) -> ChainPolicy:
        """The policy whose chain starts here; `ValueError` where the event has another shape."""
        return begun_by(self, policy)

    def save(self, folder: Path) -> None:
        """Write keys and rows as safetensors and what rebuilds them as json."""
        settings = {"shape": self.shape, **asdict(self.bounds)}
        (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
        save_file(self.state_dict(), folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path, model: Model) -> Self:
        """Read the table."""
        tensors = load_file(folder / WEIGHTS)
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        made = cls(tensors["keys"], tuple(settings.pop("shape")), Bounds.read(settings))
        made.load_state_dict(tensors)
        return made.to(model.device)

"""A learned std: noise of the chain that a network says beside the denoiser (ReinFlow)."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genpolicy.chain import Condition, Prediction
from genpolicy.chain.kernel import Mean
from genpolicy.chain.values import Denoiser
from genpolicy.contracts.model import Model
from genpolicy.policy.policy import ChainPolicy

WEIGHTS, SETTINGS = "std.safetensors", "std.json"


class LearnedStd(nn.Module):
    """std(t, features) in [low, high], one per event dim; at first their geometric mean.

    log std^2 = log low^2 + (log high^2 - log low^2) (1 + tanh(network)) / 2

    (ReinFlow, arXiv 2505.22094.) It replaces the std of the kernel at the steps at which the kernel
    acts. A sampler without noise stays without: it acts neither in a sampler of means (kernel
    ``mean``) nor under a kernel that draws no noise (``ddim`` with eta 0), unless the sampler names
    the window of steps that shall draw.
    """

    kind: ClassVar[str] = "learned_std"
    slot: ClassVar[str] = "noise"
    version: ClassVar[int] = 1

    def __init__(self, features: int, dims: int, low: float, high: float, hidden: int = 64) -> None:
        super().__init__()
        self.settings = {
            "features": features,
            "dims": dims,
            "low": low,
            "high": high,
            "hidden": hidden,
        }
        self.low, self.high = 2 * math.log(low), 2 * math.log(high)
        self.network = nn.Sequential(
            nn.Linear(features + 2, hidden), nn.SiLU(), nn.Linear(hidden, dims)
        )
        nn.init.zeros_(self.network[2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.network[2].bias)  # type: ignore[arg-type]

    def forward(self, t: Tensor, features: Tensor) -> Tensor:
        """t [B], features [B,F] -> std [B,dims]."""
        time = torch.stack([t, t**2], -1).to(features)
        place = (self.network(torch.cat([features, time], -1)).tanh() + 1) / 2
        return ((self.low + (self.high - self.low) * place) / 2).exp()

    def attach(self, policy: ChainPolicy) -> ChainPolicy:
        """The policy whose noise has this std; the same policy where its sampler draws no noise."""
        chain = policy.chain
        if isinstance(chain.kernel, Mean) or (chain.window is None and not chain.noisy):
            return replace(policy, noise=None)
        return replace(policy, noise=lambda denoise: _Noisy(denoise, policy.model, self))

    def save(self, folder: Path) -> None:
        """Write the network as safetensors and what rebuilds it as json."""
        (folder / SETTINGS).write_text(json.dumps(self.settings, indent=1) + "\n")
        save_file(self.state_dict(), folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path, model: Model) -> Self:
        """Read the network."""
        made = cls(**json.loads((folder / SETTINGS).read_text(encoding="utf-8")))
        made.load_state_dict(load_file(folder / WEIGHTS))
        return made.to(model.device)


@dataclass(frozen=True)
class _Noisy:
    """The same prediction with a std of its own."""

    denoiser: Denoiser
    model: Model
    std: LearnedStd

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Prediction:
        prediction = self.denoiser(x, t, condition)
        features = self.model.features(condition)
        return replace(prediction, std=self.std(t, features).view_as(x))

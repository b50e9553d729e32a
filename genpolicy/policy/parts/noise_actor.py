"""An actor of the initial noise: where each decision's chain begins, by what is seen."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genpolicy.config.errors import ConfigError, at_least, positive
from genpolicy.contracts.model import Model
from genpolicy.learning.squashed import Squashed, SquashedActor
from genpolicy.policy.parts._settings import read
from genpolicy.policy.parts._start import WEIGHTS, begun_by
from genpolicy.policy.policy import ChainPolicy

SETTINGS = "noise_actor.json"
STD = 0.8
"""The std before the squashing at first: with a bound of 1.5, z has a std of .9 then."""


@dataclass
class _Settings:
    """What rebuilds a `NoiseActor`."""

    features: int  # numbers that are seen
    shape: list[int]  # E
    bound: float  # of every number of z
    hidden: int = 256  # units of each of two layers

    def __post_init__(self) -> None:
        at_least("noise_actor", self, features=1, hidden=1)
        positive("noise_actor", self, "bound")
        if min(self.shape, default=0) < 1:
            raise ConfigError(f"noise_actor: shape is {self.shape}; its numbers must be at least 1")


class NoiseActor(nn.Module):
    """x at the first time = scale z, z = bound tanh(N(mean(s), std(s)^2)) (DSRL, arXiv 2506.15799).

    features: numbers that are seen. shape: E. bound: of every number of z, in stds of the noise
    that the chain usually begins with; a network has rarely seen more than 3 of them.
    """

    kind: ClassVar[str] = "noise_actor"
    slot: ClassVar[str] = "prior"
    version: ClassVar[int] = 1

    def __init__(
        self, features: int, shape: Sequence[int], bound: float, hidden: int = 256
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.settings = _Settings(features, list(self.shape), bound, hidden)
        self.actor = SquashedActor(features, math.prod(shape), bound, hidden, STD)

    def z(self, features: Tensor) -> Squashed:
        """The distribution of z, features [B,F] -> over [B,*E]."""
        return self.actor(features, self.shape)

    def forward(self, features: Tensor, scale: float) -> Squashed:
        """The distribution of the chain's first state, over [B,*E]."""
        z = self.z(features)
        return Squashed(z.before, scale * z.size)

    def attach(self, policy: ChainPolicy) -> ChainPolicy:
        """The policy whose chain starts here; `ValueError` where the event has another shape."""
        return begun_by(self, policy)

    def save(self, folder: Path) -> None:
        """Write the network as safetensors and what rebuilds it as json."""
        (folder / SETTINGS).write_text(json.dumps(asdict(self.settings), indent=1) + "\n")
        save_file(self.state_dict(), folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path, model: Model) -> Self:
        """Read the actor."""
        settings = asdict(read(_Settings, folder / SETTINGS))
        with torch.device("meta"):  # no weights are drawn that the file's would replace
            made = cls(**settings)
        made.load_state_dict(load_file(folder / WEIGHTS, device=str(model.device)), assign=True)
        return made

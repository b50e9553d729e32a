"""Behaviour cloning: supervised training of a denoising policy on recorded episodes (see
`genpolicy.methods.parts.imitation`).

What the averaged weights (optimizer.ema) do in the environments is what is evaluated and saved.
"""

from dataclasses import dataclass
from typing import cast

from genpolicy.config.errors import ConfigError, at_least
from genpolicy.contracts.model import ControlModel
from genpolicy.methods.parts.imitation import Imitation, recorded
from genpolicy.training.run import Run


@dataclass
class BC:
    """batch: rows (frames with the chunk that follows) of one update. updates: of one iteration."""

    batch: int = 256
    updates: int = 100

    def __post_init__(self) -> None:
        at_least("method bc", self, batch=1, updates=1)

    def train(self, run: Run) -> None:
        if run.data is None:
            raise ConfigError(
                "method bc learns from recorded episodes: name them in the data section"
            )
        imitate = Imitation(
            run, recorded(run.data, cast(ControlModel, run.policy.model)), len(run.data), self.batch
        )
        for _ in run.iterations():
            imitate(self.updates)

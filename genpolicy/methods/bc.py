"""Behaviour cloning: supervised training of a denoising policy on recorded episodes (see
`genpolicy.methods.parts.imitation`).

What the averaged weights (optimizer.ema) do in the environments is what is evaluated and saved.
"""

from dataclasses import dataclass
from typing import ClassVar

from genpolicy.config.errors import at_least
from genpolicy.methods.parts.imitation import Imitation, recorded
from genpolicy.training.requirements import Needs
from genpolicy.training.run import Run


@dataclass
class BC:
    """batch: rows (frames with the chunk that follows) of one update. updates: of one iteration."""

    batch: int = 256
    updates: int = 100

    needs: ClassVar[Needs] = Needs(data=True)

    def __post_init__(self) -> None:
        at_least("method bc", self, batch=1, updates=1)

    def train(self, run: Run) -> None:
        assert run.data is not None
        imitate = Imitation(run, recorded(run.data, run.policy.model), len(run.data), self.batch)
        for _ in run.iterations():
            imitate(self.updates)

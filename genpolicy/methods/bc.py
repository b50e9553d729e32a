"""Behaviour cloning: supervised training of a policy on recorded examples (see
`genpolicy.methods.parts.imitation`).

The policy with the averaged weights (optimizer.ema) is what is evaluated and saved.
"""

from dataclasses import dataclass
from typing import ClassVar

from genpolicy.config.errors import at_least
from genpolicy.methods.parts.imitation import Imitation, recorded
from genpolicy.training.requirements import Needs
from genpolicy.training.run import Run


@dataclass
class BC:
    """The settings of behaviour cloning. The defaults are ours."""

    batch: int = 256  # rows (frames with the chunk that follows, or pictures) per update
    updates: int = 100  # per iteration

    needs: ClassVar[Needs] = Needs(data=True)

    def __post_init__(self) -> None:
        at_least("method bc", self, batch=1, updates=1)

    def train(self, run: Run) -> None:
        assert run.data is not None
        source = recorded(run.data, run.policy.model)
        imitate = Imitation(run, source, len(run.data), self.batch)
        for _ in run.iterations():
            imitate(self.updates)

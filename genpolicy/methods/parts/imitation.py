"""Imitation: supervised updates of a denoising policy on what somebody did.

    loss = mean over rows, event dims of  (output(x_t, t, condition) - target)^2,    x_t = alpha(t) x_0 + sigma(t) eps

with x_0 the chunk that was done, t from the family's own training distribution and eps standard
normal: the denoising loss (arXiv 2006.11239 eq. 14; for robots 2303.04137) for every
parametrisation.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from genpolicy.config.errors import at_least, positive, share
from genpolicy.config.schema import OptimizerConfig
from genpolicy.contracts.dataset import Dataset, Pictures
from genpolicy.contracts.model import Model
from genpolicy.contracts.task import Context
from genpolicy.rollout.examples import examples
from genpolicy.training.run import Run

Source = Callable[[Tensor], tuple[Context, Tensor, Tensor | None]]
"""rows [b] -> what was seen, what was done [b,*E], and which of its dims count (None: all)."""


@dataclass
class Cloning:
    """The imitation stage of a method of several: iterations of ``updates`` updates of ``batch``
    frames; lr falls to 0 along a cosine after ``warmup`` updates; ema: decay of the averaged
    weights, which go on. (RL-100: batch 256, 1.4e-4 for large networks; small ones take 1e-3.)
    """

    iterations: int = 20
    updates: int = 100
    batch: int = 128
    lr: float = 1e-3
    warmup: int = 100
    ema: float = 0.995

    def __post_init__(self) -> None:
        at_least("method: imitation", self, iterations=1, updates=1, batch=1, warmup=0)
        positive("method: imitation", self, "lr")
        share("method: imitation", self, "ema")

    def optimizer(self, common: OptimizerConfig) -> OptimizerConfig:
        """Its optimiser, with the experiment's own betas, eps and decay."""
        return replace(
            common, lr=self.lr, warmup=self.warmup, final=0.0, ema=self.ema, max_grad_norm=1.0
        )


@dataclass(frozen=True)
class Imitation:
    """Updates of ``batch`` rows, drawn alike from the ``rows`` of a source; the encoder learns too.
    Every number drawn is a function of the run's seed, its iteration and the update's number.
    """

    run: Run
    source: Source
    rows: int
    batch: int

    def __call__(self, updates: int) -> None:
        """So many updates; counted as samples seen."""
        for update in range(updates):
            self._update(update)
        self.run.seen(self.batch * updates)

    def _update(self, number: int) -> None:
        run = self.run
        model = run.policy.model
        rows, uniform, noise, chance = self.draw(number)
        t = model.times(uniform)

        def losses(part: slice) -> Tensor:
            context, event, mask = self.source(rows[part])
            condition, penalty = model.supervised(context, chance[part])
            return (
                run.policy.supervised_loss(condition, event, t[part], noise[part].to(event), mask)
                + penalty
            )

        run.descend(losses, len(rows), "bc")

    def draw(self, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This process's share of a batch: rows [b], uniform numbers for the times [b], noise
        [b,*E], uniform numbers for the encoder [b,draws]. number: of the update in its iteration.
        """
        run, batch, model = self.run, self.batch, self.run.policy.model
        generator = run.generator("imitation", number)
        rows = generator.integers(self.rows, size=batch)
        uniform = generator.random(batch)
        noise = generator.standard_normal((batch, *model.event_shape), dtype=np.float32)
        chance = generator.random((batch, model.draws))
        place = run.mine(np.arange(batch))
        everything = (torch.from_numpy(drawn) for drawn in (rows, uniform, noise, chance))
        mine = [drawn[place] for drawn in everything]
        return mine[0], mine[1], mine[2], mine[3]


def recorded(data: Dataset | Pictures, model: Model) -> Source:
    """The rows of a data set: frames with the chunk that follows, or captioned pictures."""
    return partial(examples, data, model)

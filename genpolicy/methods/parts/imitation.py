"""Imitation: supervised updates of a policy on recorded examples.

    loss = mean over rows and event dims of (output(x_t, t, condition) - target)^2,
    x_t  = alpha(t) x_0 + sigma(t) eps

with x_0 the chunk (or picture) of the example, t from the family's own training distribution and
eps standard normal: the denoising loss (arXiv 2006.11239 eq. 14; for robots 2303.04137) for every
parametrisation. A policy of tokens has the mean of -log p(token | tokens before it) in its place
(`ChainPolicy.supervised_loss`).
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
"""Rows [b] -> the contexts, the events [b,*E], and which of their dims count (None: all)."""


@dataclass
class Cloning:
    """The imitation stage of a method of several stages. Defaults without a source are ours."""

    iterations: int = 20  # length of the stage
    updates: int = 100  # per iteration
    batch: int = 128  # frames per update; 256 in RL-100
    # peak learning rate, which falls to 0 along a cosine; RL-100 has 1.4e-4 for large networks
    lr: float = 1e-3
    warmup: int = 100  # updates of linear rise
    ema: float = 0.995  # decay per update of the averaged weights, with which the run goes on

    def __post_init__(self) -> None:
        at_least("method: imitation", self, iterations=1, updates=1, batch=1, warmup=0)
        positive("method: imitation", self, "lr")
        share("method: imitation", self, "ema")

    def optimizer(self, common: OptimizerConfig) -> OptimizerConfig:
        """The stage's optimiser, with the experiment's own betas, eps and decay."""
        return replace(
            common, lr=self.lr, warmup=self.warmup, final=0.0, ema=self.ema, max_grad_norm=1.0
        )


@dataclass(frozen=True)
class Imitation:
    """Supervised updates of a run's policy, its encoder among it. Every number drawn is a function
    of the run's seed, its iteration and the update's number.
    """

    run: Run
    source: Source
    rows: int  # rows of the source, each drawn with the same probability
    batch: int  # rows per update, of all processes together
    weights: Tensor | None = None  # of the source's rows, [rows]; None: all alike

    def __call__(self, updates: int) -> None:
        """Makes ``updates`` updates and counts their rows as samples."""
        for update in range(updates):
            self._update(update)
        self.run.seen(self.batch * updates)

    def _update(self, number: int) -> None:
        run = self.run
        model = run.policy.model
        rows, uniform, noise, chance = self.draw(number)
        times = model.times(uniform)

        def losses(part: slice) -> Tensor:
            context, event, mask = self.source(rows[part])
            condition, penalty = model.supervised(context, chance[part])
            drawn = noise[part].to(event)
            loss = run.policy.supervised_loss(condition, event, times[part], drawn, mask) + penalty
            return loss if self.weights is None else self.weights[rows[part]].to(loss) * loss

        run.descend(losses, len(rows), "bc")

    def draw(self, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draws this process's share of a batch: rows [b], uniform numbers for the times [b], noise
        [b,*E], uniform numbers for the encoder [b,draws]. number: of the update in its iteration.
        """
        run = self.run
        model = run.policy.model
        batch = self.batch
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
    """The source over a data set: frames with the chunk that follows, or captioned pictures."""
    return partial(examples, data, model)

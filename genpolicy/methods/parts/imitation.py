"""Imitation: supervised updates of a denoising policy on what somebody did.

    loss = mean over rows, event dims of  (output(x_t, t, condition) - target)^2,    x_t = alpha(t) x_0 + sigma(t) eps

with x_0 the chunk that was done, t from the family's own training distribution and eps standard
normal: the denoising loss (arXiv 2006.11239 eq. 14; for robots 2303.04137) for every
parametrisation.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from genpolicy.config.errors import at_least, positive, share
from genpolicy.config.schema import OptimizerConfig
from genpolicy.contracts.dataset import Dataset
from genpolicy.contracts.model import ControlModel
from genpolicy.contracts.task import Context
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
            self._update([self.run.experiment.seed % 2**64, self.run.iteration, update])
        self.run.seen(self.batch * updates)

    def _update(self, key: list[int]) -> None:
        run = self.run
        model = cast(ControlModel, run.policy.model)
        rows, uniform, noise, chance = self.draw(key)
        t = model.times(uniform)

        def losses(part: slice) -> Tensor:
            context, event, mask = self.source(rows[part])
            condition, penalty = model.supervised(context, chance[part])
            return (
                run.policy.supervised_loss(condition, event, t[part], noise[part].to(event), mask)
                + penalty
            )

        run.descend(losses, len(rows), "bc")

    def draw(self, key: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This process's share of the batch: rows, uniform numbers for the times, noise, uniform
        numbers for the encoder.
        """
        generator = np.random.default_rng(key)
        share = slice(self.run.processes.index, None, self.run.processes.count)
        rows = generator.integers(self.rows, size=self.batch)[share]
        uniform = generator.random(self.batch)[share]
        shape = (self.batch, *self.run.policy.model.event_shape)
        noise = generator.standard_normal(shape, dtype=np.float32)[share]
        chance = generator.random((self.batch, cast(ControlModel, self.run.policy.model).draws))[
            share
        ]
        return tuple(torch.from_numpy(drawn.copy()) for drawn in (rows, uniform, noise, chance))  # type: ignore[return-value]


def recorded(data: Dataset, model: ControlModel) -> Source:
    """The frames of a data set, each with the chunk that follows it."""

    def source(rows: Tensor) -> tuple[Context, Tensor, Tensor | None]:
        context, actions, pad = data.rows(rows, model.history, model.horizon)
        return context, model.event(actions), model.event_mask(pad)

    return source

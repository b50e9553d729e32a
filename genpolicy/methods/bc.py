"""Behaviour cloning: supervised training of a denoising policy on recorded episodes.

    loss = mean over rows, event dims of  (output(x_t, t, observation) - target)^2,    x_t = alpha(t) x_0 + sigma(t) eps

with x_0 the recorded chunk of actions, t from the family's own training distribution and eps standard normal: the
denoising loss (arXiv 2006.11239 eq. 14; for robots 2303.04137) for every parametrisation. What the averaged weights
(optimizer.ema) do in the environments is what is evaluated and saved.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from genpolicy.config import ConfigError, at_least
from genpolicy.policy import ControlModel
from genpolicy.run import Run


@dataclass
class BC:
    """batch: rows (frames with the chunk that follows) of one update. updates: of one iteration."""

    batch: int = 256
    updates: int = 100

    def __post_init__(self) -> None:
        at_least("method bc", self, batch=1, updates=1)

    def train(self, run: Run) -> None:
        if run.data is None:
            raise ConfigError("method bc learns from recorded episodes: name them in the data section")
        model, data = cast(ControlModel, run.policy.model), run.data
        for iteration in run.iterations():
            for update in range(self.updates):
                rows, uniform, noise = self._draw(run, len(data), [run.experiment.seed % 2**64, iteration, update])
                t = model.times(uniform)

                def losses(part: slice, rows: Tensor = rows, t: Tensor = t, noise: Tensor = noise) -> Tensor:
                    context, actions, pad = data.rows(rows[part], model.history, model.horizon)
                    condition, event = model.encode(context), model.event(actions)
                    return run.policy.supervised_loss(
                        condition, event, t[part], noise[part].to(event), model.event_mask(pad)
                    )

                run.descend(losses, len(rows), "bc")
            run.seen(self.batch * self.updates)

    def _draw(self, run: Run, frames: int, key: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """This process's share of the batch: frames, uniform numbers for the times, noise; a pure function of ``key``."""
        generator = np.random.default_rng(key)
        share = slice(run.processes.index, None, run.processes.count)
        rows = generator.integers(frames, size=self.batch)[share]
        uniform = generator.random(self.batch)[share]
        shape = (self.batch, *run.policy.model.event_shape)
        noise = generator.standard_normal(shape, dtype=np.float32)[share]
        return torch.from_numpy(rows.copy()), torch.from_numpy(uniform.copy()), torch.from_numpy(noise.copy())

"""One optimiser step on the mean of a loss over rows of all processes, in micro-batches."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from genpolicy.contracts.model import Model
from genpolicy.rollout.micro_batch import MicroBatches
from genpolicy.training.optimizer import Optimizer
from genpolicy.training.processes import Processes

Terms = Iterable[tuple[Tensor, Mapping[str, Tensor]]]
"""(loss [b], metrics by name [b]) of the same b rows, one after the other (denoising steps)."""


class Updates:
    """Optimiser steps that are the same whatever the number of processes and of micro-batches."""

    def __init__(self, processes: Processes, micro_batches: MicroBatches) -> None:
        self.processes, self.micro_batches = processes, micro_batches

    def step(
        self,
        terms: Callable[[slice], Terms],
        rows: int,
        optimizers: Sequence[Optimizer],
        progress: float,
        model: Model,
        *,
        each: int = 1,
        whole: int = 1,
    ) -> tuple[dict[str, float], float]:
        """Descend the mean of the losses over this process's ``rows``, everybody else's, and terms.

        terms(part): ``each`` losses of a stretch of rows, every one of which is differentiated
        before the next is asked for, so that one graph is alive at a time. A process may have no
        row. progress: of the learning rates. model: its evaluations are counted once, also where
        memory ran out. whole: consecutive rows that no micro-batch divides. Returns the means of
        the loss and its metrics, and the gradient's norm of the first optimiser.
        """
        count = int(self.processes.sum(float(rows * each)))
        sums: dict[str, Tensor] = {}
        counted = model.evaluations

        def accumulate(part: slice) -> None:
            for loss, metrics in terms(part):
                optimizers[0].backward(loss.sum() / count)
                for name, value in {"loss": loss, **metrics}.items():
                    total = value.detach().double().sum()
                    sums[name] = sums[name] + total if name in sums else total

        def restart() -> None:
            for optimizer in optimizers:
                optimizer.zero_grad()
            sums.clear()
            model.evaluations = counted

        restart()
        if rows:
            self.micro_batches(accumulate, rows, whole, restart)
        norm = optimizers[0].step(progress)
        for optimizer in optimizers[1:]:
            optimizer.step(progress)
        # one read of the device for all metrics
        totals = torch.stack(list(sums.values())).tolist() if sums else []
        everybody = self.processes.sums(dict(zip(sums, totals, strict=True)))
        return {name: total / count for name, total in everybody.items()}, norm

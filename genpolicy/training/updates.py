"""One optimiser step on the mean of a loss over rows of all processes, in micro-batches."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from genpolicy.contracts.model import Model
from genpolicy.learning.objective import Scored
from genpolicy.policy.policy import ChainPolicy
from genpolicy.policy.weights import Weights
from genpolicy.rollout.minibatch import Batch
from genpolicy.rollout.rollout import Rollout
from genpolicy.training.optimizer import Optimizer, step_together
from genpolicy.training.workspace import Workspace

Terms = Iterable[tuple[Tensor, Mapping[str, Tensor]]]
"""(loss [b], metrics by name [b]) of the same b rows, one after the other (denoising steps)."""


Loss = Callable[[Scored], tuple[Tensor, Mapping[str, Tensor]]]
"""A scored step of b rows -> (loss [b], metrics by name [b]). Pure."""

Losses = Callable[[slice], Tensor | tuple[Tensor, Mapping[str, Tensor]]]
"""A stretch of rows -> their losses [b], or those and metrics by name [b]."""


class Updates:
    """Optimiser steps that are the same whatever the number of processes and of micro-batches."""

    def __init__(self, workspace: Workspace) -> None:
        self.processes, self.metrics = workspace.processes, workspace.metrics
        self.micro_batches = workspace.micro_batches

    def on_rollout(
        self,
        policy: ChainPolicy,
        rollout: Rollout,
        batch: Batch,
        advantage: Tensor,
        loss: Loss,
        reference: Weights | None,
        optimizers: Sequence[Optimizer],
        pace: float,
    ) -> dict[str, float]:
        """One step on stored denoising steps of a rollout; see `Run.update`."""
        self.metrics.phase("update")
        events = rollout.trajectory.x0
        rows = rollout.rows(advantage) if advantage.ndim > 1 else advantage.to(events)
        chains, advantages = rollout.trajectory[batch.rows], rows[batch.rows]
        steps = list(chains.steps) if batch.k is None else [batch.k]

        def terms(part: slice) -> Terms:
            for k in steps:
                here = k if isinstance(k, int) else k[part]
                yield loss(policy.score(chains[part], here, advantages[part], reference))

        rate = optimizers[0].lr(pace)
        whole = chains.shared * batch.whole
        means, norm = self._step(
            terms, len(chains), optimizers, pace, policy.model, len(steps), whole
        )
        found = {f"policy/{name}": value for name, value in means.items()}
        self.metrics.log_all({"lr": rate, "grad_norm": norm, **found})
        self.metrics.phase(None)
        return means

    def on_rows(
        self,
        losses: Losses,
        rows: int,
        name: str,
        phase: str,
        optimizer: Optimizer,
        pace: float,
        model: Model,
    ) -> dict[str, float]:
        """One step on any losses of rows; see `Run.descend`."""
        self.metrics.phase(phase)

        def terms(part: slice) -> Terms:
            found = losses(part)
            yield (found, {}) if isinstance(found, Tensor) else found

        rate = optimizer.lr(pace)
        means, norm = self._step(terms, rows, [optimizer], pace, model, 1, 1)
        found = {"lr": rate, "grad_norm": norm, **means}
        self.metrics.log_all({f"{name}/{key}": value for key, value in found.items()})
        self.metrics.phase(None)
        return means

    def _step(
        self,
        terms: Callable[[slice], Terms],
        rows: int,
        optimizers: Sequence[Optimizer],
        pace: float,
        model: Model,
        each: int,
        whole: int,
    ) -> tuple[dict[str, float], float]:
        """Descend the mean of the losses over this process's ``rows``, everybody else's, and terms.

        terms(part): ``each`` losses of a stretch of rows, every one of which is differentiated
        before the next is asked for, so that one graph is alive at a time. A process may have no
        row; where nobody has one, nothing is done. pace: of the learning rates. model: its
        evaluations are counted once, also where memory ran out. whole: consecutive rows that no
        micro-batch divides. Returns the means of the loss and its metrics, and the gradient's norm
        of the first optimiser. Raises `FloatingPointError` before anything is applied where the
        loss, or the norm, is not finite.
        """
        alone = self.processes.count == 1
        count = rows * each if alone else int(self.processes.sum(float(rows * each)))
        if not count:
            return {}, 0.0
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
        # one read of the device for all metrics
        totals = torch.stack(list(sums.values())).tolist() if sums else []
        mine = dict(zip(sums, totals, strict=True))
        everybody = mine if alone else self.processes.sums(mine)
        means = {name: total / count for name, total in everybody.items()}
        if not math.isfinite(means["loss"]):
            # no scale of fp16's gradients mends it
            raise FloatingPointError(
                f"the loss is {means['loss']}: nothing was applied; the last checkpoint is intact"
            )
        return means, step_together(optimizers, pace)

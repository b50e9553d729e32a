"""The optimiser and what surrounds it: AdamW, learning-rate schedule, gradient scaler, clipping,
averaged weights.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from genpolicy.config.schema import OptimizerConfig
from genpolicy.policy.weights import swapped

FUSED = ("cpu", "cuda", "mps", "xpu")
"""Devices on which torch updates all parameters in one kernel."""
OVERFLOWS = 20
"""Updates in a row whose gradients overflow fp16 before the run stops: a scale that begins at 65536
and halves each time is below .1 by then, and another one overflows no less.
"""


class Optimizer:
    """AdamW over ``parameters`` with everything an update needs; it has a state_dict.

    ``reduce`` sums a flat gradient over processes (None: one process). fp16 networks get a gradient
    scaler. updates: applied so far; overflows: updates in a row that were skipped since then.
    """

    def __init__(
        self,
        settings: OptimizerConfig,
        parameters: Sequence[torch.nn.Parameter],
        fp16: bool,
        reduce: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.settings, self.parameters, self.reduce = settings, list(parameters), reduce
        self.updates = self.overflows = 0
        o, device = settings, self.parameters[0].device.type
        self.adamw = torch.optim.AdamW(
            self.parameters,
            lr=o.lr,
            betas=o.betas,
            eps=o.eps,
            weight_decay=o.weight_decay,
            fused=device in FUSED,
        )
        self.scaler = torch.amp.GradScaler(device, enabled=fp16)
        self.ema = [p.detach().clone() for p in self.parameters] if o.ema else None

    def lr(self, progress: float) -> float:
        """Linear warm-up over updates, then a cosine over ``progress`` in [0, 1] of the budget down
        to final * lr.
        """
        o = self.settings
        rise = min(1.0, (self.updates + 1) / o.warmup) if o.warmup else 1.0
        return (
            o.lr
            * rise
            * (o.final + (1 - o.final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
        )

    def renew(self) -> None:
        """Forget the moments and the number of updates, as if it had just been made."""
        self.adamw.state.clear()
        self.updates = self.overflows = 0

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.adamw.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients, scaled for fp16."""
        self.scaler.scale(loss).backward()

    def norm(self, scaler: torch.amp.GradScaler) -> Tensor:
        """Sum the gradients over processes, divide them by ``scaler``'s scale and clip them; return
        their norm before clipping, a scalar.
        """
        if self.reduce is not None:
            # what nobody reached keeps no gradient, as in one process: weight decay then leaves it
            # alone
            there = (
                self.reduce(torch.tensor([float(p.grad is not None) for p in self.parameters])) > 0
            )
            reached = [
                p for p, anybody in zip(self.parameters, there.tolist(), strict=True) if anybody
            ]
            flat = self.reduce(torch.cat([_gradient(p).flatten() for p in reached]))
            for parameter, gradient in zip(
                reached, flat.split([p.numel() for p in reached]), strict=True
            ):
                parameter.grad = gradient.view_as(parameter).clone()
        scaler.unscale_(self.adamw)
        return torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)

    def apply(self, progress: float) -> None:
        """Change the parameters by their gradients as they are, and average."""
        for group in self.adamw.param_groups:
            group["lr"] = self.lr(progress)
        self.adamw.step()
        self.updates += 1
        if self.ema is not None:
            decay = min((1 + self.updates) / (10 + self.updates), self.settings.ema)
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1 - decay)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """The averaged weights, if any, in the parameters' place."""
        return contextlib.nullcontext() if self.ema is None else swapped(self.parameters, self.ema)

    def state_dict(self) -> dict[str, Any]:
        """The whole state except the parameters."""
        return {
            "updates": self.updates,
            "adamw": self.adamw.state_dict(),
            "scaler": self.scaler.state_dict(),
            "overflows": self.overflows,
            "ema": self.ema,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.updates = state["updates"]
        # older checkpoints did not count them
        self.overflows = state.get("overflows", 0)
        self.adamw.load_state_dict(state["adamw"])
        o = self.settings
        for group in (
            self.adamw.param_groups
        ):  # what was asked for now, not what the checkpoint was made with
            group.update(betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema = [
                value.to(p.device) for value, p in zip(state["ema"], self.parameters, strict=True)
            ]


def step_together(optimizers: Sequence[Optimizer], progress: float) -> float:
    """Apply the gradients that the first optimiser's `Optimizer.backward` made, all or none; return
    the norm of the first one's before clipping. progress: in [0, 1] of the budget, for the rates.

    Raises `FloatingPointError`, with nothing applied, for a norm that is not finite. In fp16 that
    may be the scale's doing: the update is skipped with a smaller one, `OVERFLOWS` times in a row.
    """
    first = optimizers[0]
    scaler = first.scaler
    if scaler.is_enabled():
        # a process without rows has scaled no loss, and the scaler begins with its first one
        scaler.scale(torch.zeros((), device=first.parameters[0].device))
    norms = torch.stack([one.norm(scaler).to(first.parameters[0].device) for one in optimizers])
    whole = bool(norms.isfinite().all())
    if whole:
        for one in optimizers:
            one.apply(progress)
    scaler.update()
    first.overflows = 0 if whole else first.overflows + 1
    if not whole and not scaler.is_enabled():
        worst = float(norms[~norms.isfinite()][0])
        raise FloatingPointError(
            f"the gradient's norm is {worst}: nothing was applied; the last checkpoint is intact"
        )
    if first.overflows >= OVERFLOWS:
        raise FloatingPointError(
            f"the gradients have overflowed fp16 in {OVERFLOWS} updates in a row, down to a scale"
            f" of {scaler.get_scale():g}: nothing was applied in them; use precision bf16 or fp32,"
            " or a smaller learning rate"
        )
    return float(norms[0])


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

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


class Optimizer:
    """AdamW over ``parameters`` with everything an update needs; it has a state_dict.

    ``reduce`` sums a flat gradient over processes (None: one process). fp16 networks get a gradient
    scaler.
    """

    def __init__(
        self,
        settings: OptimizerConfig,
        parameters: Sequence[torch.nn.Parameter],
        fp16: bool,
        reduce: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.settings, self.parameters, self.reduce = settings, list(parameters), reduce
        self.updates = 0
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

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.adamw.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients, scaled for fp16."""
        self.scaler.scale(loss).backward()

    def step(self, progress: float) -> float:
        """Sum the gradients over processes, clip, apply, average; returns the gradient's norm
        before clipping.

        A norm that is not finite raises `FloatingPointError` before anything is applied (fp16: the
        scaler skips the step).
        """
        if self.reduce is not None:
            # a process without rows has scaled no loss, and the scaler begins with its first one
            self.scaler.scale(torch.zeros((), device=self.parameters[0].device))
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
        self.scaler.unscale_(self.adamw)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        if not self.scaler.is_enabled() and not bool(norm.isfinite()):
            raise FloatingPointError(
                f"the gradient's norm is {float(norm)}: nothing was applied;"
                " the last checkpoint is intact"
            )
        for group in self.adamw.param_groups:
            group["lr"] = self.lr(progress)
        self.scaler.step(self.adamw)
        self.scaler.update()
        self.updates += 1
        if self.ema is not None:
            decay = min((1 + self.updates) / (10 + self.updates), self.settings.ema)
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1 - decay)
        return float(norm)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """The averaged weights, if any, in the parameters' place."""
        return contextlib.nullcontext() if self.ema is None else swapped(self.parameters, self.ema)

    def state_dict(self) -> dict[str, Any]:
        """The whole state except the parameters."""
        return {
            "updates": self.updates,
            "adamw": self.adamw.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.updates = state["updates"]
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


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

"""Wrappers of a denoiser: classifier-free guidance, and clipping of the predicted x0."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from genpolicy.chain.schedule import Schedule
from genpolicy.chain.values import Condition, Denoiser, Prediction, expand


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (arXiv 2207.12598) as two unguided evaluations:

        p = p_negative + scale (p_positive - p_negative),    p in {x0, eps}
        (linear in the network's output)

    The negative branch is evaluated outside the graph: the gradient is that of a loss that detaches
    it, and its backward is saved. ``negative_gradient`` differentiates it too, as the public DDPO
    and Flow-GRPO scripts do. Outside ``interval`` = (low, high] in noise time t the negative branch
    is not evaluated at all.
    """

    denoiser: Denoiser
    negative: Callable[[Condition], Condition]
    scale: float
    interval: tuple[float, float] = (0.0, float("inf"))
    negative_gradient: bool = False

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Prediction:
        low, high = self.interval
        guided = (t > low) & (t <= high)
        positive = self.denoiser(x, t, condition)
        if self.scale == 1.0 or not bool(guided.any()):
            return positive
        with torch.set_grad_enabled(self.negative_gradient and torch.is_grad_enabled()):
            negative = self.denoiser(x, t, self.negative(condition))
        weight = expand(torch.where(guided, self.scale, 1.0), x)
        return Prediction(
            negative.x0 + weight * (positive.x0 - negative.x0),
            negative.eps + weight * (positive.eps - negative.eps),
            positive.std,
        )


@dataclass(frozen=True)
class ClipX0:
    """Clamp the predicted x0 into [-bound, bound]; the gain is 0 where it acts.

    ``recompute_eps``: take eps = (x - alpha x0)/sigma of the clipped x0 (diffusers' DDPM does, its
    DDIM does not).
    """

    denoiser: Denoiser
    schedule: Schedule
    bound: float = 1.0
    recompute_eps: bool = True

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Prediction:
        prediction = self.denoiser(x, t, condition)
        x0 = prediction.x0.clamp(-self.bound, self.bound)
        if not self.recompute_eps:
            return Prediction(x0, prediction.eps, prediction.std)
        x = x.float()
        alpha, sigma = expand(self.schedule.alpha(t), x), expand(self.schedule.sigma(t), x)
        return Prediction(x0, (x - alpha * x0) / sigma, prediction.std)

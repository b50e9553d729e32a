"""The values that travel along a chain: Gaussian, Prediction, Condition."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, Self, cast

import torch
from torch import Tensor

Reduce = Literal["sum", "mean", "none"]
Parametrisation = Literal["epsilon", "sample", "v_prediction", "velocity"]


def expand(value: Tensor, like: Tensor) -> Tensor:
    """Reshape a coefficient [B] (or [B,T] per token) so that it broadcasts over ``like`` [B,*E], in
    its dtype, on its device.
    """
    return (
        value.reshape(value.shape + (1,) * (like.ndim - value.ndim)).to(like.dtype).to(like.device)
    )


def reduce_event(value: Tensor, reduce: Reduce, mask: Tensor | None = None) -> Tensor:
    """Reduce [B,*E] over E to [B]; with ``mask`` (bool, broadcastable to [B,*E]) only over the dims
    it keeps.
    """
    if reduce == "none":
        return value
    if reduce not in ("sum", "mean"):
        raise ValueError(f"reduce is {reduce!r}; valid are 'sum', 'mean', 'none'")
    if mask is None:
        flat = value.flatten(1)
        return flat.sum(1) if reduce == "sum" else flat.mean(1)
    kept = mask.expand_as(value).flatten(1)
    if not bool(kept.any(1).all()):
        raise ValueError("a mask keeps no event dim of some row: there is nothing to reduce")
    total = torch.where(kept, value.flatten(1), 0.0).sum(1)
    return total if reduce == "sum" else total / kept.sum(1)


@dataclass(frozen=True)
class Gaussian:
    """Diagonal N(mean, std^2 I) over E. mean [B,*E]; std broadcastable to it; a dim with std 0 is a
    point.

    A point has no density: ``log_prob`` and ``kl`` raise on it unless ``mask`` (bool, broadcastable
    to [B,*E], True = counts) leaves it out. Masked-out dims are removed *before* dividing, so that
    their gradients are 0, not NaN.
    """

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """x = mean + std * noise, [B,*E]."""
        return self.mean + self.std * noise

    def log_prob(self, x: Tensor, *, reduce: Reduce, mask: Tensor | None = None) -> Tensor:
        """log N(x; mean, std^2) = -(x-mean)^2 / (2 std^2) - log std - log(2 pi)/2, reduced over E
        as asked.

        ``reduce`` has no default on purpose: clip ranges only mean something beside it ("mean":
        1e-6..1e-3 on images, "sum": 0.1..0.3).
        """
        std = self._density_std(mask)
        difference = _keep(x - self.mean, mask)
        density = -0.5 * (difference / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
        return reduce_event(_keep(density, mask), reduce, mask)

    def kl(self, other: "Gaussian", *, reduce: Reduce, mask: Tensor | None = None) -> Tensor:
        """KL(self || other) = log(s2/s1) + (s1^2 + (m1-m2)^2) / (2 s2^2) - 1/2, reduced over E as
        asked.
        """
        std, other_std = self._density_std(mask), other._density_std(mask)
        difference = _keep(self.mean - other.mean, mask)
        ratio = std / other_std
        divergence = 0.5 * (ratio**2 - 1 + (difference / other_std) ** 2) - ratio.log()
        return reduce_event(_keep(divergence, mask), reduce, mask)

    def _density_std(self, mask: Tensor | None) -> Tensor:
        std = self.std.expand_as(self.mean)
        if mask is not None:
            std = torch.where(mask, std, 1.0)
        if not bool((std > 0).all()):
            raise ValueError(
                "a transition with std 0 is a point and has no density: score only steps inside the"
                " stochastic window"
            )
        return std


def _keep(value: Tensor, mask: Tensor | None) -> Tensor:
    return value if mask is None else torch.where(mask, value, 0.0)


@dataclass(frozen=True)
class Prediction:
    """The output of a network, in one currency: x_t = alpha x0 + sigma eps. x0, eps [B,*E] in fp32.

    ``std`` only where the network itself says it (learned noise, ReinFlow).
    """

    x0: Tensor
    eps: Tensor
    std: Tensor | None = None

    @classmethod
    def of(
        cls, kind: Parametrisation, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor
    ) -> Self:
        """Translate a network output [B,*E] at x_t [B,*E] with alpha(t), sigma(t) [B] (or [B,T]).

        epsilon: eps = out, x0 = (x - sigma out)/alpha. sample: x0 = out, eps = (x - alpha
        out)/sigma. v_prediction (alpha^2 + sigma^2 = 1): x0 = alpha x - sigma out, eps = alpha out
        + sigma x. velocity (alpha + sigma = 1, out = eps - x0): x0 = x - sigma out, eps = x + alpha
        out. Everything is done in fp32 whatever dtype the network ran in.
        """
        x, output = x.float(), output.float()
        a, s = expand(alpha, x), expand(sigma, x)
        if kind == "epsilon":
            return cls((x - s * output) / a, output)
        if kind == "sample":
            return cls(output, (x - a * output) / s)
        if kind == "v_prediction":
            return cls(a * x - s * output, a * output + s * x)
        if kind == "velocity":
            return cls(x - s * output, x + a * output)
        raise ValueError(
            f"parametrisation {kind!r} is unknown; valid are epsilon, sample, v_prediction,"
            " velocity"
        )


def output_gain(kind: Parametrisation, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(d x0 / d output, d eps / d output) of ``Prediction.of``, scalars per row [B]."""
    one = torch.ones_like(alpha)
    gains = {
        "epsilon": (-sigma / alpha, one),
        "sample": (one, -alpha / sigma),
        "v_prediction": (-sigma, alpha),
        "velocity": (-sigma, alpha),
    }
    return gains[kind]


class Condition(Protocol):
    """The condition of a network, encoded once per prompt or observation: B rows that can
    be picked.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor | slice, /) -> "Condition": ...


class Rows(Condition, Protocol):
    """A condition that is no tensor, of which several can be joined."""

    @classmethod
    def cat(cls, parts: Sequence[Any]) -> Self:
        """The rows of several conditions of this class, one after the other."""
        ...


def joined(parts: Sequence[Condition]) -> Condition:
    """The rows of several conditions of one model, one after the other: tensors, or `Rows`."""
    if isinstance(parts[0], Tensor):
        return torch.cat(cast(list[Tensor], list(parts)))
    return cast(type[Rows], type(parts[0])).cat(parts)


Denoiser = Callable[[Tensor, Tensor, Condition], Prediction]
"""(x_t [B,*E], t [B] or [B,T], condition of B rows) -> Prediction: one network evaluation, counted
by its owner.
"""


@dataclass(frozen=True)
class Coefficients:
    """mean = x * x_t + x0 * x0_hat + eps * eps_hat; std is the total std. Each [B] (or [B,T]) in
    fp64. One row, [1] (or [1,T]), stands for as many as there are.
    """

    x: Tensor
    x0: Tensor
    eps: Tensor
    std: Tensor

    @cached_property
    def uses_x(self) -> bool:
        """True where x_t itself enters the mean of some row."""
        return bool((self.x != 0).any())

    @cached_property
    def noisy(self) -> bool:
        """True where some row has a std above 0."""
        return bool((self.std > 0).any())

    def gaussian(self, x: Tensor, prediction: Prediction) -> Gaussian:
        """The Gaussian over x_s, in at least fp32 whatever the network ran in. x [B,*E].

        Where the network says its own std (ReinFlow), that is the std of the transition.
        """
        x = x.float()
        mean = expand(self.x0, x) * prediction.x0 + expand(self.eps, x) * prediction.eps
        if self.uses_x:
            mean = mean + expand(self.x, x) * x
        if prediction.std is not None:
            return Gaussian(mean, prediction.std)
        std = expand(self.std, x)
        return Gaussian(mean, std.expand(len(x), *std.shape[1:]).clone())

    def gain(self, d_x0: Tensor, d_eps: Tensor) -> Tensor:
        """d mean / d network output, [B]; d_x0, d_eps from `output_gain`. It can be negative: weigh
        by |gain|.
        """
        return self.x0 * d_x0 + self.eps * d_eps

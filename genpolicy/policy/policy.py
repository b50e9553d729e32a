"""The contracts of a policy: `Model`, a family of networks, and `ChainPolicy`, a model with its
sampler.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from genpolicy.chain import Chain, ClipX0, Condition, Guidance, Noise, Prediction, Trajectory
from genpolicy.chain.kernel import gain
from genpolicy.chain.schedule import Step
from genpolicy.chain.values import Denoiser, Gaussian, expand, output_gain, reduce_event
from genpolicy.contracts.model import Model


@dataclass(frozen=True)
class Base:
    """A frozen network for the noisier part of a chain: values of the model's trainable parameters,
    used at noise times above ``above`` (DPPO's steps before the last K').
    """

    weights: Sequence[Tensor]
    above: float


Judge = Callable[[Tensor, Tensor], Tensor]
"""(features [B,F], scored event [B,*E]) -> what that decision is worth, [B]: a critic, as the
sampler sees it.
"""


StdOf = Callable[[Tensor, Tensor], Tensor]
"""(t [B], features [B,F]) -> std [B,*E]: noise that is learned beside the network (ReinFlow)."""


@dataclass(frozen=True)
class ChainPolicy:
    """A model and the sampler that acts: a chain with its guidance. The sampler is part of the
    policy.

    guidance: classifier-free scale, 1 is none (one evaluation a step). guidance_interval: (low,
    high] in noise time. negative_gradient: differentiate the unconditional branch too (see
    `Guidance`). base: who denoises the noisier part, if not the network that learns. std_of: what
    replaces the kernel's std, if the noise is learned. best_of: samples that are drawn for a
    decision; ``judge`` picks the one that is carried out. Such a policy acts and is not trained:
    the chosen chain's likelihood is not the sampler's.
    """

    model: Model
    chain: Chain
    guidance: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, float("inf"))
    negative_gradient: bool = False
    base: Base | None = None
    std_of: StdOf | None = None
    best_of: int = 1
    judge: Judge | None = None

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser that acts *and* is scored: the model, clipped and guided where family and
        sampler say so.
        """
        denoise = self.model.denoise
        if self.model.clip is not None:
            denoise = ClipX0(denoise, self.model.schedule, *self.model.clip)
        if self.guidance != 1.0:
            negative, interval = self.model.negative, self.guidance_interval
            denoise = Guidance(denoise, negative, self.guidance, interval, self.negative_gradient)
        if self.base is not None:
            denoise = _Handover(denoise, list(self.model.trainable().values()), self.base)
        if self.std_of is not None:
            denoise = _LearnedStd(denoise, self.model.features, self.std_of)
        return denoise

    def with_window(self, window: tuple[int, int] | None) -> "ChainPolicy":
        """The same policy whose kernel acts inside another window of steps."""
        return replace(self, chain=replace(self.chain, window=window))

    def sample(self, condition: Condition, noise: Noise, **options: Any) -> Trajectory:
        """`Chain.sample` with this policy's denoiser; of ``best_of`` samples of every row the one
        that is judged best.
        """
        if self.best_of > 1:
            return self._best(condition, noise, **options)
        return self.chain.sample(
            self.denoiser,
            condition,
            noise,
            self.model.event_shape,
            device=self.model.device,
            **options,
        )

    @torch.no_grad()
    def _best(self, condition: Condition, noise: Noise, **options: Any) -> Trajectory:
        assert self.judge is not None, "a best-of-N sampler needs a judge"
        every = torch.arange(len(noise)).repeat_interleave(self.best_of)
        many, draws = condition[every], noise.fan(self.best_of)
        drawn = replace(self, best_of=1).sample(many, draws, **options)
        worth = self.judge(self.model.features(condition)[every], self.model.scored(drawn.x0))
        best = worth.view(-1, self.best_of).argmax(1).cpu()
        return drawn[best + self.best_of * torch.arange(len(noise))]

    def transition(self, trajectory: Trajectory, k: int | Tensor) -> Gaussian:
        """`Chain.transition` with this policy's denoiser."""
        return self.chain.transition(self.denoiser, trajectory, k)

    def gain(self, k: int | Tensor) -> Tensor:
        """d mean / d (guided) network output at step k, [1] (or at each of steps k [b]): the scalar
        kappa_k by which the step amplifies the network.
        """
        step = self._step(k)
        d_x0, d_eps = output_gain(self.model.parametrisation, step.alpha_t, step.sigma_t)
        return gain(self.chain.kernel_at(k), step, d_x0, d_eps).float()

    def std(self, k: int | Tensor) -> Tensor:
        """The total std of step k, [1], or of each of steps k, [b]."""
        return self.chain.kernel_at(k).coefficients(self._step(k)).std.float()

    def _step(self, k: int | Tensor) -> Step:
        return self.chain.step(k, 1 if isinstance(k, int) else len(k))

    def scored(self, gaussian: Gaussian) -> Gaussian:
        """A Gaussian over the dims that likelihoods count."""
        return Gaussian(self.model.scored(gaussian.mean), self.model.scored(gaussian.std))

    def supervised_loss(
        self,
        condition: Condition,
        event: Tensor,
        t: Tensor,
        noise: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """mean over E of (output - target)^2 at x_t = alpha x_0 + sigma eps, for each row: [B].

        In terms of the prediction: output error = d_output/d_x0 (x0_hat - x_0), so one formula
        serves every parametrisation. event, noise [B,*E]; t [B] noise times; mask bool,
        broadcastable to [B,*E].
        """
        schedule, kind = self.model.schedule, self.model.parametrisation
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        x = expand(alpha, event) * event + expand(sigma, event) * noise
        prediction = self.model.denoise(x, t, condition)
        d_x0, d_eps = output_gain(kind, alpha, sigma)
        if kind == "epsilon":
            error = (prediction.eps - noise) / expand(d_eps, event)
        else:
            error = (prediction.x0 - event) / expand(d_x0, event)
        return reduce_event(error**2, "mean", mask)


@dataclass(frozen=True)
class _Handover:
    """The base at noise times above its own, the learning network below."""

    denoiser: Denoiser
    parameters: Sequence[torch.nn.Parameter]
    base: Base

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Prediction:
        if not bool((t > self.base.above).any()):
            return self.denoiser(x, t, condition)
        with torch.no_grad(), swapped(self.parameters, self.base.weights):
            return self.denoiser(x, t, condition)


@dataclass(frozen=True)
class _LearnedStd:
    """The same prediction with a std of its own."""

    denoiser: Denoiser
    features: Callable[[Condition], Tensor]
    std_of: StdOf

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Prediction:
        prediction = self.denoiser(x, t, condition)
        return replace(prediction, std=self.std_of(t, self.features(condition)).view_as(x))


@contextmanager
def swapped(parameters: Sequence[torch.nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Run with other values in the parameters' place, without a copy: references and averages are
    evaluated in here.
    """
    originals = [p.data for p in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        yield
    finally:
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.data = original

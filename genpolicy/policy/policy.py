"""The contracts of a policy: `Model`, a family of networks, and `ChainPolicy`, a model with its
sampler.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from genpolicy.chain import Chain, ClipX0, Condition, Guidance, Noise, Prediction, Trajectory
from genpolicy.chain.kernel import gain
from genpolicy.chain.schedule import Schedule, Step
from genpolicy.chain.values import (
    Denoiser,
    Gaussian,
    Parametrisation,
    expand,
    output_gain,
    reduce_event,
)
from genpolicy.contracts.task import Context, Dataset


class Model(Protocol):
    """A family of networks behind one meaning: encode, denoise, decode. Everything here is what
    `ChainPolicy` needs.

    schedule, parametrisation: how the network's output is read. event_shape: E of one sample as the
    chain sees it. clip: (bound, recompute_eps) of the predicted x0 (see `ClipX0`), None where the
    family does not clip. evaluations: network evaluations so far, in rows; a row whose evaluation
    is differentiated counts twice (its forward and its backward: the notes' "F per sample", with a
    backward priced as a forward).
    """

    schedule: Schedule
    parametrisation: Parametrisation
    event_shape: tuple[int, ...]
    clip: tuple[float, bool] | None
    device: torch.device
    precision: Literal["fp32", "bf16", "fp16"]
    evaluations: float

    def grid(self, steps: int) -> Tensor:
        """The family's own K+1 decreasing noise times, ending at 0 (fp64)."""
        ...

    def encode(self, context: Context) -> Condition:
        """Condition of B rows: prompts once per distinct one and cached, observations normalised
        and encoded.
        """
        ...

    def negative(self, condition: Condition) -> Condition:
        """The unconditional (negative-prompt) condition of the same rows."""
        ...

    def denoise(self, x: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """One unguided, unclipped network evaluation, counted. x [B,*E] fp32, t [B] (or [B,T]) ->
        Prediction, fp32.
        """
        ...

    def scored(self, value: Tensor) -> Tensor:
        """The dims of [B,*E] (or of what broadcasts to it) that likelihoods count: all but those
        that no parameter acts through (padding).
        """
        ...

    def features(self, condition: Condition) -> Tensor:
        """What a critic sees of the condition, Float[B,F], detached."""
        ...

    def decode(self, x0: Tensor) -> Tensor:
        """Samples [B,*E] to outputs: images Float[B,3,H,W] in [0,1], videos Float[B,F,3,H,W], or
        the chunk of actions that is executed, Float[B,T,D] in the environment's units.
        """
        ...

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that learn, by name, in a fixed order. fp32."""
        ...

    def save(self, directory: Path) -> None:
        """Write the policy in its ecosystem's own format."""
        ...


class ControlModel(Model, Protocol):
    """A model whose samples are chunks of actions.

    pretrained: None for one that is still to be given its shapes and statistics by `initialise`.
    history: observation frames it sees. shapes: of the observations it needs, by LeRobot's names.
    action_dim: D of the environment. executed: how many of a chunk's actions are carried out, T of
    `decode`. horizon: offsets, relative to the current frame, of the actions that one event holds.
    draws: uniform numbers that a row of `supervised` takes.
    """

    pretrained: str | None
    history: int
    shapes: Mapping[str, tuple[int, ...]]
    action_dim: int
    executed: int
    horizon: range
    draws: int

    def supervised(self, context: Context, uniform: Tensor) -> tuple[Condition, Tensor]:
        """The condition of B rows to imitate from, and what the encoder's own losses add to each
        row's loss [B]. uniform [B,``draws``] in [0,1): all its chance (augmentation, a bottleneck's
        samples). A model without any says `encode`, 0.
        """
        ...

    def initialise(self, dataset: Dataset) -> None:
        """Draw fresh weights for the dataset's shapes, and take its statistics for normalisation."""
        ...

    def event(self, actions: Tensor) -> Tensor:
        """Actions Float[B,T,D] in the environment's units, at the offsets ``horizon``, as the
        chain's x0 [B,*E].
        """
        ...

    def event_mask(self, pad: Tensor) -> Tensor | None:
        """The dims of an event that a supervised loss counts, bool, broadcastable to [B,*E] (None:
        all), where ``pad`` bool[B,T] says which actions lie outside their episode: what the
        family's own training does.
        """
        ...

    def times(self, uniform: Tensor) -> Tensor:
        """Noise times to train at, [B] fp64, from uniform numbers in [0,1): the family's own
        training distribution.
        """
        ...


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

"""A policy: a model with the sampler that acts, and the parts that act beside its network."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from genpolicy.chain import Chain, ClipX0, Condition, Guidance, Noise, Trajectory
from genpolicy.chain.schedule import Schedule
from genpolicy.chain.values import Denoiser, Gaussian, expand, output_gain, reduce_event
from genpolicy.chain.warm_start import WarmStart, shifted
from genpolicy.contracts.model import Model, TokenModel
from genpolicy.learning.objective import Scored
from genpolicy.policy.weights import Weights

Judge = Callable[[Tensor, Tensor], Tensor]
"""(features [B,F], scored event [B,*E]) -> the value of that decision, [B]: a critic."""

Wrapper = Callable[[Denoiser], Denoiser]
"""A denoiser around a denoiser."""


class Part(Protocol):
    """A part of a policy: what acts besides its network, and is saved with it.

    kind: the name of its file in genpolicy/policy/parts. slot: the field of the policy, or of its
    chain, that it fills; one part alone can. version: of its files; a saved policy whose part is
    newer than this is refused. `state_dict` and `load_state_dict` resume it.
    """

    kind: ClassVar[str]
    slot: ClassVar[str]
    version: ClassVar[int]

    def attach(self, policy: "ChainPolicy") -> "ChainPolicy":
        """The policy that acts with this part; `ValueError` where the two do not fit."""
        ...

    def save(self, folder: Path) -> None:
        """Write everything that `load` needs into an empty folder."""
        ...

    @classmethod
    def load(cls, folder: Path, model: Model) -> Self:
        """The part that was saved for this model; it acts bit for bit as the saved one."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


@dataclass(frozen=True)
class ChainPolicy:
    """A model and the sampler that acts: a chain, its guidance, and the parts of the policy.

    model: the network, encoder and decoder.
    chain: schedule, grid, kernel and start.
    guidance: classifier-free scale; 1 is none, one evaluation per step.
    guidance_interval: (low, high] in noise time, where guidance acts.
    negative_gradient: differentiate the unconditional branch too (see `Guidance`).
    best_of: samples drawn per decision, of which ``judge`` picks one. Such a policy acts and is not
        trained by likelihoods: the chosen chain's likelihood is not the sampler's.
    execute: actions that are carried out per decision; None is all that the model says.
    warm: the way from a decision's plan to the next one's; None begins each from noise.
    parts: by name, in the order in which they were attached. They fill the slots below.
    base: denoises the noisier steps in the place of the network that learns.
    noise: gives the transitions a std of their own in the place of the kernel's.
    judge: values the samples of a decision.
    refiner: moves a sample, (policy, features [B,F], event [B,*E]) -> [B,*E], before it is valued.
    refined: of ``best_of`` samples so many, those with the highest values, are moved; None: all.
    """

    model: Model
    chain: Chain
    guidance: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, float("inf"))
    negative_gradient: bool = False
    best_of: int = 1
    execute: int | None = None
    warm: WarmStart | None = None
    parts: Mapping[str, Part] = field(default_factory=dict)
    base: Wrapper | None = None
    noise: Wrapper | None = None
    judge: Judge | None = None
    refiner: "Callable[[ChainPolicy, Tensor, Tensor], Tensor] | None" = None
    refined: int | None = None

    def attach(self, name: str, part: Part) -> "ChainPolicy":
        """The same policy with a part, in the place of the one that had its name.

        Raises `ValueError` where the part does not fit, another one fills its slot, one of another
        kind has its name, or the name is no folder's.
        """
        if not name.isidentifier():
            raise ValueError(
                f"a part of the policy can't be called {name!r}: its name is that of its folder, of"
                " letters, digits and underscores"
            )
        before = self.parts.get(name)
        if before is not None and before.kind != part.kind:
            raise ValueError(
                f"the policy's part {name!r} is of kind {before.kind}, and one of kind {part.kind}"
                " can't take its place: attach it under another name"
            )
        for other, there in self.parts.items():
            if other != name and there.slot == part.slot:
                way = "attach it under that name" if there.kind == part.kind else "only one can act"
                raise ValueError(
                    f"the policy has a part of kind {there.kind} already, {other!r}, in whose slot"
                    f" {name!r} would act: {way}"
                )
        return replace(part.attach(self), parts={**self.parts, name: part})

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser that acts *and* is scored: the model, guided and then clipped where sampler
        and family say so (diffusers' schedulers clip what is guided already).
        """
        denoise = self.model.denoise
        if self.guidance != 1.0:
            negative, interval = self.model.negative, self.guidance_interval
            denoise = Guidance(denoise, negative, self.guidance, interval, self.negative_gradient)
        if self.model.clip is not None:
            denoise = ClipX0(denoise, self.model.schedule, *self.model.clip)
        if self.base is not None:
            denoise = self.base(denoise)
        if self.noise is not None:
            denoise = self.noise(denoise)
        return denoise

    def with_window(self, window: tuple[int, int] | None) -> "ChainPolicy":
        """The same policy whose kernel acts inside another window of steps."""
        if window is not None and range(*window) == self.chain.stochastic:
            return self  # with what its chain has looked up already
        return replace(self, chain=replace(self.chain, window=window))

    def sample(
        self,
        condition: Condition,
        noise: Noise,
        *,
        previous: Tensor | None = None,
        **options: Any,
    ) -> Trajectory:
        """`Chain.sample` with this policy's denoiser, refined; of ``best_of`` samples per row the
        one with the highest value.

        previous [B,T,D]: the plan of the decision before, from which ``warm`` goes on. It is all
        that one decision knows of another: the next plan, ``x0``, is a pure function of it, of the
        condition and of the noise. Without it the chain begins from noise. Raises `ValueError`
        where there is one and the policy has no warm start.
        """
        if self.best_of > 1:
            return self._best(condition, noise, previous, **options)
        if previous is not None:
            drawn = self._replan(condition, noise, previous)
        else:
            drawn = self.chain.sample(
                self.denoiser,
                condition,
                noise,
                self.model.event_shape,
                device=self.model.device,
                **options,
            )
        if self.refiner is None:
            return drawn
        return replace(drawn, x0=self.refiner(self, self.model.features(condition), drawn.x0))

    def _replan(self, condition: Condition, noise: Noise, previous: Tensor) -> Trajectory:
        if self.warm is None:
            raise ValueError("the policy's sampler has no warm start: it goes on from no plan")
        done = self.execute or self.model.executed  # type: ignore[attr-defined]  # it acts
        guess = shifted(previous, done)
        return self.warm.replan(self.chain, self.denoiser, condition, noise, guess)

    @torch.no_grad()
    def _best(
        self, condition: Condition, noise: Noise, previous: Tensor | None, **options: Any
    ) -> Trajectory:
        every = torch.arange(len(noise)).repeat_interleave(self.best_of)
        many, draws = condition[every], noise.fan(self.best_of)
        before = None if previous is None else previous[every]
        plain = replace(self, best_of=1, refiner=None)
        drawn = plain.sample(many, draws, previous=before, **options)
        x0, best = self.chosen(self.model.features(condition), drawn.x0)
        return replace(drawn[best.cpu()], x0=x0)

    @torch.no_grad()
    def chosen(self, features: Tensor, events: Tensor) -> tuple[Tensor, Tensor]:
        """The event that is carried out of each row's N samples, refined, [B,*E], and its row among
        all samples, [B].

        features [B,F]; events [B N,*E], a row's samples one after the other.
        """
        assert self.judge is not None, "a best-of-N sampler needs a judge"
        judge, scored = self.judge, self.model.scored
        samples = len(events) // len(features)
        row = torch.arange(len(events), device=events.device)
        seen = features.repeat_interleave(samples, 0)
        if self.refiner is None:
            worth = judge(seen, scored(events))
        elif self.refined is None or self.refined >= samples:
            events = self.refiner(self, seen, events)
            worth = judge(seen, scored(events))
        else:
            worth = judge(seen, scored(events))
            highest = worth.view(-1, samples).topk(self.refined, 1).indices
            moved = (row[::samples, None] + highest).flatten()
            events = events.clone()
            events[moved] = self.refiner(self, seen[moved], events[moved])
            worth[moved] = judge(seen[moved], scored(events[moved]))
        best = row[::samples] + worth.view(-1, samples).argmax(1)
        return events[best], best

    def actions(self, plan: Tensor) -> Tensor:
        """The actions of a plan [B,T,D] that are carried out before the next decision, in the
        environment's units.
        """
        carried_out = plan if self.warm is None else self.warm.carried_out(plan)
        return self.model.decode(carried_out)[:, : self.execute]

    def along(self, trajectory: Trajectory) -> "ChainPolicy":
        """The policy on the chain that drew a trajectory: the one to score its steps with, whoever
        collected it.

        It is this policy itself where the two chains differ in their windows alone. Raises
        `ValueError` where the noise schedule of the trajectory is not the model's.
        """
        drew, own = trajectory.chain, self.chain
        if drew is None or (
            drew.grid is own.grid and drew.kernel is own.kernel and drew.schedule is own.schedule
        ):
            return self
        if not _same_schedule(self.model.schedule, drew):
            raise ValueError(
                "the trajectory was drawn on another noise schedule than this policy's model has:"
                " it can't be scored; collect with a policy whose model has the same schedule"
            )
        return replace(self, chain=drew)

    def transition(self, trajectory: Trajectory, k: int | Tensor) -> Gaussian:
        """`Chain.transition` with this policy's denoiser."""
        return self.chain.transition(self.denoiser, trajectory, k)

    def gain(self, k: int | Tensor) -> Tensor:
        """d mean / d (guided) network output at step k, [1] (or at each of steps k [b]): the scalar
        kappa_k by which the step amplifies the network.
        """
        return self._gains[k] if isinstance(k, int) else torch.cat(self._gains)[k]

    @cached_property
    def _gains(self) -> tuple[Tensor, ...]:
        """The gain of every step, [1] each, looked up once."""
        steps, kind = self.chain.steps, self.model.parametrisation
        d_x0, d_eps = output_gain(kind, steps.alpha_t, steps.sigma_t)
        gains = (
            coefficients.gain(d_x0[k : k + 1], d_eps[k : k + 1])
            for k, coefficients in enumerate(self.chain.acting)
        )
        return tuple(gain.float() for gain in gains)

    def std(self, k: int | Tensor) -> Tensor:
        """The total std of the kernel at step k, [1], or at each of steps k, [b]; a std that the
        network says, or a learned one, acts in its place (see `Scored.std`).
        """
        return self.chain.coefficients(k).std.float()

    def score(
        self,
        trajectory: Trajectory,
        k: int | Tensor,
        advantage: Tensor,
        reference: Weights | None = None,
    ) -> Scored:
        """Stored step k of every row (or each row's own, [b]) under the weights as they are: all
        that a loss on transitions needs.

        The step is the one that the trajectory's own chain took, whoever collected it (`along`).
        advantage [b]. reference: weights under which the step is scored too, without gradients.
        """
        policy = self.along(trajectory)
        anchor = None
        if reference is not None:
            with torch.no_grad(), reference.using():
                anchor = self.scored(policy.transition(trajectory, k))
        grid, device = policy.chain.grid, trajectory.x0.device
        old = self.scored(trajectory.acted(k))
        return Scored(
            new=self.scored(policy.transition(trajectory, k)),
            old=old,
            reference=anchor,
            x=self.model.scored(trajectory.after(k)),
            advantage=advantage,
            std=old.std.flatten(1).mean(1),
            dt=(grid[k] - grid[k + 1]).float().to(device),
            gain=policy.gain(k).to(device),
            index=k - trajectory.first,
            steps=len(trajectory.steps),
        )

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

        Of a `TokenModel` mean over E of -log p(token | tokens before it), in nats: 1/|E| times the
        negative log-likelihood of the row, which takes neither t nor noise.

        event, noise [B,*E]; t [B] noise times; mask bool, broadcastable to [B,*E].
        """
        if isinstance(self.model, TokenModel):
            return reduce_event(self.model.token_losses(condition, event), "mean", mask)
        return reduce_event(self.output_error(condition, event, t, noise) ** 2, "mean", mask)

    def output_error(self, condition: Condition, event: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """output - target of the network at x_t = alpha x_0 + sigma eps, [B,*E].

        In terms of the prediction: output error = d_output/d_x0 (x0_hat - x_0), so one formula
        serves every parametrisation. event, noise [B,*E]; t [B] noise times. Raises `ValueError`
        for a `TokenModel`, which has no x_t.
        """
        if isinstance(self.model, TokenModel):
            raise ValueError("a policy of tokens has no output at a noisy x_t, and so no error")
        schedule, kind = self.model.schedule, self.model.parametrisation
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        x = expand(alpha, event) * event + expand(sigma, event) * noise
        prediction = self.model.denoise(x, t, condition)
        d_x0, d_eps = output_gain(kind, alpha, sigma)
        if kind == "epsilon":
            return (prediction.eps - noise) / expand(d_eps, event)
        return (prediction.x0 - event) / expand(d_x0, event)


def _same_schedule(schedule: Schedule, chain: Chain) -> bool:
    """True where a schedule has the coefficients of a chain's own at all times of its grid."""
    other, grid = chain.schedule, chain.grid
    return type(schedule) is type(other) and all(
        torch.equal(*pair)
        for pair in (
            (schedule.alpha(grid), other.alpha(grid)),
            (schedule.sigma(grid), other.sigma(grid)),
        )
    )

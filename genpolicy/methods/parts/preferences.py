r"""The update of methods that prefer one side of a pair to the other.

    e(x)  = sum over E of (output - target)^2 at x_t = alpha x + sigma eps, of the policy;
    gap   = e(x) - the same of a reference,
    z     = -beta (gap(preferred) - s gap(other)),
    loss  = l(z) + supervised (beta / 2) e(preferred),   both sides at the same time t.

-gap stands for log p(x) / p_reference(x) but for a factor, which beta holds (Diffusion-DPO, arXiv
2311.12908, eq. 14): beta is per summed error and means the same for any E. The papers' is of the
errors' means over the E' dims that count, beta = beta_mean / (2 E'), of either side by its own E':
5000 on SD 1.5's latents of 16,384 numbers is .153, and 34 on a chunk of 16 x 7 actions. At z = 0
the loss's slope by e(preferred) is beta / 2, which is the unit of ``supervised`` (RPO: DPO with a
supervised term).

s is 1, or SePPO's flip. ``error`` "noise" counts errors of eps = the output's times d eps / d
output: of a velocity beta (1 - t)^2, which the derivation says and Flow-DPO (arXiv 2501.13918)
replaces with a constant, "output".
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from genpolicy.chain import Condition
from genpolicy.chain.values import expand, output_gain, reduce_event
from genpolicy.config.errors import ConfigError, at_least, choice, positive, share, unread
from genpolicy.contracts.task import Context
from genpolicy.learning.preference import Loss, error_gap, flipped, robust, safe_share
from genpolicy.policy.weights import Weights
from genpolicy.training.run import Run


@dataclass(frozen=True)
class Side:
    """One side of b pairs. mask: which of an event's dims count (None: all); event [b,*E]."""

    context: Context
    event: Tensor
    mask: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> "Side":
        mask = None if self.mask is None else self.mask[rows]
        return Side(self.context[rows], self.event[rows], mask)


Sides = Callable[[slice], tuple[Side, Side]]
"""A part of a batch of pairs -> the preferred side, and the other. Where both have one context it
is the same object, and encoded once.
"""

Flip = Literal["sign", "indicator", "none"]
"""How SePPO treats the other side where the policy is behind the reference; see `flipped`."""


@dataclass
class Preference:
    """The settings of a `Comparison`. Defaults without a source are ours."""

    beta: float = 0.15  # per summed error; Diffusion-DPO's 5000 on SD 1.5's latents
    # in its place the papers' beta, of errors' means: 2000 and 5000 in Diffusion-DPO, 100 in
    # Flow-GRPO's online DPO; twice the beta_dpo of diffusers' script
    beta_mean: float | None = None
    loss: Loss = "logistic"
    wrong: float = 0.0  # share of turned labels that robust DPO reckons with, below 1/2
    error: Literal["output", "noise"] = "output"  # whose squares are summed
    supervised: float = 0.0  # weight of the preferred side's own error, in halves of beta
    # share in [0, 1] of the preferred side's gain that the other side's push must leave; None: it
    # is not held back. .9 on SD 1.5 and .6 on SDXL, Diffusion-SDPO
    safeguard: float | None = None
    shared_noise: bool = True  # one noise for both sides of a pair; Diffusion-DPO

    def __post_init__(self) -> None:
        where = "method: preference"
        positive(where, self, "beta", "beta_mean")
        choice(f"{where}: loss", self.loss, ("logistic", "hinge", "ipo"))
        choice(f"{where}: error", self.error, ("output", "noise"))
        at_least(where, self, wrong=0, supervised=0)
        if not self.wrong < 0.5:
            raise ConfigError(f"{where}: wrong is {self.wrong}; it must be below 0.5")
        if self.safeguard is not None:
            share(where, self, "safeguard")
        if self.beta_mean is not None:
            unread(where, self, "beside beta_mean", "beta")

    def per_sum(self, count: Tensor) -> Tensor:
        """beta of sides whose events have ``count`` dims that count, [b]."""
        if self.beta_mean is None:
            return torch.full_like(count, self.beta)
        return self.beta_mean / (2 * count)


@dataclass(frozen=True)
class Comparison:
    """Updates of a run's policy on pairs. Every number drawn is a function of the run's seed, its
    iteration, the update's number and the pair's place.
    """

    run: Run
    settings: Preference
    name: str  # of its metrics

    def update(
        self,
        sides: Sides,
        place: Tensor,
        total: int,
        reference: Weights,
        number: int,
        flip: Flip = "none",
        draws: int = 1,
        weight: Tensor | None = None,
    ) -> dict[str, float]:
        """One update on this process's pairs [b], the ``number``-th of the iteration.

        place [b]: their numbers among the ``total`` of all processes. draws: times and noises by
        whose mean gap the flip is decided, the update's own among them. weight [b]: of the pairs'
        losses.
        """
        run, model = self.run, self.run.policy.model
        generator = run.generator("compared", number)
        uniform = torch.from_numpy(generator.random((draws, total)))[:, place]
        chance = torch.from_numpy(generator.random((total, model.draws)))[place]
        eps = run.noise("compared", place, number)
        times = model.times(uniform.flatten()).view(draws, len(place))

        def losses(part: slice) -> tuple[Tensor, dict[str, Tensor]]:
            preferred, other = sides(part)

            def errors(draw: int, both: bool = True) -> tuple[list[Tensor], Tensor]:
                """The sides' errors at a time and a noise, and the encoder's own loss."""
                read, condition, own = None, None, torch.zeros(())
                found = []
                for number, side in enumerate((preferred, other)[: 1 + both]):
                    if side.context is not read:
                        read = side.context
                        condition, penalty = model.supervised(read, chance[part])
                        own = own + penalty
                    assert condition is not None
                    k = 2 * draw + (0 if self.settings.shared_noise else number)
                    noise = eps[part](k, model.event_shape).to(side.event)
                    found.append(self._error(condition, side.event, times[draw, part], noise))
                return found, own

            # those without a graph first: the network's own weights are back when it has one
            with torch.no_grad(), reference.using():
                then, _ = errors(0)
                earlier = [errors(draw, both=False)[0][0] for draw in range(1, draws)]
            with torch.no_grad():
                by_now = [errors(draw, both=False)[0][0] for draw in range(1, draws)]
            now, own = errors(0)
            masks = [self._mask(side) for side in (preferred, other)]
            other_gaps = [
                error_gap(one, before, masks[0])
                for one, before in zip(by_now, earlier, strict=True)
            ]
            loss, metrics = self.loss(now, then, masks, flip, other_gaps)
            if weight is not None:
                loss = weight[part].to(loss) * loss
            return loss + own, metrics

        return run.descend(losses, len(place), self.name)

    def loss(
        self,
        now: list[Tensor],
        then: list[Tensor],
        masks: list[Tensor | None],
        flip: Flip = "none",
        other_draws: list[Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of b pairs and its metrics, [b] each.

        now, then: errors [b,*E] of the preferred side and of the other, of the policy and of the
        reference. masks: of either side, dims that count. other_draws: gaps of the preferred side
        [b] at further draws, for the flip.
        """
        settings = self.settings
        gap, other = (error_gap(n, t, m) for n, t, m in zip(now, then, masks, strict=True))
        count, other_count = (
            reduce_event(torch.ones_like(n, dtype=torch.float32), "sum", m)
            for n, m in zip(now, masks, strict=True)
        )
        beta = settings.per_sum(count)
        with torch.no_grad():
            decided = torch.stack([gap, *(other_draws or [])]).mean(0)
            s = flipped(decided, flip)
        raw = other.detach()
        if settings.safeguard is not None:
            held = safe_share(now[0].detach(), now[1].detach(), settings.safeguard, *masks)
            held = torch.where(s > 0, held, torch.ones_like(held))  # pulled, it harms nothing
            other = raw + held * (other - raw)
        logit = settings.per_sum(other_count) * s * other - beta * gap
        loss = robust(logit, settings.loss, settings.wrong)
        if settings.supervised:
            error = reduce_event(now[0].float() ** 2, "sum", masks[0])
            loss = loss + settings.supervised * beta / 2 * error
        metrics = {
            "logit": logit.detach(),
            "accuracy": (logit.detach() > 0).to(gap),
            "preferred_gap": gap.detach() / count,
            "other_gap": raw / other_count,
            "beta": beta,
            "beta_mean": 2 * count * beta,
        }
        if flip != "none":
            metrics["flipped"] = (s < 1).to(gap)
        return loss, metrics

    def _error(self, condition: Condition, event: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The error of the network's output, or of its eps, over the dims that count, [b,*E]."""
        policy = self.run.policy
        model = policy.model
        error = policy.output_error(condition, event, t, noise)
        if self.settings.error == "noise":
            alpha, sigma = model.schedule.alpha(t), model.schedule.sigma(t)
            error = expand(output_gain(model.parametrisation, alpha, sigma)[1], error) * error
        return model.scored(error)

    def _mask(self, side: Side) -> Tensor | None:
        if side.mask is None:
            return None
        return self.run.policy.model.scored(side.mask.expand_as(side.event))

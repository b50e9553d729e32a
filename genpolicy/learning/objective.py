"""Objectives on transitions: log-ratios, the clipped surrogate, the Gaussian KL. Pure functions.

``old`` is the Gaussian that acted, ``new`` the same transition under the current weights, x the
sample that was drawn. With noise = (x - mean_old)/s and D = mean_new - mean_old (equal std s), per
event dim:

    log N_new(x) - log N_old(x) = noise D / s - D^2 / (2 s^2)

which is computed in this form, never as a difference of two large log-densities. Where the std
has changed too, `log_ratio_unequal` does the same with the change of the std.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from genpolicy.chain.values import Gaussian, Reduce, reduce_event


def _equal_std(new: Gaussian, old: Gaussian) -> Tensor:
    if new.std.shape != old.std.shape or not torch.equal(new.std, old.std):
        raise ValueError(
            "this log-ratio assumes that the std has not changed;"
            " a learned std needs log_ratio_unequal"
        )
    _check_no_point(old.std)
    return old.std


def _check_no_point(std: Tensor) -> None:
    if not bool((std > 0).all()):
        raise ValueError(
            "a step with std 0 is a point and has no ratio:"
            " train only steps inside the stochastic window"
        )


def log_ratio(new: Gaussian, old: Gaussian, x: Tensor, *, reduce: Reduce) -> Tensor:
    """log rho = reduce_E( noise D/s - D^2/(2 s^2) ), [B]. Under ``old`` its mean is -r^2/2 < 0,
    with r = rms(D)/s.
    """
    std = _equal_std(new, old)
    noise, shift = (x - old.mean) / std, (new.mean - old.mean) / std
    return reduce_event(noise * shift - shift**2 / 2, reduce)


def log_ratio_unequal(new: Gaussian, old: Gaussian, x: Tensor, *, reduce: Reduce) -> Tensor:
    """log rho where the std may have changed (a learned one), from s_old to s_new, [B].

    With z = (x - mean_old)/s_old, c = (s_new - s_old)/s_new < 1 and D = (mean_new -
    mean_old)/s_new, (x - mean_new)/s_new = (1 - c) z - D, so that per event dim

        log rho = (1 - c) z D - D^2 / 2 + z^2 c (2 - c) / 2 + log(1 - c),

    every term of which vanishes with the change. At equal std c is 0, and it is `log_ratio` to the
    bit. Raises ValueError where a std is 0.
    """
    for gaussian in (new, old):
        _check_no_point(gaussian.std)
    noise, shift = (x - old.mean) / old.std, (new.mean - old.mean) / new.std
    change = (new.std - old.std) / new.std
    of_mean = (1 - change) * noise * shift - shift**2 / 2
    of_std = noise**2 * change * (2 - change) / 2 + torch.log1p(-change)
    return reduce_event(of_mean + of_std, reduce)


def guard_log_ratio(new: Gaussian, old: Gaussian, x: Tensor, *, reduce: Reduce) -> Tensor:
    """GRPO-Guard's RatioNorm (arXiv 2510.22319): s (log rho + reduce_E(D^2/(2 s^2))) =
    reduce_E(noise D), [B].

    Centred at 0 for every row and step and free of 1/s. ``s`` is the total std, so it holds for
    every kernel; the bias is each row's own (the public code averages it over the batch and uses
    std/sqrt(dt), which is right for the flow SDE only).
    """
    std = _equal_std(new, old)
    noise = (x - old.mean) / std
    return reduce_event(noise * (new.mean - old.mean), reduce)


@dataclass(frozen=True)
class Surrogate:
    """The clipped surrogate's loss [B] and which rows it clips [B] bool."""

    loss: Tensor
    clipped: Tensor


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip: float | Tensor) -> Surrogate:
    """PPO (arXiv 1707.06347 eq. 7), per row: max(-A rho, -A clip(rho, 1-clip, 1+clip)); all [B],
    ``clip`` a number or [B].

    A row is clipped where its gradient is cut: rho > 1+clip with A > 0, or rho < 1-clip with A < 0.
    Its gradient is exactly 0, however far the policy has gone: exp(89) is infinite in fp32, and 0
    times infinity is not a number, so that no clipped row is differentiated through its ratio. A
    row with A < 0 has no bound above, and where its ratio is infinite so is its loss.

    What ``clip`` means depends on the log-ratio's reduction over E: 1e-6..1e-3 for "mean" on
    images, 0.1..0.3 for "sum".
    """
    clip = torch.as_tensor(clip, device=log_ratio.device)
    constant = log_ratio.detach().exp()
    clipped = (advantage > 0) & (constant > 1 + clip)
    clipped = clipped | ((advantage < 0) & (constant < 1 - clip))

    # no gradient: the clipped rows, and those without an advantage
    still = clipped | ((advantage == 0) & (constant > 1))
    ratio = torch.where(still, 0.0, log_ratio).exp()
    bounded = constant.clamp(1 - clip, 1 + clip)
    loss = -advantage * torch.where(clipped, bounded, ratio)
    return Surrogate(loss, clipped)


def mean_kl(new: Gaussian, reference: Gaussian, *, reduce: Reduce) -> Tensor:
    """KL(new || reference) at equal std: reduce_E( (mean_new - mean_ref)^2 / (2 s^2) ), [B], s the
    total std.

    flow_grpo divides by 2 g^2 = 2 s^2/dt instead (train_sd3.py:895; its maintainers acknowledge the
    missing dt): multiply by dt to reproduce it.
    """
    std = _equal_std(new, reference)
    return reduce_event(((new.mean - reference.mean) / std) ** 2 / 2, reduce)


def clip_metrics(log_ratio: Tensor, advantage: Tensor, surrogate: Surrogate) -> dict[str, Tensor]:
    """Per row: the ratio, in fp64, and whether it was clipped, in all and by the sign of the
    advantage (shares of all rows).
    """
    clipped = surrogate.clipped.float()
    return {
        "ratio_mean": log_ratio.detach().double().exp(),
        "log_ratio_square": log_ratio.detach() ** 2,
        "clip_fraction": clipped,
        "clip_fraction_positive": clipped * (advantage > 0),
        "clip_fraction_negative": clipped * (advantage < 0),
    }


def divergence(log_ratio: Tensor) -> Tensor:
    """rho - 1 - log rho of every row, [B] fp64 without a graph: the estimate of KL(old || new) in
    nats whose mean is right and which is never negative.
    """
    wide = log_ratio.detach().double()
    return wide.expm1() - wide


@dataclass(frozen=True)
class Scored:
    """A stored step of b rows under the current weights: all that a loss on transitions needs.

    new: the transition now (with its graph); old: the one that acted; reference: the one of the
    policy at step 0, if asked; x [b,*E] the sample all three are scored on, restricted to the dims
    that likelihoods count; advantage [b]; std [b]: the total std that acted, its mean over the
    event's dims where they have their own; dt = t - s > 0; gain: kappa = d mean / d output. index:
    the step's place 0 .. steps - 1 among the kept steps. dt, gain and index are [b] where rows are
    at steps of their own.
    """

    new: Gaussian
    old: Gaussian
    reference: Gaussian | None
    x: Tensor
    advantage: Tensor
    std: Tensor
    dt: float | Tensor
    gain: float | Tensor
    index: int | Tensor
    steps: int

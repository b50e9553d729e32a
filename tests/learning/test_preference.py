"""Objectives on pairs, against hand numbers."""

import math

import pytest
import torch
from torch import Tensor

from genpolicy.learning.preference import (
    error_gap,
    flipped,
    preference_loss,
    robust,
    safe_share,
    semantic_weight,
)
from genpolicy.methods.parts.preferences import Comparison, Preference

Z = torch.tensor([-2.0, 0.0, 0.5, 3.0], dtype=torch.float64)


# -- losses of a logit -----------------------------------------------------------------------------


def test_losses_by_hand():
    assert preference_loss(Z, "logistic").tolist() == pytest.approx(
        [2.126928, 0.693147, 0.474077, 0.048587], abs=1e-6
    )
    assert preference_loss(Z, "hinge").tolist() == [3, 1, 0.5, 0]
    assert preference_loss(Z, "ipo").tolist() == [6.25, 0.25, 0, 6.25]
    far = preference_loss(torch.tensor([-1e4, 1e4]), "logistic")
    assert far.tolist() == [1e4, 0], "finite, where log(sigmoid(z)) is not"


def test_ipo_is_that_of_the_log_ratios_but_for_a_factor():
    beta = 0.3
    assert torch.allclose(preference_loss(Z, "ipo"), beta**2 * (Z / beta - 1 / (2 * beta)) ** 2)


@pytest.mark.parametrize("kind", ["logistic", "hinge", "ipo"])
def test_the_robust_loss_is_unbiased_where_labels_are_turned(kind):
    wrong = 0.2
    clean = preference_loss(Z, kind)
    seen = (1 - wrong) * robust(Z, kind, wrong) + wrong * robust(-Z, kind, wrong)
    assert torch.allclose(seen, clean)
    plain = (1 - wrong) * preference_loss(Z, kind) + wrong * preference_loss(-Z, kind)
    assert not torch.allclose(plain, clean, atol=0.05), "control: the loss itself is biased"
    assert torch.equal(robust(Z, kind, 0.0), clean)


def test_the_semantic_weight_falls_with_the_distance_and_alpha_0_is_none():
    cosine = torch.tensor([1.0, 0.5, -1.0])
    known = [1, math.exp(-0.35), math.exp(-1.4)]
    assert semantic_weight(cosine, 0.7).tolist() == pytest.approx(known)
    assert semantic_weight(cosine, 0.0).tolist() == [1, 1, 1]


# -- gaps of errors --------------------------------------------------------------------------------


def test_a_small_gap_is_kept_which_bf16_loses():
    """Errors of 16,384 numbers, as of SD 1.5's latents, a relative 1e-5 apart."""
    generator = torch.Generator().manual_seed(0)
    then = torch.randn(4, 16_384, generator=generator, dtype=torch.float64)
    now = then * (1 + 1e-5)
    known = (now**2 - then**2).sum(1)
    found = error_gap(now.float(), then.float())
    assert torch.allclose(found.double(), known, rtol=0.02)
    half = [(one.bfloat16() ** 2).mean(1) for one in (now, then)]
    lost = 16_384 * (half[0] - half[1]).double() / known - 1
    assert float(lost.abs().min()) > 0.5, "control: two means in bf16"
    sums = (now.float() ** 2).mean(1) - (then.float() ** 2).mean(1)
    off = (16_384 * sums.double() / known - 1).abs().max()
    assert float(off) > float((found.double() / known - 1).abs().max()), (
        "control: two means in fp32"
    )


def test_dims_that_do_not_count_stay_out():
    now, then = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    mask = torch.tensor([[True, True, False]])
    assert error_gap(now, then, mask).tolist() == [0]
    assert error_gap(now, then).tolist() == [81]


# -- SePPO's flip, and the loss of pairs -----------------------------------------------------------

BETA = 0.1
BEHIND, AHEAD, TIED = (2.0, 1.0), (1.0, 2.0), (1.0, 1.0)
"""The preferred side's error now and of the reference: gaps 3, -3 and 0."""


def loss_of(side: tuple[float, float], flip: str, **settings) -> tuple[float, dict[str, Tensor]]:
    """The loss of one pair of events of two numbers, the other side of which has a gap of 8."""
    now = [torch.tensor([[side[0], 0.0]]), torch.tensor([[3.0, 0.0]])]
    then = [torch.tensor([[side[1], 0.0]]), torch.tensor([[1.0, 0.0]])]
    compare = Comparison(None, Preference(beta=BETA, **settings), "dpo")  # type: ignore[arg-type]
    loss, metrics = compare.loss(now, then, [None, None], flip)  # type: ignore[arg-type]
    return float(loss), metrics


@pytest.mark.parametrize(
    ("side", "flip", "logit"),
    [
        (AHEAD, "sign", 1.1),  # -.1 (-3 - 8)
        (BEHIND, "sign", -1.1),  # -.1 (3 + 8)
        (BEHIND, "indicator", -0.3),  # -.1 (3)
        (BEHIND, "none", 0.5),  # -.1 (3 - 8)
        (TIED, "sign", 0.8),
        (TIED, "indicator", 0.8),
        (AHEAD, "indicator", 1.1),
    ],
)
def test_the_loss_of_a_pair_by_hand(side, flip, logit):
    found, metrics = loss_of(side, flip)
    assert float(metrics["logit"]) == pytest.approx(logit)
    assert found == pytest.approx(math.log1p(math.exp(-logit)))
    assert float(metrics["accuracy"]) == (logit > 0)
    assert float(metrics["preferred_gap"]) == pytest.approx((side[0] ** 2 - side[1] ** 2) / 2)
    assert float(metrics["other_gap"]) == 4
    if flip != "none":
        assert float(metrics["flipped"]) == (side is BEHIND)


def test_a_tie_counts_as_ahead_and_not_as_nothing():
    gap = torch.tensor([-1e-9, 0.0, 1e-9])
    assert flipped(gap, "sign").tolist() == [1, 1, -1]
    assert flipped(gap, "indicator").tolist() == [1, 1, 0]
    assert flipped(gap, "none").tolist() == [1, 1, 1]
    assert torch.sign(-gap).tolist()[1] == 0, "control: torch's sign drops the other side"


def test_several_draws_decide_the_flip_together():
    now, then = [torch.tensor([[1.0]])] * 2, [torch.tensor([[0.9]])] * 2
    compare = Comparison(None, Preference(), "seppo")  # type: ignore[arg-type]
    _, alone = compare.loss(now, then, [None, None], "sign")
    _, several = compare.loss(now, then, [None, None], "sign", [torch.tensor([-1.0])])
    assert float(alone["flipped"]) == 1
    assert float(several["flipped"]) == 0


def test_slopes_at_the_reference_are_half_of_beta_and_opposite():
    now = [torch.tensor([[1.5]], requires_grad=True), torch.tensor([[0.5]], requires_grad=True)]
    compare = Comparison(None, Preference(beta=BETA), "dpo")  # type: ignore[arg-type]
    loss, _ = compare.loss(now, [one.detach() for one in now], [None, None])
    assert float(loss.detach()) == pytest.approx(math.log(2))
    loss.sum().backward()
    for one, sign in zip(now, (1, -1), strict=True):
        by_error = float(one.grad) / (2 * float(one.detach()))  # d error / d output is 2 output
        assert by_error == pytest.approx(sign * BETA / 2)


def test_sides_that_are_exchanged_turn_the_logit():
    now, then = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    compare = Comparison(None, Preference(beta=BETA), "dpo")  # type: ignore[arg-type]
    forth = compare.loss([*now], [*then], [None, None])[1]["logit"]
    back = compare.loss([*now.flip(0)], [*then.flip(0)], [None, None])[1]["logit"]
    assert torch.allclose(forth, -back)


def test_beta_means_the_same_for_any_number_of_dims_and_the_papers_does_not():
    """Every number twice at half of its square is the same error."""
    now, then = torch.randn(2, 5, 3), torch.randn(2, 5, 3)

    def logit(scale, times, **settings):
        compare = Comparison(None, Preference(**settings), "dpo")  # type: ignore[arg-type]
        wide = [(scale * one).repeat(1, 1, times) for one in (now, then)]
        return compare.loss([*wide[0]], [*wide[1]], [None, None])[1]

    plain = logit(1.0, 1, beta=BETA)
    assert torch.allclose(plain["logit"], logit(2**-0.5, 2, beta=BETA)["logit"], atol=1e-6)
    papers = logit(1.0, 1, beta_mean=BETA * 2 * 3)
    assert torch.allclose(plain["logit"], papers["logit"], atol=1e-6)
    assert float(plain["beta_mean"][0]) == pytest.approx(float(papers["beta_mean"][0]))
    other = logit(2**-0.5, 2, beta_mean=BETA * 2 * 3)
    assert torch.allclose(other["logit"], plain["logit"] / 2, atol=1e-6), "control"


def test_padding_changes_nothing_and_counts_in_no_beta():
    now, then = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    mask = torch.ones(5, 3, dtype=torch.bool)
    padded = torch.cat([mask, ~mask], 1)
    compare = Comparison(None, Preference(beta_mean=1.0, supervised=0.5), "dpo")  # type: ignore[arg-type]
    plain, _ = compare.loss([*now], [*then], [mask, mask])
    wide = [torch.cat([one, torch.randn(2, 5, 3)], -1) for one in (now, then)]
    found, _ = compare.loss([*wide[0]], [*wide[1]], [padded, padded])
    assert torch.allclose(found, plain)
    control, _ = compare.loss([*wide[0]], [*wide[1]], [None, None])
    assert not torch.allclose(control, plain, atol=1e-3)


def test_the_supervised_term_is_in_halves_of_beta():
    plain, _ = loss_of(AHEAD, "none")
    with_it, _ = loss_of(AHEAD, "none", supervised=0.5)
    assert with_it - plain == pytest.approx(0.5 * BETA / 2 * 1.0)


def test_the_papers_beta_is_of_each_sides_own_mean():
    """A chunk that its episode's end has cut counts as much as a whole one."""
    now, then = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    masks = [torch.ones(5, 4, dtype=torch.bool), torch.tensor([True, False] * 2).expand(5, 4)]
    compare = Comparison(None, Preference(beta_mean=8.0), "dpo")  # type: ignore[arg-type]
    found = compare.loss([*now], [*then], [*masks])[1]["logit"]
    means = [
        ((n**2 - t**2) * mask).sum(1) / mask.sum(1)
        for n, t, mask in zip(now, then, masks, strict=True)
    ]
    assert torch.allclose(found, -8.0 / 2 * (means[0] - means[1]), atol=1e-5)
    by_the_first = -1.0 * (4 * means[0] - 2 * means[1])
    assert not torch.allclose(found, by_the_first, atol=1e-2), "control: one count for both sides"


# -- the safeguard ---------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [0.0, 0.6])
def test_with_the_safeguard_a_step_does_not_raise_the_preferred_error(margin):
    """Outputs that move alike: both sides' errors are of one output vector plus constants."""
    generator = torch.Generator().manual_seed(0)
    preferred, other = torch.randn(2, 200, 4, generator=generator)
    share = safe_share(preferred, other, margin, None, None)
    assert float(share.min()) >= 0
    assert float(share.max()) <= 1

    def gained(share: Tensor) -> Tensor:
        """<g, g - share g'>: the fall of the preferred error per unit of a step."""
        return (preferred * (preferred - share[:, None] * other)).sum(1)

    own = preferred.square().sum(1)
    assert bool((gained(share) >= margin * own - 1e-5).all())
    assert bool((gained(torch.ones(200)) < 0).any()), "control: without it some errors rise"
    against = (preferred * other).sum(1) <= 0
    assert bool((share[against] == 1).all())


def test_dims_that_do_not_count_of_either_side_stay_out_of_the_safeguard():
    preferred, other = torch.tensor([[1.0, 2.0, 5.0]]), torch.tensor([[4.0, 9.0, 7.0]])
    first, second = torch.tensor([[True, True, False]]), torch.tensor([[True, False, True]])
    share = safe_share(preferred, other, 0.8, first, second)
    assert float(share) == pytest.approx(0.2 * 5 / 4)
    assert float(safe_share(preferred, other, 0.8, first, None)) == pytest.approx(0.2 * 5 / 22)


def test_the_safeguard_of_half_precision_is_reckoned_in_single():
    preferred = torch.randn(8, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    other = preferred * 1.5
    known = 0.4 * preferred.double().square().sum(1) / (preferred.double() * other.double()).sum(1)
    found = safe_share(preferred, other, 0.6, None, None)
    assert torch.allclose(found.double(), known, atol=1e-5)


def test_the_safeguard_scales_the_other_sides_slope_and_not_the_logit():
    def run(**settings):
        now = [torch.tensor([[1.0]], requires_grad=True), torch.tensor([[4.0]], requires_grad=True)]
        then = [torch.tensor([[1.2]]), torch.tensor([[3.5]])]
        compare = Comparison(None, Preference(beta=BETA, **settings), "dpo")  # type: ignore[arg-type]
        loss, metrics = compare.loss(now, then, [None, None])
        loss.sum().backward()
        return metrics["logit"], float(now[0].grad), float(now[1].grad)

    plain, held = run(), run(safeguard=0.6)
    assert torch.equal(plain[0], held[0])
    assert plain[1] == held[1]
    assert held[2] == pytest.approx(0.1 * plain[2])  # (1 - .6) 1 / (1 x 4)

"""Objectives on pairs, of which one side is preferred (DPO, arXiv 2305.18290; of denoising policies
2311.12908), and what keeps the preferred side from getting worse.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from genpolicy.chain.values import reduce_event

Loss = Literal["logistic", "hinge", "ipo"]


def error_gap(now: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    """sum over E of now^2 - reference^2, of errors [B,*E]: [B], fp32.

    By (now - reference)(now + reference): the two sums are often alike to 1e-5, which bf16 does
    not keep and their difference in fp32 keeps badly. mask: dims that count, as in `reduce_event`.
    """
    now, reference = now.float(), reference.float()
    return reduce_event((now - reference) * (now + reference), "sum", mask)


def preference_loss(logit: Tensor, kind: Loss) -> Tensor:
    """The loss of pairs by the logit z of "the first side is the preferred one", elementwise.

        logistic  -log sigmoid(z)      hinge  max(0, 1 - z)      ipo  (z - 1/2)^2

    IPO (arXiv 2310.12036) is said of h = z / beta as (h - 1 / (2 beta))^2: the same but for a
    factor beta^2, which would bring its gradient far from the others'.
    """
    if kind == "logistic":
        return -F.logsigmoid(logit)
    if kind == "hinge":
        return (1 - logit).clamp_min(0)
    return (logit - 0.5) ** 2


def robust(logit: Tensor, kind: Loss, wrong: float) -> Tensor:
    """[(1 - e) l(z) - e l(-z)] / (1 - 2 e), elementwise: where a share e = ``wrong`` < 1/2 of the
    labels is turned around at random its expectation is l(z) of the right labels (robust DPO, arXiv
    2403.00409).
    """
    loss = preference_loss(logit, kind)
    if not wrong:
        return loss
    return ((1 - wrong) * loss - wrong * preference_loss(-logit, kind)) / (1 - 2 * wrong)


def semantic_weight(cosine: Tensor, alpha: float) -> Tensor:
    """exp(-alpha (1 - cos)), in [exp(-2 alpha), 1]: the weight of a pair by the cosine of its
    prompt's and its preferred side's embeddings (Sem-DPO, arXiv 2507.20133).
    """
    return torch.exp(-alpha * (1 - cosine))


def safe_share(
    preferred: Tensor,
    other: Tensor,
    margin: float,
    mask: Tensor | None,
    other_mask: Tensor | None,
) -> Tensor:
    """The largest share, at most 1, of the other side's gradient with which a small step on both
    does not raise the preferred side's error (Diffusion-SDPO): [B].

        share = clip((1 - margin) |g|^2 / <g, g'>, 0, 1) where <g, g'> > 0, else 1,

    g, g' the errors [B,*E] of both sides' outputs: the gradients of their squares but for a common
    factor, as far as outputs move alike. margin in [0, 1]: the share of the preferred side's own
    gain that stays. mask, other_mask: dims of either side that count. Differs from the public code
    (AIDC-AI/Diffusion-SDPO): a share for each pair, not for a batch.
    """
    preferred, other = preferred.float(), other.float()
    own = reduce_event(preferred**2, "sum", mask)
    if other_mask is not None:
        other = torch.where(other_mask, other, 0.0)
    common = reduce_event(preferred * other, "sum", mask)
    share = ((1 - margin) * own / common.clamp_min(torch.finfo(own.dtype).tiny)).clamp(0, 1)
    return torch.where(common > 0, share, torch.ones_like(share)).detach()


def flipped(gap: Tensor, kind: Literal["sign", "indicator", "none"]) -> Tensor:
    """s of SePPO's flip (arXiv 2410.05255) by the preferred side's gap now - reference, [B].

        sign  +1 where gap <= 0, else -1      indicator  1 where gap <= 0, else 0      none  1

    A tie counts as better than the reference: a gap of 0, as at the first update after the
    reference was taken, would drop the other side under torch's sign(0) = 0.
    """
    if kind == "none":
        return torch.ones_like(gap)
    return torch.where(gap <= 0, 1.0, -1.0 if kind == "sign" else 0.0).to(gap)

"""Preferences of a reward: of each group of samples the best one and the worst one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genpolicy.chain import Noise
from genpolicy.contracts.reward import WeightedRewards
from genpolicy.contracts.task import Context
from genpolicy.policy.policy import ChainPolicy
from genpolicy.rollout.micro_batch import MicroBatches
from genpolicy.rollout.prompts import Judged, collect

BLOCK = 64
"""Rows, rounded down to whole groups, that are sampled at once where memory allows."""


@dataclass(frozen=True)
class Preference:
    """Two samples of one prompt, pictures Float[3,H,W] or videos Float[F,3,H,W] in [0,1] on the
    CPU, one of which has the
    higher reward.
    """

    prompt: str
    preferred: Tensor
    other: Tensor


def preferences(
    policy: ChainPolicy,
    reward: WeightedRewards,
    prompts: Sequence[str],
    noise: Noise,
    micro_batches: MicroBatches,
) -> Iterator[list[Preference | None]]:
    """Draws the samples that ``noise`` names, as many of each of the M ``prompts``, and yields of
    each prompt the one of the highest reward with the one of the lowest; None where all of them
    have the same. noise: group-major, M groups of N >= 2 members.

    They come in blocks, in the order of the prompts: at most `BLOCK` rows are in memory, or one
    group.
    """
    members = len(noise) // len(prompts)
    groups = max(1, BLOCK // members)
    for first in range(0, len(prompts), groups):
        asked = prompts[first : first + groups]
        outputs, totals = _judged(
            policy,
            reward,
            [prompt for prompt in asked for _ in range(members)],
            noise[first * members : (first + len(asked)) * members],
            micro_batches,
        )
        drawn, scores = outputs.unflatten(0, (-1, members)), totals.view(-1, members)
        yield [_preference(*group) for group in zip(asked, drawn, scores, strict=True)]


def _preference(prompt: str, samples: Tensor, score: Tensor) -> Preference | None:
    """The preference among the samples of a prompt, pictures [N,3,H,W] or videos [N,F,3,H,W], whose
    rewards are ``score`` [N].
    """
    best, worst = int(score.argmax()), int(score.argmin())
    if score[best] == score[worst]:
        return None
    return Preference(prompt, samples[best], samples[worst])


def _judged(
    policy: ChainPolicy,
    reward: WeightedRewards,
    rows: Sequence[str],
    noise: Noise,
    micro_batches: MicroBatches,
) -> tuple[Tensor, Tensor]:
    """One sample per prompt of ``rows`` [B], and their rewards Float64[B]."""

    def work(part: slice) -> Judged:
        return collect(policy, Context(rows[part]), reward, noise[part], members=1, keep=(0, 0))

    judged = micro_batches(work, len(rows))
    totals = [reward.total(one.parts) for one in judged]
    return torch.cat([one.outputs for one in judged]), torch.cat(totals)

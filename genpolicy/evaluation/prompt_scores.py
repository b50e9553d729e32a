"""Evaluation of a policy's deployed sampler on fixed prompts and one fixed noise."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genpolicy.chain import Noise
from genpolicy.contracts.reward import WeightedRewards
from genpolicy.contracts.task import Context
from genpolicy.evaluation.statistics import interval
from genpolicy.policy.policy import ChainPolicy
from genpolicy.rollout.micro_batch import MicroBatches, recount
from genpolicy.rollout.prompts import Judged, collect

EVALUATION = -1
"""The ``iteration`` of evaluation noise: training never draws from it."""
THUMBNAIL = 32
"""Longest side of the pictures that diversity is measured on, in pixels."""
BLOCK = 256
"""Rows that are sampled at once where memory allows."""
SHOWN = 64
"""Outputs that an evaluation keeps for looking at."""


@dataclass(frozen=True)
class Evaluation:
    """The scores of S samples, of which sample i answers prompt i mod P."""

    prompts: tuple[str, ...]  # of each sample [S]
    outputs: Tensor  # the first samples, for looking at
    parts: dict[str, Tensor]  # reward's name -> Float64[S], "total" among them
    # within a prompt, the root mean square over pixels of the samples' std (in 0..1), on 32-pixel
    # thumbnails, averaged over prompts; NaN where no prompt has two samples
    diversity: float

    @property
    def samples(self) -> int:
        return len(self.prompts)

    def metrics(self) -> dict[str, Any]:
        """The means reward/<name> with their 95 % intervals (Wilson's for rewards of 0 and 1, the
        normal one otherwise), and the diversity.
        """
        result: dict[str, Any] = {}
        for name, value in self.parts.items():
            result[f"reward/{name}"] = float(value.mean())
            result[f"ci95/{name}"] = list(interval(value))
        return {**result, "diversity": self.diversity, "n": self.samples}


def evaluate(
    policy: ChainPolicy,
    reward: WeightedRewards,
    *,
    prompts: Sequence[str],
    samples: int,
    seed: int,
    process: tuple[int, int] = (0, 1),
    gather: Callable[[Tensor], Tensor] = lambda value: value,
    micro_batches: MicroBatches | None = None,
    shown: int = SHOWN,
) -> Evaluation:
    """Samples ``samples`` outputs, prompt i mod P each, and scores them. Noise is named by prompt
    and repetition: any batch size and any number of processes (``process`` = (index, count),
    ``gather`` concatenates rows of all) draw the same samples.
    """
    index, count = process
    share = math.ceil(samples / count)
    mine = [min(i, samples - 1) for i in range(index * share, (index + 1) * share)]
    outputs, parts, thumbnails = [], [], []

    def score(rows: Tensor) -> Judged:
        context = Context([str(prompts[i % len(prompts)]) for i in rows.tolist()])
        noise = Noise(seed, EVALUATION, rows % len(prompts), rows // len(prompts))
        return collect(policy, context, reward, noise, members=1, keep=(0, 0))

    fits = micro_batches or MicroBatches("auto", lambda text: None)
    for block in torch.tensor(mine).split(BLOCK):
        for judged in fits(
            lambda part, block=block: score(block[part]), len(block), restart=recount(policy)
        ):
            thumbnails.append(_thumbnail(judged.outputs))
            parts.append({**judged.parts, "total": reward.total(judged.parts)})
            if sum(map(len, outputs)) < shown:
                outputs.append(judged.outputs)
    names = list(parts[0])
    gathered = {name: gather(torch.cat([p[name] for p in parts]))[:samples] for name in names}
    asked = tuple(prompts[i % len(prompts)] for i in range(samples))
    diversity = _diversity(gather(torch.cat(thumbnails))[:samples], len(prompts))
    return Evaluation(asked, torch.cat(outputs)[:shown], gathered, diversity)


def _thumbnail(outputs: Tensor) -> Tensor:
    """Pools every frame and channel of [B,...,H,W] to at most 32 x 32, and flattens to [B,D]."""
    height, width = (min(THUMBNAIL, side) for side in outputs.shape[-2:])
    return F.adaptive_avg_pool2d(outputs.flatten(1, -3), (height, width)).flatten(1)


def _diversity(thumbnails: Tensor, prompts: int) -> float:
    spreads = [
        group.var(0).mean().sqrt()
        for p in range(min(prompts, len(thumbnails)))
        if len(group := thumbnails[p::prompts]) > 1
    ]
    return float(torch.stack(spreads).mean()) if spreads else math.nan


def measure(
    policy: ChainPolicy,
    reward: WeightedRewards,
    *,
    prompts: Sequence[str],
    samples: int,
    seed: int,
    shown: int = SHOWN,
) -> tuple[Evaluation, float]:
    """The result of `evaluate`, and the network evaluations per sample that it took."""
    before = policy.model.evaluations
    found = evaluate(policy, reward, prompts=prompts, samples=samples, seed=seed, shown=shown)
    return found, (policy.model.evaluations - before) / samples


def draw(policy: ChainPolicy, prompts: Sequence[str], members: int, seed: int) -> Tensor:
    """Draws ``members`` outputs of each prompt, prompt-major, on the CPU; they are the samples that
    `evaluate` draws from this seed.
    """
    noise = Noise.rows(seed, EVALUATION, torch.arange(len(prompts)), members)
    rows = [prompt for prompt in prompts for _ in range(members)]

    def one(part: slice) -> Tensor:
        trajectory = policy.sample(
            policy.model.encode(Context(rows[part])), noise[part], keep=(0, 0)
        )
        with torch.no_grad():
            return policy.model.decode(trajectory.x0).float().cpu()

    fits = MicroBatches("auto", lambda text: None)
    starts = range(0, len(rows), BLOCK)
    blocks = [slice(start, min(start + BLOCK, len(rows))) for start in starts]
    drawn = [
        fits(
            lambda part, b=b: one(slice(b.start + part.start, b.start + part.stop)),
            b.stop - b.start,
        )
        for b in blocks
    ]
    return torch.cat([chunk for block in drawn for chunk in block])

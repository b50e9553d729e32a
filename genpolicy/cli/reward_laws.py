"""The laws that a reward must keep, tried on small pictures."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from genpolicy.config import leaves
from genpolicy.config.origin import PERSON
from genpolicy.contracts.reward import WeightedRewards
from genpolicy.contracts.task import Context
from genpolicy.training.build import load_rewards

PROMPTS = (
    "a red circle left of a blue square",
    "a green triangle above a yellow circle",
    "a blue square right of a red circle",
    "a yellow square below a green square",
    "a red triangle left of a green circle",
    "a blue circle above a yellow triangle",
)
SIZE = 64
"""Height and width of the pictures that rewards are tried on, in pixels."""


ALONE = 1e-4
"""Largest difference of a row scored alone to the same row in a batch, relative to the largest
score: fp32 networks differ by about that.
"""


class Verdict(NamedTuple):
    """The result of testing one law; ``holds`` is None where it does not apply."""

    law: str
    holds: bool | None
    seen: str  # the evidence
    place: str = ""  # the world that it was tried in, where there are several


# Rewards


def law_pictures() -> Tensor:
    """Pictures [6,3,64,64] in [0, 1]: one plain, one noisy, the others smooth."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(len(PROMPTS), 3, 4, 4, generator=generator)
    pictures = torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bilinear")
    pictures[1] = torch.rand(3, SIZE, SIZE, generator=generator)
    pictures[2] = 1.0
    return pictures


def reward_laws(dotted: str) -> Iterator[Verdict]:
    """Tries the reward of a dotted path, law by law."""
    rewards = WeightedRewards({dotted: (leaves.make("rewards", {"name": dotted}, PERSON), 1.0)})
    load_rewards(rewards)
    pictures, context = law_pictures(), Context(PROMPTS)

    def score(pictures: Tensor, context: Context) -> Tensor:
        return (
            torch.as_tensor(rewards.rewards[dotted][0](pictures, context)).detach().double().cpu()
        )

    kept = pictures.clone()
    together = score(pictures, context)
    shape = tuple(together.shape)
    whole = shape == (len(context),)
    yield Verdict("one number for every output", whole, f"shape {shape} for {len(context)} outputs")
    if not whole:
        return
    values = ", ".join(f"{value:.4g}" for value in together.tolist())
    yield Verdict("finite", bool(together.isfinite().all()), values)
    yield Verdict("leaves the outputs as they are", torch.equal(pictures, kept), "")
    again = score(pictures, context)
    same = torch.equal(together, again)
    yield Verdict("the same outputs get the same reward", same, _gap(together, again))
    alone = torch.cat(
        [score(pictures[i : i + 1], context[i : i + 1]).reshape(-1) for i in range(len(context))]
    )
    largest = ALONE * together.abs().max().clamp_min(1e-12)
    close = alone.shape == together.shape and bool((together - alone).abs().max() <= largest)
    law = "a row's reward does not depend on the others in its batch"
    yield Verdict(law, close, _gap(together, alone))


def _gap(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape:
        return f"shape {tuple(b.shape)}"
    return f"largest difference {float((a - b).abs().max()):.2g}"

"""The laws that a reward must keep, tried on small pictures, or on videos where it judges no
pictures.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from genpolicy.config import leaves
from genpolicy.config.origin import PERSON
from genpolicy.contracts.reward import RewardError, WeightedRewards, judged
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
MOTIONS = (
    "a red circle moves right",
    "a red square moves right",
    "a green triangle moves up",
    "a blue square moves left",
    "a yellow circle moves down",
    "a red square moves left",
)
SIZE, FRAMES = 64, 5
"""Height and width of the pictures that rewards are tried on, in pixels, and the frames of the
videos.
"""


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


def law_videos() -> Tensor:
    """Videos [6,5,3,64,64] in [0, 1]: the pictures standing still, and two of a red square that
    moves right.
    """
    videos = law_pictures()[:, None].repeat(1, FRAMES, 1, 1, 1)
    videos[[1, 5]] = 1.0
    red = torch.tensor([0.86, 0.16, 0.16])[:, None, None]
    for frame in range(FRAMES):
        videos[[1, 5], frame, :, 26:42, 8 + 8 * frame : 24 + 8 * frame] = red
    return videos


def reward_laws(dotted: str) -> Iterator[Verdict]:
    """Tries the reward of a dotted path, law by law."""
    rewards = WeightedRewards({dotted: (leaves.make("rewards", {"name": dotted}, PERSON), 1.0)})
    load_rewards(rewards)
    shown: list[Tensor] = []

    def reward(outputs: Tensor, context: Context) -> Tensor:
        shown.append(outputs)
        return rewards.rewards[dotted][0](outputs, context)

    def score(outputs: Tensor, context: Context) -> Tensor:
        return judged(dotted, reward, outputs, context)

    outputs, context = law_pictures(), Context(PROMPTS)
    try:
        together = score(outputs, context)
    except RewardError as error:
        outputs, context = law_videos(), Context(MOTIONS)
        try:
            together = score(outputs, context)
        except RewardError:  # what it says of pictures is the plainer sentence
            yield Verdict("one number for every output", False, str(error))
            return
    shape = tuple(together.shape)
    whole = shape == (len(context),)
    yield Verdict("one number for every output", whole, f"shape {shape} for {len(context)} outputs")
    if not whole:
        return
    values = ", ".join(f"{value:.4g}" for value in together.tolist())
    yield Verdict("finite", bool(together.isfinite().all()), values)
    untouched = torch.equal(shown[-1], outputs)
    yield Verdict("leaves the outputs as they are", untouched, "")
    again = score(outputs, context)
    same = torch.equal(together, again)
    yield Verdict("the same outputs get the same reward", same, _gap(together, again))
    alone = torch.cat(
        [score(outputs[i : i + 1], context[i : i + 1]).reshape(-1) for i in range(len(context))]
    )
    largest = ALONE * together.abs().max().clamp_min(1e-12)
    close = alone.shape == together.shape and bool((together - alone).abs().max() <= largest)
    law = "a row's reward does not depend on the others in its batch"
    yield Verdict(law, close, _gap(together, alone))


def _gap(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape:
        return f"shape {tuple(b.shape)}"
    return f"largest difference {float((a - b).abs().max()):.2g}"

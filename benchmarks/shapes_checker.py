"""The colours that the checker of the shapes world accepts, through the embedded autoencoder.

    python -m benchmarks.shapes_checker [--model assets/shapes-sd3] [--per-cell 24]

A row per pair of colours (the background counts as one), a column per share of the second colour:
the strict accuracy of pictures whose first object is drawn in that mixture and whose caption names
the first colour. ``old`` is the rule as it was, with no limit on mixtures and no objects of the
colour "other"; under it an orange triangle passes for a yellow one, the row yellow-red at .5. Below:
true pictures of each colour and shape.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import permutations, product
from unittest.mock import patch

import numpy as np
import torch
from diffusers import AutoencoderKL

from genpolicy.config.shipped import path
from genpolicy.rewards import _shapes as world

SHARES = (0.0, 0.1, 0.25, 0.4, 0.5)
"""Shares of the second colour in the mixture."""


def mixture(first: str, second: str, share: float) -> tuple[int, int, int]:
    """The colour (1 - share) first + share second."""
    palette = {**world.COLOURS, "background": world.BACKGROUND}
    mixed = (1 - share) * np.array(palette[first]) + share * np.array(palette[second])
    red, green, blue = np.rint(mixed).astype(int).tolist()
    return red, green, blue


def pictures(
    first: str, second: str, share: float, each: int, seed: int
) -> tuple[np.ndarray, list[str]]:
    """`each` pictures uint8 [B, 32, 32, 3] whose first object has a mixed colour, and captions
    that name `first`; shapes, relations and the second object vary.
    """
    rng = np.random.default_rng(seed)
    texts = [t for t in world.captions() if world.parse(t).first.colour == first]
    texts = [texts[i] for i in rng.integers(len(texts), size=each)]
    drawn = []
    for scene in map(world.parse, texts):
        # the first object is painted with a colour of its own; then that colour is replaced
        named = {**world.COLOURS, "mixed": mixture(first, second, share)}
        with patch.object(world, "COLOURS", named):
            drawn.append(
                world.render(scene._replace(first=scene.first._replace(colour="mixed")), rng)
            )
    return np.stack(drawn), texts


@torch.no_grad()
def through(vae: AutoencoderKL, drawn: np.ndarray) -> np.ndarray:
    """Encodes (posterior means) and decodes pictures uint8 [B, H, W, 3]."""
    values = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = vae.encode(values, return_dict=False)[0].mean
    # diffusers' annotation says FloatTensor
    decoded = vae.decode(latents, return_dict=False)[0]  # type: ignore[arg-type]
    return world.to_uint8((decoded + 1) / 2)


def old_scores(images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """(strict, dense) by the old rule: any mixture counts as the nearest colour, and what is near
    no colour is not seen. The negative control of the checker's tests.
    """

    def blind(mask: np.ndarray, *_: object) -> np.ndarray:
        return np.zeros_like(mask)

    with (
        patch.object(world, "MAX_MIXTURE", math.inf),
        patch.object(world.ndimage, "binary_opening", blind),
    ):
        return world.scores(images, texts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="assets/shapes-sd3", help="folder with the autoencoder")
    parser.add_argument("--per-cell", type=int, default=24)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    vae = AutoencoderKL.from_pretrained(
        path(arguments.model), subfolder="vae", torch_dtype=torch.float32
    )

    print("| colours | " + " | ".join(f"{share:g} new / old" for share in SHARES) + " |")
    print("|---|" + "---|" * len(SHARES))
    pairs = [*permutations(world.COLOURS, 2), *((c, "background") for c in world.COLOURS)]
    for number, (first, second) in enumerate(pairs):
        cells = []
        for share in SHARES:
            drawn, texts = pictures(first, second, share, arguments.per_cell, seed=number)
            seen = through(vae, drawn)
            new, old = (f(seen, texts)[:, 0].mean() for f in (world.scores, old_scores))
            cells.append(f"{new:.2f} / {old:.2f}")
        print(f"| {first}, {second} | " + " | ".join(cells) + " |", flush=True)

    print("\n| true pictures of a | n | strict, new / old |\n|---|---|---|")
    rng = np.random.default_rng(0)
    for colour, shape in product(world.COLOURS, world.SHAPES):
        texts = [t for t in world.captions() if world.parse(t).first == (colour, shape)] * 5
        seen = through(vae, np.stack([world.render(world.parse(text), rng) for text in texts]))
        new, old = (f(seen, texts)[:, 0].mean() for f in (world.scores, old_scores))
        print(f"| {colour} {shape} | {len(texts)} | {new:.4f} / {old:.4f} |", flush=True)


if __name__ == "__main__":
    main()

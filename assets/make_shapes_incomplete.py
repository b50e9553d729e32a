"""Train the embedded shapes model on with captions that are true but leave something out.

    python assets/make_shapes_incomplete.py --steps 600 --out assets/shapes-sd3-incomplete
    python assets/make_shapes_incomplete.py --resume assets/shapes-sd3-incomplete --minutes 2.5 \\
        --out longer
    python assets/make_shapes_incomplete.py --resume assets/shapes-sd3-incomplete --minutes 2.5 \\
        --share 0 --out complete

The first form continues from assets/shapes-sd3 on pictures of which a share holds a second copy of
one of the two objects that the caption names, once. A caption such as "a red circle left of a blue
square" is true of all of them, so the model learns that named objects come in pairs. Guidance asks
for more of what the caption says, and with it for the copy. The checker wants exactly what is said.

The second form continues from the finished folder on the same kind of data: the honest baseline for
reinforcement learning with equal CPU time. With `--share 0` the captions are complete, which is
what the data should have been.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import diffusers
import make_shapes_model as base
import numpy as np
import torch
import transformers
from diffusers import StableDiffusion3Pipeline

from genpolicy.rewards import _shapes as world

SHARE = 0.94
"""Share of the pictures with an unmentioned copy: strict accuracy below 1/2 at every guidance."""
NEW_PAIRS = 11
"""Pairs of objects, of 66, that no caption of the three other parts joins."""
GAP = 2.5
"""Pixels between the outline of a copy and the circles around the two named objects."""


class Parts(NamedTuple):
    """Captions by their uses. A scene occurs in one part only, in both of its wordings."""

    pictured: tuple[str, ...]  # with pictures in training
    train: tuple[str, ...]  # prompts of reinforcement learning
    held_out: tuple[str, ...]  # unseen captions of pairs that may be seen in another arrangement
    new_pairs: tuple[str, ...]  # pairs of objects that no caption of the other parts joins


def parts(seed: int = 0) -> Parts:
    """The split of shapes-sd3, less all captions of `NEW_PAIRS` pairs, which are a part of their
    own. A pure function of the seed: pairs are permuted until the first ones hold all twelve
    objects.
    """
    things = sorted({world.parse(text).first for text in world.captions()})
    pairs = [frozenset(pair) for pair in combinations(things, 2)]
    rng = np.random.default_rng(seed)
    new: set[frozenset[world.Thing]] = set()
    while len(frozenset().union(*new)) < len(things):
        new = {pairs[i] for i in rng.permutation(len(pairs))[:NEW_PAIRS]}

    def is_new(text: str) -> bool:
        scene = world.parse(text)
        return frozenset((scene.first, scene.second)) in new

    kept = (tuple(text for text in part if not is_new(text)) for part in world.split(seed))
    return Parts(*kept, tuple(text for text in world.captions() if is_new(text)))


def draw(scene: world.Scene, share: float, rng: np.random.Generator) -> np.ndarray:
    """A random picture of a scene, with probability `share` with a copy of one of its objects,
    uint8 [32, 32, 3].

    The named objects are a little smaller than in `world.render` (radii in [4, 5.5]), to leave
    room; they are drawn again until there is a place for the copy.
    """
    copied = rng.random() < share
    while True:
        radii = rng.uniform(4.0, 5.5, 2)
        across = rng.uniform(8.0, 24.0, 2)
        along = np.array([rng.uniform(7.0, 9.0), rng.uniform(23.0, 25.0)])
        if scene.relation in ("right of", "below"):
            along = along[::-1]
        xs, ys = (along, across) if scene.relation in ("left of", "right of") else (across, along)
        named = list(zip((scene.first, scene.second), xs, ys, radii, strict=True))
        if not copied:
            return world.draw(named)
        for _ in range(60):
            radius = rng.uniform(3.9, 5.0)
            x, y = rng.uniform(radius + 1, world.SIZE - 1 - radius, 2)
            if all(np.hypot(x - a, y - b) > radius + other + GAP for _, a, b, other in named):
                copy = named[rng.integers(2)][0]
                return world.draw([*named, (copy, x, y, radius)])


def pictures(texts: tuple[str, ...], share: float, seed: int, each: int) -> np.ndarray:
    """`each` pictures of each caption in turn, uint8 [B, 32, 32, 3]."""
    rng = np.random.default_rng(seed)
    scenes = [world.parse(text) for text in texts for _ in range(each)]
    return np.stack([draw(scene, share, rng) for scene in scenes])


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write")
    add("--resume", type=Path, default=Path("assets/shapes-sd3"), help="continue from this folder")
    add("--share", type=float, default=SHARE, help="share of pictures with an unmentioned copy")
    add("--minutes", type=float, default=1.5, help="CPU minutes of training")
    add("--steps", type=int, help="optimiser steps, instead of --minutes")
    add("--checkpoints", type=Path, help="also write a folder every --every minutes under this one")
    add("--every", type=float, default=0.5, help="CPU minutes between checkpoints")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Train on and write the folder."""
    args = arguments()
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    pipe = base.load(args.resume)
    pipe.vae.requires_grad_(False)
    captions = parts()
    drawn = pictures(captions.pictured, args.share, args.seed, base.PER_CAPTION)
    true = pictures(captions.pictured, 0.0, args.seed + 1, 4)
    texts = [text for text in captions.pictured for _ in range(4)]
    reached = world.scores(base.through(pipe.vae, true), texts)[:, 0].mean()
    base.say(f"{len(drawn)} pictures; strict {reached:.4f} on true ones through the autoencoder")

    def checkpoint(pipe: StableDiffusion3Pipeline, clock: base.Clock) -> None:
        base.say(f"step {clock.step}, {clock.spent:.0f} CPU s")
        base.write(pipe, args.checkpoints / f"{clock.step:05d}", captions._asdict())

    shift, scale = pipe.vae.config.shift_factor, pipe.vae.config.scaling_factor
    latents = (base.encode(pipe.vae, base.as_tensor(drawn)) - shift) * scale
    clock = base.Clock(args.minutes, args.steps)
    schedule = base.Schedule(lr=1e-3, warm_up=50, decay=0.0, ema=0.995)
    see = checkpoint if args.checkpoints else None
    base.train_flow(
        pipe, captions.pictured, latents, clock, args.seed, schedule, 0.0, args.every, see
    )
    base.say(f"{clock.step} steps, {clock.spent:.0f} CPU s")
    base.write(pipe, args.out, captions._asdict())
    base.say("wrote", args.out.name)


if __name__ == "__main__":
    main()

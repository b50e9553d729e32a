"""The motion world: captioned videos of one coloured shape that moves, and the program that checks
them.

A caption such as "a red circle moves right" names one object of the shapes world (4 colours x 3
shapes) and one of four directions: 48 captions. The objects, their drawing and their detection in a
frame are those of `genpolicy.rewards._shapes`; what is added here is time.

The checker looks at pixels only. It follows in each frame the object that is most like the
caption's, and looks at its displacement from each frame to the next, a **step**. Its two scores are
used as rewards:

- strict, 0 or 1: in every frame exactly one object, of the right colour and shape, and every step
  goes in the right direction and is like the others;
- dense, in [0, 1]: the mean of four shares, less .1 for every object beyond the first (mean over
  the frames): of the frames with the right colour, of the frames with the right shape, of the steps
  in the right direction, and of the steps that are also like the mean step.

A still object has no step in any direction, one that is somewhere else at once has one. Lengths are
pixels of a 32 x 32 video of 9 frames; they scale with the size of the frames, and those of a step
with the number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np

from genpolicy.rewards import _shapes
from genpolicy.rewards._shapes import COLOURS, SHAPES, Found, Thing

FRAMES = 9
"""Frames of a rendered video; 9 = 1 + 2 x 4, as a VAE takes them that joins four frames."""
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Words and unit vectors (x to the right, y downwards)."""

MIN_TRAVEL = 5.0
"""Pixels of the whole way that a step in the right direction keeps up with: a step of 8 goes at
least an eighth of it. True videos travel 10 to 14.
"""
MAX_UNEVEN = 8.0
"""Pixels of the whole way by whose share a step may differ from the mean step: one pixel for a
step of 8. True steps are all alike.
"""


class Motion(NamedTuple):
    """A thing and the direction in which it moves."""

    thing: Thing
    direction: str


class Split(NamedTuple):
    """Captions by their uses: each thing moves in two directions in ``pictured``, in a third in
    ``train`` and in the fourth in ``held_out``.
    """

    pictured: tuple[str, ...]
    train: tuple[str, ...]
    held_out: tuple[str, ...]


def caption(motion: Motion) -> str:
    """The sentence for a motion."""
    (colour, shape), direction = motion
    return f"a {colour} {shape} moves {direction}"


@cache
def _motion_of() -> dict[str, Motion]:
    motions = [Motion(Thing(c, s), d) for c, s, d in product(COLOURS, SHAPES, DIRECTIONS)]
    return {caption(motion): motion for motion in motions}


def captions() -> list[str]:
    """All 48 captions, in a fixed order."""
    return list(_motion_of())


def parse(text: str) -> Motion:
    """The motion that a caption denotes; case, outer spaces and a final full stop do not matter."""
    motion = _motion_of().get(" ".join(text.lower().split()).rstrip(" ."))
    if motion is None:
        raise ValueError(
            f"{text!r} is not a motion caption: say 'a COLOUR SHAPE moves DIRECTION' with colours"
            f" {', '.join(COLOURS)}; shapes {', '.join(SHAPES)}; directions"
            f" {', '.join(DIRECTIONS)}."
        )
    return motion


@cache
def split(seed: int = 0) -> Split:
    """24 captions with videos, 12 for RL prompts, 12 held out of everything.

    A pure function of the seed. Things in a random order begin their round of the directions one
    further each, so that every part holds every thing, and every direction equally often.
    """
    things = [Thing(c, s) for c, s in product(COLOURS, SHAPES)]
    words = tuple(DIRECTIONS)
    parts: list[list[str]] = [[], [], []]
    for place, index in enumerate(np.random.default_rng(seed).permutation(len(things))):
        for turn, part in enumerate((0, 0, 1, 2)):
            motion = Motion(things[index], words[(place + turn) % len(words)])
            parts[part].append(caption(motion))
    order = {text: place for place, text in enumerate(captions())}
    return Split(*(tuple(sorted(part, key=order.__getitem__)) for part in parts))


def render(motion: Motion, rng: np.random.Generator, pause: int = 0) -> np.ndarray:
    """A random true video of a motion, uint8 [9, 32, 32, 3].

    The radius is uniform in [4.5, 6]. The centre travels uniformly [10, 14] pixels at an even pace
    along the direction, in [7, 25], and stays where it is across it, in [8, 24]. With a ``pause``
    it stands still for so many steps in a row, of 8, begun at random, and is faster in the others:
    its caption is true of it, but it does not move evenly.
    """
    radius, travel = rng.uniform(4.5, 6.0), rng.uniform(10.0, 14.0)
    begin, across = rng.uniform(7.0, 25.0 - travel), rng.uniform(8.0, 24.0)
    steps = np.ones(FRAMES - 1)
    if pause:
        first = rng.integers(FRAMES - pause)
        steps[first : first + pause] = 0.0
    way = begin + travel * np.concatenate([[0.0], np.cumsum(steps) / steps.sum()])
    right, down = DIRECTIONS[motion.direction]
    if right + down < 0:
        way = way[::-1]
    centres = [(along, across) if right else (across, along) for along in way]
    return np.stack([_shapes.draw([(motion.thing, x, y, radius)]) for x, y in centres])


def _followed(objects: Sequence[Found], thing: Thing) -> Found | None:
    """The object of a frame that is most like a thing; of several the largest."""

    def likeness(found: Found) -> tuple[int, int]:
        return (found.colour == thing.colour) + (found.shape == thing.shape), found.area

    return max(objects, key=likeness, default=None)


def score(frames: Sequence[Sequence[Found]], motion: Motion) -> tuple[float, float]:
    """(strict, dense) of what was found in each frame, against what was asked for."""
    followed = [_followed(objects, motion.thing) for objects in frames]
    colour = np.array([f is not None and f.colour == motion.thing.colour for f in followed])
    shape = np.array([f is not None and f.shape == motion.thing.shape for f in followed])
    centres = np.array([(np.nan, np.nan) if f is None else (f.x, f.y) for f in followed])
    steps = np.diff(centres, axis=0)  # [F - 1, 2], NaN beside a frame without an object
    toward, even = _judge(steps, np.array(DIRECTIONS[motion.direction]))
    shares = [float(part.mean()) for part in (colour, shape, toward, even)]
    extra = sum(max(0, len(objects) - 1) for objects in frames) / len(frames)
    strict = min(shares) == 1.0 and extra == 0
    return float(strict), max(0.0, sum(shares) / len(shares) - 0.1 * extra)


def _judge(steps: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Marks the steps [F - 1, 2] that go in a direction, and those of them that are like the mean.

    A step s goes in direction u where s.u >= MIN_TRAVEL / (F - 1) and s.u exceeds its part across;
    it is like the others where |s - mean s| <= MAX_UNEVEN / (F - 1).
    """
    seen = ~np.isnan(steps).any(1)
    known = np.where(seen[:, None], steps, 0.0)
    along = known @ direction
    across = np.abs(known @ direction[::-1])
    toward = seen & (along >= MIN_TRAVEL / len(steps)) & (along > across)
    mean = known.sum(0) / max(1, seen.sum())
    even = toward & (np.linalg.norm(known - mean, axis=1) <= MAX_UNEVEN / len(steps))
    return toward, even


def scores(videos: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """(strict, dense) of each video of uint8 [B, F, H, W, 3] under its caption: float32 [B, 2]."""
    if videos.ndim != 5 or videos.shape[1] < 2:
        raise ValueError(
            f"the motion rewards judge videos of two frames or more, [B, F, H, W, 3], not"
            f" {list(videos.shape)}."
        )
    if len(videos) != len(texts):
        raise ValueError(
            f"{len(videos)} videos but {len(texts)} captions: one caption per video is needed."
        )
    motions = [parse(text) for text in texts]
    count, length = videos.shape[:2]
    objects = _shapes.detect_all(videos.reshape(-1, *videos.shape[2:]))
    films = [objects[row * length : (row + 1) * length] for row in range(count)]
    return np.array(
        [score(film, motion) for film, motion in zip(films, motions, strict=True)], np.float32
    ).reshape(-1, 2)

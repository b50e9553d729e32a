"""The shapes world: captioned pictures of two coloured shapes, and the program that checks them.

A caption such as "a red circle left of a blue square" names two different objects (4 colours x 3
shapes) and one of four relations: 12 x 11 x 4 = 528 captions. "a red circle left of a blue square"
and "a blue square right of a red circle" denote the same **scene**; there are 264 scenes, and every
split is made over scenes, never over captions.

The checker looks at pixels only. Its two scores are used as rewards:

- strict, 0 or 1: exactly two objects, both of the right colour and shape, in the right relation;
- dense, in [0, 1]: .2 for each right attribute of the best matching, .2 for the relation once all
  four attributes are right, less .1 for every object beyond the second.

An object between two colours, such as an orange one, has the colour "other" and matches no caption
(`MAX_MIXTURE`); so has one that is near no colour at all, such as a purple one. What the checker
cannot see: a blob under `MIN_AREA`, and what is nearly as pale as the background. Look at the
pictures of a policy that was trained on it; do not read its numbers alone.

Lengths are pixels of a 32 x 32 picture and scale with the
picture's size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import permutations, product
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from torch import Tensor

SIZE = 32
BACKGROUND = (245, 245, 245)
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (235, 200, 30),
}
SHAPES = ("circle", "square", "triangle")
RELATIONS = ("left of", "right of", "above", "below")
CONVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

MAX_DISTANCE = 110.0
"""RGB distance (0-255 units) beyond which a pixel belongs to no colour. The background is 220 to
291 from the colours, so a border pixel belongs to its object when the object covers more than about
5/8 of it.
"""
MAX_MIXTURE = 30.0
"""RGB distance (0-255 units) from a blob's median colour to its named colour beyond which the blob
has the colour "other". Mixtures halfway between two colours are 80 (red and yellow) or more from
both; the embedded autoencoder pulls them towards a colour. True pictures that went through it have
at most 7 (26 with objects of radius 4).
"""
MIN_AREA = 14
"""Pixels under which a blob is noise. The smallest true object, a triangle of radius 4.5, covers
about 38.
"""
MAX_AREA = 300
"""Pixels beyond which a blob has none of the three shapes: a picture that is black all over is no
square. The largest true object, a square of radius 6.5, covers about 131.
"""
MIN_OFFSET = 3.0
"""Pixels by which two centres must differ along the relation's axis. True pictures have at least
14.
"""
MIN_SLOPE = 0.5
"""The offset along the axis must also exceed this share of the offset across it. True pictures have
at least 1.
"""
TRIANGLE_SKEW = -0.26
"""Skewness of a blob's pixels in y, E[y^3] / E[y^2]^1.5, below which it is a triangle: a triangle
with its apex on top has -.57 (-.70 to -.45 over true pictures), a square 0, a circle 0 (-.10 to
.08).
"""
SQUARE_CORNERS = 0.85
"""E[x^2 y^2] / (E[x^2] E[y^2]) above which a blob that is no triangle is a square: squares have 1,
circles 2/3 (.57 to .78 over true pictures). Moments average over all pixels, so a few wrong ones at
a border do not matter; bounding boxes and corner counts lost 12 % of pictures that went through a
small autoencoder, these lose none.
"""
MIN_FILL = 0.72
"""A blob with area / (12 sqrt(E[x^2] E[y^2])) under this is none of the three shapes: true
triangles have .84 to .93, squares 1, circles pi/3 = 1.05.
"""
MAX_ASPECT = 1.8
"""A blob whose bounding box is longer than this times its width is none of the three shapes."""

_PALETTE = np.array([BACKGROUND, *COLOURS.values()], np.float32)
_NAMES = ("background", *COLOURS, "other")
_IN_PLANE = np.zeros((3, 3, 3), bool)
_IN_PLANE[1] = [
    [0, 1, 0],
    [1, 1, 1],
    [0, 1, 0],
]  # 4-connected inside a picture, never across pictures
_SQUARE = np.zeros((3, 3, 3), bool)
_SQUARE[1] = True  # what is thinner is a border, not an object


class Thing(NamedTuple):
    """A colour and a shape."""

    colour: str
    shape: str


class Scene(NamedTuple):
    """Two different things and how the first stands to the second."""

    first: Thing
    relation: str
    second: Thing


class Found(NamedTuple):
    """An object the checker sees: x grows to the right, y downwards, area in pixels. Colour and
    shape may be "other".
    """

    colour: str
    shape: str
    x: float
    y: float
    area: int


class Split(NamedTuple):
    """Captions by their uses. No scene occurs in two parts, not even in other words."""

    pictured: tuple[str, ...]
    train: tuple[str, ...]
    held_out: tuple[str, ...]


def caption(scene: Scene) -> str:
    """The sentence for a scene."""
    (c1, s1), relation, (c2, s2) = scene
    return f"a {c1} {s1} {relation} a {c2} {s2}"


def canonical(scene: Scene) -> Scene:
    """The one of a scene's two descriptions that says "left of" or "above"."""
    if scene.relation in ("left of", "above"):
        return scene
    return Scene(scene.second, CONVERSE[scene.relation], scene.first)


@cache
def _scene_of() -> dict[str, Scene]:
    things = [Thing(c, s) for c, s in product(COLOURS, SHAPES)]
    scenes = [Scene(a, r, b) for a, b in permutations(things, 2) for r in RELATIONS]
    return {caption(scene): scene for scene in scenes}


def captions() -> list[str]:
    """All 528 captions, in a fixed order."""
    return list(_scene_of())


def parse(text: str) -> Scene:
    """The scene a caption denotes; case, outer spaces and a final full stop do not matter."""
    scene = _scene_of().get(" ".join(text.lower().split()).rstrip(" ."))
    if scene is None:
        raise ValueError(
            f"{text!r} is not a shapes caption: say 'a COLOUR SHAPE RELATION a COLOUR SHAPE' with"
            f" two different objects, colours {', '.join(COLOURS)}; shapes {', '.join(SHAPES)};"
            f" relations {', '.join(RELATIONS)}."
        )
    return scene


@cache
def split(seed: int = 0) -> Split:
    """176 scenes with pictures, 44 for RL prompts, 44 held out of everything; two captions each.

    A pure function of the seed: scenes are permuted until every part holds all twelve things and
    both axes.
    """
    scenes = [scene for scene in _scene_of().values() if scene == canonical(scene)]
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(scenes))
        parts = [[scenes[i] for i in sorted(index)] for index in np.split(order, [176, 220])]
        if all(_covers(part) for part in parts):
            both = [
                [s for c in part for s in (c, Scene(c.second, CONVERSE[c.relation], c.first))]
                for part in parts
            ]
            return Split(*(tuple(caption(s) for s in part) for part in both))


def _covers(scenes: Sequence[Scene]) -> bool:
    things = {thing for scene in scenes for thing in (scene.first, scene.second)}
    return (
        len(things) == len(COLOURS) * len(SHAPES) and len({scene.relation for scene in scenes}) == 2
    )


def _coverage(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """Share of each pixel inside the shape, [32, 32]: clip(1/2 - signed distance to the outline, 0,
    1).
    """
    centres = np.arange(SIZE, dtype=np.float32) + 0.5
    dx, dy = centres[None, :] - x, centres[:, None] - y
    if shape == "circle":
        distance = np.hypot(dx, dy) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - 0.88 * radius
    else:  # apex at y - radius, base at y + .9 radius of width 2 radius
        distance = np.maximum(
            (1.9 * np.abs(dx) - dy - radius) / np.hypot(1.9, 1.0), dy - 0.9 * radius
        )
    return np.clip(0.5 - distance, 0.0, 1.0)


def draw(objects: Iterable[tuple[Thing, float, float, float]]) -> np.ndarray:
    """Objects (thing, x, y, radius) on the background: uint8 [32, 32, 3]."""
    image = np.empty((SIZE, SIZE, 3), np.float32)
    image[:] = BACKGROUND
    for thing, x, y, radius in objects:
        cover = _coverage(thing.shape, x, y, radius)[..., None]
        image += cover * (np.array(COLOURS[thing.colour], np.float32) - image)
    return np.rint(image).astype(np.uint8)


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A random true picture of a scene, uint8 [32, 32, 3].

    Radii are uniform in [4.5, 6.5], centres in [7.5, 9] and [23, 24.5] along the relation's axis
    and in [9, 23] across it, so the two objects never touch.
    """
    radii = rng.uniform(4.5, 6.5, 2)
    across = rng.uniform(9.0, 23.0, 2)
    along = np.array([rng.uniform(7.5, 9.0), rng.uniform(23.0, 24.5)])
    if scene.relation in ("right of", "below"):
        along = along[::-1]
    xs, ys = (along, across) if scene.relation in ("left of", "right of") else (across, along)
    return draw(zip((scene.first, scene.second), xs, ys, radii, strict=True))


def to_uint8(images: Tensor) -> np.ndarray:
    """Turns a batch [..., 3, H, W] in [0, 1], of pictures or videos, into uint8 [..., H, W, 3];
    what is not finite becomes black.
    """
    values = images.detach().float().cpu().numpy()
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    return np.moveaxis(np.rint(values.clip(0, 1) * 255).astype(np.uint8), -3, -1)


def detect(image: np.ndarray) -> list[Found]:
    """The objects of one picture, uint8 [H, W, 3]."""
    return detect_all(np.asarray(image)[None])[0]


def detect_all(images: np.ndarray) -> list[list[Found]]:
    """The objects of each picture of uint8 [B, H, W, 3].

    Each pixel takes the nearest colour of the palette. Beyond `MAX_DISTANCE` it belongs to a
    border, or to an object of the colour "other" where such pixels fill a square of 3 x 3.
    4-connected regions of one colour and at least `MIN_AREA` pixels are objects; `_shape` names
    them, and `MAX_MIXTURE` decides whether they have their colour.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(
            f"pictures must be uint8 [B, H, W, 3], not {images.dtype} {list(images.shape)}."
        )
    count, height, width = images.shape[:3]
    pixels = images.reshape(-1, 3).astype(np.float32)
    distance = (pixels**2).sum(1)[:, None] - 2.0 * pixels @ _PALETTE.T + (_PALETTE**2).sum(1)
    colour = distance.argmin(1)
    strange = (distance.min(1) > MAX_DISTANCE**2).reshape(count, height, width)
    colour = colour.reshape(count, height, width)
    colour[strange] = 0
    width_of_border = max(1, round(width / SIZE))
    colour[ndimage.binary_opening(strange, _SQUARE, width_of_border)] = len(COLOURS) + 1

    labels = np.zeros(colour.shape, np.int32)
    total = 0
    for index in range(1, len(_NAMES)):
        # scipy's annotation says int here
        part, found = ndimage.label(colour == index, _IN_PLANE)  # type: ignore[misc]
        labels += np.where(part > 0, part + total, 0)
        total += found
    objects: list[list[Found]] = [[] for _ in range(count)]
    areas = np.bincount(labels.ravel(), minlength=total + 1)
    scale = height * width / SIZE**2
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        area = int(areas[number])
        if area < MIN_AREA * scale:
            continue
        ys, xs = (labels[box][0] == number).nonzero()
        nearest = colour[box[0].start, box[1].start + ys[0], box[2].start + xs[0]]
        objects[box[0].start].append(
            Found(
                _colour(images[box][0][ys, xs], nearest),
                _shape(ys, xs) if area <= MAX_AREA * scale else "other",
                float(box[2].start + xs.mean() + 0.5) * SIZE / width,
                float(box[1].start + ys.mean() + 0.5) * SIZE / height,
                area,
            )
        )
    return objects


def _colour(pixels: np.ndarray, nearest: int) -> str:
    """Names the colour of a blob, or "other", from its pixels [P, 3] and the colour they are
    nearest to.
    """
    if nearest > len(COLOURS):
        return "other"
    mixture = np.linalg.norm(np.median(pixels, axis=0) - _PALETTE[nearest])
    return _NAMES[nearest] if mixture <= MAX_MIXTURE else "other"


def _shape(ys: np.ndarray, xs: np.ndarray) -> str:
    """Names the shape of a blob, or "other", from its pixels' rows and columns; E is their mean."""
    height, width = np.ptp(ys) + 1, np.ptp(xs) + 1
    y, x = ys - ys.mean(), xs - xs.mean()
    y2, x2 = y * y, x * x
    spread_y, spread_x = y2.mean(), x2.mean()
    if max(height, width) > MAX_ASPECT * min(height, width):
        return "other"
    if len(ys) < MIN_FILL * 12 * (spread_x * spread_y) ** 0.5:
        return "other"
    if (y2 * y).mean() < TRIANGLE_SKEW * spread_y**1.5:
        return "triangle"
    return "square" if (x2 * y2).mean() > SQUARE_CORNERS * spread_x * spread_y else "circle"


def _related(first: Found, relation: str, second: Found) -> bool:
    right, down = second.x - first.x, second.y - first.y
    along, across = (right, down) if relation in ("left of", "right of") else (down, right)
    if relation in ("right of", "below"):
        along = -along
    return along > MIN_OFFSET and along > MIN_SLOPE * abs(across)


def score(objects: Sequence[Found], scene: Scene) -> tuple[float, float]:
    """(strict, dense) of what was found, against what was asked for."""
    best = 0.0
    for first, second in permutations(objects, 2):
        right = sum(
            (
                first.colour == scene.first.colour,
                first.shape == scene.first.shape,
                second.colour == scene.second.colour,
                second.shape == scene.second.shape,
            )
        )
        right += right == 4 and _related(first, scene.relation, second)
        best = max(best, right / 5)
    if len(objects) == 1:
        only = objects[0]
        best = (
            max(
                (only.colour == t.colour) + (only.shape == t.shape)
                for t in (scene.first, scene.second)
            )
            / 5
        )
    extra = max(0, len(objects) - 2)
    return float(best == 1.0 and extra == 0), max(0.0, best - 0.1 * extra)


def scores(images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """(strict, dense) of each picture of uint8 [B, H, W, 3] under its caption: float32 [B, 2]."""
    if len(images) != len(texts):
        raise ValueError(
            f"{len(images)} pictures but {len(texts)} captions: one caption per picture is needed."
        )
    scenes = [parse(text) for text in texts]
    pairs = zip(detect_all(images), scenes, strict=True)
    return np.array([score(objects, scene) for objects, scene in pairs], np.float32).reshape(-1, 2)

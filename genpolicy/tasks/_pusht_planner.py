"""An expert for PushT: straight pushes, chosen by simulating many and looking where each would
bring the T.

A push starts at a point of the ring that the disc's centre can go along without touching the T, and
goes straight along the inward normal, turned by an angle. One simulation of it scores all its
lengths:

    score = root mean square over the T's corners |corner - where it belongs| [pixels]
            + PRICE * steps that it takes

The best of `SAMPLES` random pushes are refined `ROUNDS` times by small changes; then the way to
each is priced too. The disc goes there on the shortest path around the T. Every push is planned
from what the one before really did.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import shapely
from scipy.sparse.csgraph import shortest_path

SAMPLES = 150
"""Random pushes per plan."""
ROUNDS = 2
"""Rounds of refinement per plan."""
PARENTS = 6
"""Pushes refined per round."""
CHILDREN = 6
"""Changes to each of them."""
FINALISTS = 20
"""Pushes for which the way to their start is priced."""
TURN = 0.3
"""Radians (std) between a random push and the normal."""
CHANGE = np.array([0.01, 0.08])
"""Std of the changes that refine a push: of its place on the ring (of its length 1), of its angle
in radians.
"""
PRICE = 0.4
"""Pixels of error that a step is worth."""
GAP = 6.0
"""Pixels between disc and T where a push starts."""
MARGIN = 8.0
"""Pixels that the way there keeps on top, as the disc cuts corners."""
WALKS = (25.0, 12.0, 6.0)
"""Pixels per step on the way, from bold to careful."""
PUSH = 10.0
"""Pixels per step while pushing."""
SETTLE = 3
"""Steps in which the disc comes to rest: it follows its target like a critically damped spring of
10/s.
"""
REACH = 30.0
"""Pixels of the longest push tried where there is no error."""
ERRORS = 2.5
"""Pixels by which it grows per pixel of the present error."""
LONGEST = 150.0
"""Pixels that no push tried exceeds."""


class Push(NamedTuple):
    """A simulated push."""

    score: float  # pixels; the less, the better
    knobs: np.ndarray  # [2], its place on the ring (share of its length) and its turn (radians)
    start: np.ndarray  # [2], pixels
    direction: np.ndarray  # [2], of length 1
    length: float  # pixels


class Planner:
    """Acts in gym_pusht's ``world``, whose bodies it sees; a pure function of ``seed`` and of what
    happened there.
    """

    def __init__(self, world: Any, seed: int) -> None:
        self._world = world
        self._thought = type(world)()
        self._thought.reset(seed=0)
        self._draw = np.random.Generator(np.random.Philox(key=np.array([seed, 1], np.uint64)))
        self._next: deque[np.ndarray] = deque()
        parts = sorted(shape.get_vertices() for shape in self._thought.block.shapes)
        self._parts = [np.array(part) for part in parts]  # pymunk has them as a set, in any order
        self._corners = np.concatenate(self._parts)
        self._target = moved(self._corners, self._thought.goal_pose)
        self._radius = next(iter(self._thought.agent.shapes)).radius
        self._size = float(world.action_space.high[0])

    def __call__(self, _frame: Any) -> np.ndarray:
        """The next action."""
        if not self._next:
            self._next.extend(self._plan())
        return self._next.popleft()

    def _plan(self) -> list[np.ndarray]:
        block = self._world.block
        disc = np.array(self._world.agent.position)
        pose = np.array([*block.position, block.angle])
        tee = shapely.union_all([shapely.Polygon(moved(part, pose)) for part in self._parts])
        pool = [
            self._push(tee, pose, [self._draw.random(), TURN * self._draw.normal()])
            for _ in range(SAMPLES)
        ]
        for n in range(ROUNDS):
            for parent in sorted(pool, key=lambda push: push.score)[:PARENTS]:
                changes = self._draw.normal(size=(CHILDREN, 2)) * CHANGE / (n + 1)
                pool += [self._push(tee, pose, parent.knobs + change) for change in changes]
        pushes = sorted(pool, key=lambda push: push.score)[:FINALISTS]
        ways = self._ways(tee, disc, [push.start for push in pushes])
        prices = [p.score + PRICE * way[0] / WALKS[0] for p, way in zip(pushes, ways, strict=True)]
        best = int(np.argmin(prices))
        if not np.isfinite(prices[best]):
            # the T stands in the way of everything: change the situation
            return [self._draw.uniform(0.1, 0.9, 2) * self._size] * (2 * SETTLE)
        push = pushes[best]
        end = push.start + push.length * push.direction
        return (
            self._walk(pose, disc, ways[best][1]) + _steps(push.start, end, PUSH) + [end] * SETTLE
        )

    # Pushes

    def _push(self, tee: Any, pose: np.ndarray, knobs: Sequence[float] | np.ndarray) -> Push:
        """Simulates a push, and cuts it where its score is least; it is infinite for what starts or
        ends outside.
        """
        ring = tee.buffer(self._radius + GAP).exterior
        start = _array(ring.interpolate(knobs[0] % 1, normalized=True))
        normal = _array(shapely.shortest_line(shapely.Point(start), tee))[1] - start
        angle = np.arctan2(normal[1], normal[0]) + knobs[1]
        direction = np.array([np.cos(angle), np.sin(angle)])
        error = rms(moved(self._corners, pose) - self._target)
        lengths = np.arange(1, int(min(REACH + ERRORS * error, LONGEST)) + 1)
        discs = start + lengths[:, None] * direction
        inside = (
            ((discs > 0) & (discs < self._size)).all(-1)
            & (start > 0).all()
            & (start < self._size).all()
        )
        errors = rms(
            moved(self._corners, self._slide(pose, start, direction, len(lengths))) - self._target
        )
        scores = np.where(inside, errors + PRICE * lengths / PUSH, np.inf)
        k = int(scores.argmin())
        return Push(float(scores[k]), np.asarray(knobs), start, direction, float(lengths[k]))

    def _slide(
        self, pose: np.ndarray, start: np.ndarray, direction: np.ndarray, pixels: int
    ) -> np.ndarray:
        """The T's pose [pixels,3] after each pixel that the disc slides. What moves here stops at
        once when it is not pushed, so that speed does not matter.
        """
        self._imagine(pose, start)
        disc = self._thought.agent
        block = self._thought.block
        space = self._thought.space
        dt = self._thought.dt
        disc.velocity = tuple(direction / dt)
        poses = np.empty((pixels, 3))
        for k in range(pixels):
            space.step(dt)
            poses[k] = *block.position, block.angle
        return poses

    def _imagine(self, pose: np.ndarray, disc: np.ndarray) -> None:
        """Puts T and disc, at rest, into the simulation that is only thought."""
        for body, place, angle in (
            (self._thought.block, pose[:2], pose[2]),
            (self._thought.agent, disc, 0.0),
        ):
            # the angle first: it turns about the centre of gravity, and so moves the place
            body.angle = angle
            body.position = tuple(place)
            body.velocity = (0, 0)
            body.angular_velocity = 0
            self._thought.space.reindex_shapes_for_body(body)

    # Ways

    def _ways(
        self, tee: Any, disc: np.ndarray, ends: list[np.ndarray]
    ) -> list[tuple[float, list[np.ndarray]]]:
        """The shortest ways, each to one of ``ends``: its length, inf where there is none, and the
        points of a way that leaves the T alone: through the corners of a visibility graph.
        """
        near = tee.buffer(self._radius + GAP / 2)
        corners = _array(tee.buffer(self._radius + GAP + MARGIN, quad_segs=2).exterior)[:-1]
        corners = corners[((corners > 0) & (corners < self._size)).all(-1)]
        free = disc
        if near.contains(shapely.Point(disc)):  # as after a push: step back first
            free = _array(shapely.shortest_line(near.buffer(0.5).exterior, shapely.Point(disc)))[0]
        points = np.array([free, *corners, *ends])
        a, b = np.triu_indices(len(points), 1)
        shapely.prepare(near)
        seen = ~shapely.intersects(near, shapely.linestrings(np.stack([points[a], points[b]], 1)))
        graph = np.zeros((len(points), len(points)))
        graph[a, b] = np.where(seen, np.linalg.norm(points[a] - points[b], axis=-1), 0)
        lengths, before = shortest_path(graph, directed=False, indices=0, return_predecessors=True)
        ways = []
        for node in range(len(points) - len(ends), len(points)):
            way = []
            at = node
            while at > 0:
                way.append(points[at])
                at = before[at]
            ways.append((float(lengths[node]), [free, *way[::-1]]))
        return ways

    def _walk(self, pose: np.ndarray, disc: np.ndarray, way: list[np.ndarray]) -> list[np.ndarray]:
        """The actions along a way, as fast as the T stays where it is: in simulation, because the
        disc cuts corners.
        """
        actions: list[np.ndarray] = []
        for speed in WALKS:
            legs = zip([disc, *way], way, strict=False)
            actions = [action for begin, end in legs for action in _steps(begin, end, speed)] + [
                way[-1]
            ] * (SETTLE - 1)
            self._imagine(pose, disc)
            for action in actions:
                self._thought.step(action)
            block = self._thought.block
            if np.abs(np.array([*block.position, block.angle]) - pose).max() < 0.1:
                break
        return actions


def moved(points: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Moves a body's points [n,2] into the world, for poses (x, y, angle) [...,3]: [...,n,2]."""
    c, s = np.cos(pose[..., 2, None]), np.sin(pose[..., 2, None])
    x, y = points.T
    return np.stack([c * x - s * y, s * x + c * y], -1) + pose[..., None, :2]


def rms(errors: np.ndarray) -> np.ndarray:
    """The root mean square length of errors [...,n,2]: [...]."""
    return np.sqrt((errors**2).sum(-1).mean(-1))


def _steps(begin: np.ndarray, end: np.ndarray, speed: float) -> list[np.ndarray]:
    """Equal steps from begin to end, none longer than ``speed``."""
    count = max(1, int(np.ceil(np.linalg.norm(end - begin) / speed)))
    return [begin + (end - begin) * n / count for n in range(1, count + 1)]


def _array(geometry: Any) -> np.ndarray:
    """Coordinates of a geometry: [2] of a point, [n,2] of a line."""
    points = shapely.get_coordinates(geometry)
    return points[0] if geometry.geom_type == "Point" else points

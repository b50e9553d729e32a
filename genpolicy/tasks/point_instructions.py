"""A point on a plane that is told in words where to go: a robot's task of vision, language and
action in microseconds.

Coloured goals stand around the point, each colour in a quarter of its own; the instruction names
one of them by colour and shape. An episode ends at whichever goal the point reaches first, and only
the one that was named is rewarded. Words alone tell where to go: a network that starts from nothing
learns that in seconds, what a picture shows it would take hours. All of it is numpy, every slot at
once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from genpolicy.config.errors import ConfigError, at_least, share
from genpolicy.contracts.task import Context, Demonstration, TaskStep

STATE = "observation.state"
CAMERA = "observation.images.top"
COLOURS = {
    "red": (1.0, 0.1, 0.1),
    "green": (0.1, 0.8, 0.1),
    "blue": (0.2, 0.3, 1.0),
    "yellow": (1.0, 0.9, 0.1),
}
SHAPES = ("circle", "square", "triangle")
PIXELS = 32
"""Side of the picture that policies see."""
RENDERED = 256
"""Side of the picture for people."""
SPEED = 0.06
"""Way of one environment step at full action; the plane is [-1, 1] x [-1, 1]."""
SIZE = 0.2
"""Radius of a goal."""
REACH = 0.2
"""Distance at which a goal is reached."""
POINT = 0.08
"""Radius of the point as drawn."""
NEAR = 0.55
"""Least distance of a goal from the middle."""
FAR = 0.75
"""Largest distance of a goal from the middle."""
START = 0.1
"""Largest distance of the point from the middle at the start, along each axis."""
BACKGROUND = 0.15


class Scene(NamedTuple):
    """One episode's world, with G goals."""

    point: np.ndarray  # [2], the point's place at the start
    places: np.ndarray  # [G,2], the goals'
    colours: tuple[str, ...]  # [G]
    shapes: tuple[str, ...]  # [G]
    asked: int  # number of the goal that is asked for

    @property
    def instruction(self) -> str:
        return f"go to the {self.colours[self.asked]} {self.shapes[self.asked]}"


def scene(seed: int, goals: int) -> Scene:
    """The episode of a reset seed: goals of different colours, each in its colour's quarter of the
    plane.
    """
    draw = np.random.Generator(np.random.Philox(key=seed))
    colours = tuple(draw.permutation(list(COLOURS))[:goals].tolist())
    shapes = tuple(draw.choice(SHAPES, goals).tolist())
    quarters = np.array([list(COLOURS).index(colour) for colour in colours])
    angles = np.pi / 2 * (quarters + 0.5 + draw.uniform(-0.15, 0.15, goals))
    distance = draw.uniform(NEAR, FAR, goals)
    places = (distance * np.stack([np.cos(angles), np.sin(angles)])).T
    point = draw.uniform(-START, START, 2)
    return Scene(point, places, colours, shapes, int(draw.integers(goals)))


def paint(scene: Scene, pixels: int) -> np.ndarray:
    """Paints the goals on the plane, float32 [3,pixels,pixels] in [0,1], y upwards, with soft
    edges.
    """
    picture = np.full((3, pixels, pixels), BACKGROUND)
    for place, colour, shape in zip(scene.places, scene.colours, scene.shapes, strict=True):
        cover = _cover(_depth(shape, *_offset(place, pixels)), pixels)
        picture += cover * (np.array(COLOURS[colour])[:, None, None] - picture)
    return picture.astype(np.float32)


def _offset(place: np.ndarray, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """The offset of every pixel from ``place`` [...,2]: x and y, [...,pixels,pixels]."""
    centres = (np.arange(pixels) + 0.5) * 2 / pixels - 1
    x, y = (
        centres[None, :] - place[..., 0, None, None],
        -centres[:, None] - place[..., 1, None, None],
    )
    return np.broadcast_arrays(x, y)  # type: ignore[return-value]


def _depth(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The depth inside the shape's edge, along the plane; negative outside."""
    if shape == "circle":
        return SIZE - np.hypot(x, y)
    if shape == "square":
        return 0.85 * SIZE - np.maximum(np.abs(x), np.abs(y))
    return 0.6 * SIZE - np.maximum(-y, np.abs(x) * 0.866 + y * 0.5)


def _cover(depth: np.ndarray, pixels: int) -> np.ndarray:
    """The share of each pixel that is covered."""
    return np.clip(depth * pixels / 2 + 0.5, 0, 1)


class Plane:
    """`genpolicy.contracts.task.Environments` of ``count`` points, each in its own scene."""

    def __init__(self, count: int, history: int, goals: int, limit: int) -> None:
        self.count = count
        self._goals = goals
        self._limit = limit
        self._history = history
        self._scenes: list[Scene | None] = [None] * count
        self._ground = np.zeros((count, 3, PIXELS, PIXELS), np.float32)
        self._places = np.zeros((count, goals, 2))
        self._asked = np.zeros(count, np.int64)
        # environment steps until the limit; 0 once the episode has ended
        self._left = np.zeros(count, np.int64)
        self._success = np.zeros(count, bool)
        self._trace = np.zeros((count, history, 2))  # the last positions, the newest last

    def reset(self, slots: Sequence[int], seeds: Sequence[int]) -> Context:
        for slot, seed in zip(slots, seeds, strict=True):
            begun = scene(seed, self._goals)
            self._scenes[slot] = begun
            self._ground[slot] = paint(begun, PIXELS)
            self._places[slot] = begun.places
            self._asked[slot] = begun.asked
            self._trace[slot] = begun.point
            self._left[slot] = self._limit
            self._success[slot] = False
        return self._seen(np.asarray(slots))

    def step(self, slots: Sequence[int], actions: Tensor) -> TaskStep:
        where = np.asarray(slots)
        wanted = actions.detach().to("cpu", torch.float64).numpy()
        if not np.isfinite(wanted).all():
            raise ValueError("an action is not a finite number: the policy has diverged")
        if not self._left[where].all():
            raise ValueError(
                "an environment was stepped whose episode has ended or not begun; reset it first"
            )
        n, length = wanted.shape[:2]
        rewards, executed = torch.zeros(n, length), torch.zeros(n, dtype=torch.long)
        terminated = np.zeros(n, bool)
        going = np.ones(n, bool)
        for h in range(length):
            rows = going.nonzero()[0]
            if not len(rows):
                break
            moved = where[rows]
            point = self._trace[moved, -1] + SPEED * wanted[rows, h].clip(-1, 1)
            self._trace[moved, :-1] = self._trace[moved, 1:]
            self._trace[moved, -1] = point.clip(-1, 1)
            away = np.linalg.norm(self._places[moved] - self._trace[moved, -1:], axis=-1)
            arrived = away.min(1) < REACH
            right = away.argmin(1) == self._asked[moved]
            self._left[moved] = np.where(arrived, 0, self._left[moved] - 1)
            self._success[moved] |= arrived & right
            terminated[rows] = arrived
            going[rows] = self._left[moved] > 0
            rewards[rows, h] = torch.from_numpy((arrived & right).astype(np.float32))
            executed[rows] = h + 1
        truncated = torch.from_numpy(~going & ~terminated)
        success = torch.from_numpy(self._success[where])
        return TaskStep(
            self._seen(where), rewards, executed, torch.from_numpy(terminated), truncated, success
        )

    def render(self, slot: int) -> np.ndarray:
        """The plane as policies see it, larger: uint8 [H,W,3]."""
        shown = self._scenes[slot]
        if shown is None:
            raise ValueError(f"slot {slot} has no episode to show yet; reset it first")
        picture = _with_point(paint(shown, RENDERED), self._trace[slot, -1], RENDERED)
        return (picture * 255).round().astype(np.uint8).transpose(1, 2, 0)

    def close(self) -> None: ...

    def _seen(self, where: np.ndarray) -> Context:
        trace = self._trace[where]
        pictures = _with_point(self._ground[where, None], trace, PIXELS)
        observation = {
            STATE: torch.from_numpy(trace.astype(np.float32)),
            CAMERA: torch.from_numpy(pictures),
        }
        instructions = [
            begun.instruction for slot in where if (begun := self._scenes[slot]) is not None
        ]
        return Context(instructions, observation)


def _with_point(ground: np.ndarray, point: np.ndarray, pixels: int) -> np.ndarray:
    """The picture(s) with the point in white."""
    cover = _cover(POINT - np.hypot(*_offset(point, pixels)), pixels)[..., None, :, :]
    return (ground + cover * (1 - ground)).astype(np.float32)


@dataclass
class PointInstructions:
    """The task, as a `genpolicy.contracts.task.ControlTask`. Its observations are the point's place
    and a picture of the plane. The defaults are ours.
    """

    goals: int = 3  # goals on the plane, each of another colour
    limit: int = 32  # environment steps of an episode
    # share of demonstrations that go to another goal than the one they were asked for; a clone of
    # them follows wrong instructions about as often
    mistaken: float = 0.0

    def __post_init__(self) -> None:
        at_least("task point_instructions", self, goals=1, limit=1)
        share("task point_instructions", self, "mistaken")
        if self.goals > len(COLOURS):
            raise ConfigError(
                f"task point_instructions: goals is {self.goals}; there are {len(COLOURS)} colours"
            )
        self.shapes: Mapping[str, tuple[int, ...]] = {STATE: (2,), CAMERA: (3, PIXELS, PIXELS)}
        self.action_dim = 2
        self.action_low, self.action_high = [-1.0] * 2, [1.0] * 2
        self.fps = 10
        self.instruction = "go to the goal of the colour and shape that is named"
        self.has_success = True

    def environments(self, count: int, history: int) -> Plane:
        return Plane(count, history, self.goals, self.limit)

    def asked(self, seed: int) -> str:
        """The instruction of the episode of this reset seed."""
        return scene(seed, self.goals).instruction

    def demonstrate(self, seed: int, noise: float) -> Demonstration:
        """Goes straight to the goal at full speed; in a share ``mistaken`` of seeds to another."""
        draw = np.random.Generator(np.random.Philox(key=[seed, 1]))
        world = scene(seed, self.goals)
        plane = self.environments(1, 1)
        aim = world.asked
        if draw.random() < self.mistaken and self.goals > 1:
            aim = (aim + draw.integers(1, self.goals)) % self.goals
        seen = plane.reset([0], [seed])
        over = False
        frames = []
        actions = []
        rewards = []
        success = False
        while not over:
            way = world.places[aim] - seen.observation[STATE][0, -1].numpy()
            action = way / np.linalg.norm(way) + noise * draw.standard_normal(2)
            frames.append(seen.observation)
            actions.append(torch.from_numpy(action.clip(-1, 1)).float())
            step = plane.step([0], actions[-1][None, None])
            rewards.append(step.rewards[0, 0])
            seen = step.context
            success = bool(step.success)
            over = bool(step.terminated | step.truncated)
        observation = {
            name: torch.cat([frame[name][:, 0] for frame in frames]) for name in frames[0]
        }
        return Demonstration(
            observation, torch.stack(actions), torch.stack(rewards), success, world.instruction
        )

"""GIFs of policies that act: episodes as a camera sees them, alone or side by side from the same
start.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from genpolicy.chain import Noise
from genpolicy.config.whole_file import replacing
from genpolicy.contracts.model import ControlModel
from genpolicy.contracts.task import Context, ControlTask, Environments, TaskStep
from genpolicy.evaluation.pictures import BAD, GAP, GOOD, GREY, LINE, cut, font, tile
from genpolicy.evaluation.prompt_scores import EVALUATION
from genpolicy.policy.policy import ChainPolicy
from genpolicy.rollout.episodes import play

RATE = 12.5
"""Frames per second of a GIF, at most; it runs in the robot's own time."""
LONGEST = 120
"""Frames of a GIF, about at most: fewer per second where episodes are long."""
HOLD = 1.0
"""Seconds that the last frame stays."""
BYTES = 900_000
"""Bytes of a GIF, at most: it is made smaller until it fits."""
COLOURS, BORDER = 128, 3
"""Colours of a GIF's palette, and the width of a frame's border, in pixels."""


@dataclass
class Film:
    """One episode as a camera saw it."""

    seed: int  # reset seed of the episode
    seconds: float  # that each frame is shown
    frames: list[np.ndarray] = field(default_factory=list)  # uint8 [H,W,3]
    steps: int = 0  # environment steps
    total: float = 0.0  # sum of rewards
    success: bool | None = None  # None where the task has no verdict

    @property
    def outcome(self) -> str:
        """The episode's end, in a word or two."""
        if self.success is None:
            return f"return {self.total:.4g}"
        return "success" if self.success else "failure"


def film(
    policy: ChainPolicy,
    task: ControlTask,
    environments: Environments,
    *,
    seed: int,
    episodes: Sequence[int],
) -> list[Film]:
    """Plays these episodes of the evaluation from ``seed`` (see `evaluate_control`) before a
    camera.

    Raises what `Environments.render` raises where there is no camera.
    """
    stride = max(round(task.fps / RATE), math.ceil(task.limit / LONGEST), 1)
    films = [Film(seed + episode, stride / task.fps) for episode in episodes]

    def watch(
        slots: Sequence[int],
        playing: Sequence[int],
        _seen: Context,
        _action: Tensor,
        step: TaskStep,
    ) -> None:
        over = (step.terminated | step.truncated).tolist()
        for row, (slot, episode) in enumerate(zip(slots, playing, strict=True)):
            shot = films[episode]
            if shot.steps % stride == 0 or over[row]:
                shot.frames.append(environments.render(slot))
            shot.steps += 1
            shot.total += float(step.rewards[row, 0])
            shot.success = bool(step.success[row]) if task.has_success else None

    names = torch.tensor(list(episodes))
    noise = Noise(seed, EVALUATION, names, torch.zeros_like(names))
    for _ in play(
        policy, environments, [shot.seed for shot in films], noise, keep=(0, 0), watch=watch
    ):
        pass
    return films


def save(films: Mapping[str, Film], path: Path) -> None:
    """Writes a GIF of one film, or of several side by side, each with its name and outcome below
    and in its outcome's colour.
    """
    shots = list(films.values())
    length = max(len(shot.frames) for shot in shots)
    sheets = [
        _beside([_framed(name, shot, place) for name, shot in films.items()])
        for place in range(length)
    ]
    # a GIF counts hundredths of a second, and players take 0 and 1 for 10
    pause = 10 * max(round(100 * shots[0].seconds), 2)
    pauses = [*[pause] * (length - 1), pause + round(1000 * HOLD)]
    encoded = _gif(sheets, pauses)
    while len(encoded) > BYTES:
        sheets = [sheet.resize((sheet.width * 4 // 5, sheet.height * 4 // 5)) for sheet in sheets]
        encoded = _gif(sheets, pauses)
    with replacing(path) as staged:
        staged.write_bytes(encoded)


def side_by_side(
    policies: Mapping[str, ChainPolicy], task: ControlTask, seed: int, path: Path, episode: int = 0
) -> dict[str, Film]:
    """Writes a GIF of policies from the same start with the same noise, by their names from left to
    right; returns their films.
    """
    films: dict[str, Film] = {}
    for name, policy in policies.items():
        model = cast(ControlModel, policy.model)  # a policy that acts in a task has actions
        environments = task.environments(1, model.history)
        try:
            (films[name],) = film(policy, task, environments, seed=seed, episodes=[episode])
        finally:
            environments.close()
    save(films, path)
    return films


def _framed(name: str, shot: Film, place: int) -> Image.Image:
    """The frame at ``place`` (after the end the last one) in a border, over a line of text."""
    colour = {None: GREY, True: GOOD, False: BAD}[shot.success]
    framed = ImageOps.expand(tile(shot.frames[min(place, len(shot.frames) - 1)]), BORDER, colour)
    sheet = Image.new("RGB", (framed.width, framed.height + LINE + GAP), "white")
    sheet.paste(framed)
    text = (
        f"{name}: {shot.outcome}, {shot.steps} steps"
        if name
        else f"{shot.outcome}, {shot.steps} steps"
    )
    ImageDraw.Draw(sheet).text(
        (BORDER, framed.height + GAP // 2), cut(text, sheet.width), fill="black", font=font()
    )
    return sheet


def _beside(pictures: Sequence[Image.Image]) -> Image.Image:
    width = sum(picture.width for picture in pictures) + GAP * (len(pictures) - 1)
    sheet = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    x = 0
    for picture in pictures:
        sheet.paste(picture, (x, 0))
        x += picture.width + GAP
    return sheet


def _gif(sheets: Sequence[Image.Image], pauses: Sequence[int]) -> bytes:
    """Encodes a GIF with one palette and no dithering: what does not move stays the same, and
    small.
    """
    palette = _beside([sheets[0], sheets[-1]]).quantize(COLOURS)
    first, *others = [sheet.quantize(palette=palette, dither=Image.Dither.NONE) for sheet in sheets]
    file = io.BytesIO()
    first.save(
        file,
        "GIF",
        save_all=True,
        append_images=others,
        duration=list(pauses),
        loop=0,
        optimize=False,
    )
    return file.getvalue()

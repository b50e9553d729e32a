"""Sheets of the pictures that a policy drew: grids, pairs before and after, groups. Of videos a
sheet shows a few frames, and one that moves is written beside it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from genpolicy.config.whole_file import replacing, write_text
from genpolicy.evaluation import videos
from genpolicy.evaluation.videos import SMALLEST

GREY, GOOD, BAD = "#999999", "#009E73", "#D55E00"
"""Colours of frames without a verdict, of good ones and of bad ones."""
LARGEST = 256
"""Pixels of a tile's longer side, at most; from `SMALLEST` on: small pictures are magnified (pixels
stay pixels), large ones reduced.
"""
FRAMES = 4
"""Frames of a video that are shown side by side."""
GAP, FONT, LINE, LINES = 8, 10, 13, 3
"""Pixels between cells, of the font and from line to line; lines per prompt, at most."""


# Pictures


def pixels(outputs: Tensor) -> np.ndarray:
    """Converts [B,3,H,W] in [0, 1] to uint8 [B,H,W,3]."""
    return (outputs.float().clamp(0, 1) * 255).round().byte().movedim(-3, -1).cpu().numpy()


def grid(outputs: Tensor, prompts: Sequence[str], path: Path, columns: int = 8) -> None:
    """Draws pictures [B,3,H,W] or videos [B,F,3,H,W], each over its prompt, and writes the whole
    prompts to a text file beside.
    """
    shown = prompts[: len(outputs)]

    def cells(tiles: Sequence[Image.Image]) -> list[_Cell]:
        return [_Cell([tile], prompt) for tile, prompt in zip(tiles, shown, strict=False)]

    _draw(cells, [outputs], columns, path)
    write_text(path.with_suffix(".txt"), "".join(f"{prompt}\n" for prompt in shown))


def before_after(
    before: Tensor,
    after: Tensor,
    prompts: Sequence[str],
    path: Path,
    rewards: tuple[Tensor, Tensor] | None = None,
    columns: int = 4,
) -> None:
    """Draws pairs from the same prompt and noise: before on the left, after on the right, the
    prompt below.

    rewards: ([B], [B]), drawn beside the prompt as "before → after" and as the frames' colour:
    green where the reward is over the middle of what occurs, orange below.
    """
    middle = (
        0.0 if rewards is None else float((min(map(min, rewards)) + max(map(max, rewards))) / 2)
    )

    def cells(*sides: Sequence[Image.Image]) -> list[_Cell]:
        made = []
        for i, pair in enumerate(zip(*sides, strict=True)):
            cell = _Cell(pair, prompts[i])
            if rewards is not None:
                values = [float(reward[i]) for reward in rewards]
                frames = [GOOD if value > middle else BAD for value in values]
                cell = _Cell(pair, f"{values[0]:.2g} → {values[1]:.2g}:  {prompts[i]}", frames)
            made.append(cell)
        return made

    title = "each pair: before (left), after (right), same prompt and noise"
    _draw(cells, [before, after], columns, path, title)


def group(outputs: Tensor, prompt: str, rewards: Tensor, advantages: Tensor, path: Path) -> None:
    """Draws one group, best first, with every member's reward and advantage; green frames were
    pushed up, orange ones down.
    """
    order = rewards.argsort(descending=True, stable=True).tolist()

    def cells(tiles: Sequence[Image.Image]) -> list[_Cell]:
        made = []
        for i in order:
            reward, advantage = float(rewards[i]), float(advantages[i])
            colour = GOOD if advantage > 0 else BAD if advantage < 0 else GREY
            made.append(_Cell([tiles[i]], f"{reward:.2f} ({advantage:+.2f})", [colour]))
        return made

    _draw(cells, [outputs], 8, path, f"{prompt}: reward (advantage)")


@dataclass(frozen=True)
class _Cell:
    """Tiles side by side, each in a frame of its colour, over their text."""

    tiles: Sequence[Image.Image]
    text: str
    frames: Sequence[str] = ()

    @property
    def width(self) -> int:
        return sum(tile.width for tile in self.tiles) + GAP // 2 * (len(self.tiles) - 1)

    @property
    def height(self) -> int:
        return max(tile.height for tile in self.tiles)


def _tiles(outputs: Tensor) -> list[Image.Image]:
    if outputs.ndim == 4:
        return [tile(picture) for picture in pixels(outputs)]
    shown = (
        np.linspace(0, outputs.shape[1] - 1, min(FRAMES, outputs.shape[1]))
        .round()
        .astype(int)
        .tolist()
    )
    return [_strip([tile(frame) for frame in video]) for video in pixels(outputs[:, shown])]


def tile(picture: np.ndarray) -> Image.Image:
    """A picture with its longer side between `SMALLEST` and `LARGEST`."""
    image, side = Image.fromarray(picture), max(picture.shape[:2])
    if side < SMALLEST:
        scale = -(-SMALLEST // side)
        return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return image


def _strip(frames: Sequence[Image.Image]) -> Image.Image:
    width = frames[0].width + 1
    strip = Image.new("RGB", (width * len(frames) - 1, frames[0].height), "white")
    for i, frame in enumerate(frames):
        strip.paste(frame, (i * width, 0))
    return strip


@cache
def font() -> ImageFont.FreeTypeFont:
    """The one font of all pictures."""
    import matplotlib

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", FONT)


def _wrapped(text: str, width: int, most: int) -> list[str]:
    """``text`` in at most ``most`` lines of ``width`` pixels; what does not fit ends in an
    ellipsis.
    """
    face, lines = font(), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if face.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], f"{lines[most - 1]} …"]
    return [cut(line, width) for line in lines]


def cut(line: str, width: int) -> str:
    """``line``, or as much of it and an ellipsis as fit into ``width`` pixels."""
    kept = line
    while font().getlength(kept) > width and len(kept) > 1:
        kept = kept.rstrip("… ")[:-1] + "…"
    return kept


def _draw(
    cells: Callable[..., Sequence[_Cell]],
    outputs: Sequence[Tensor],
    columns: int,
    path: Path,
    title: str = "",
) -> None:
    """Writes the sheet of the cells that are made of the outputs' tiles; of videos also a sheet
    that moves, beside it.
    """
    with replacing(path) as staged:
        _sheet(cells(*map(_tiles, outputs)), columns, title).save(staged)
    if outputs[0].ndim == 5:
        moving = [
            _sheet(cells(*([tile(p) for p in pixels(o[:, f])] for o in outputs)), columns, title)
            for f in range(outputs[0].shape[1])
        ]
        videos.write(np.stack([np.asarray(sheet) for sheet in moving]), path.with_suffix(""))


def _sheet(cells: Sequence[_Cell], columns: int, title: str) -> Image.Image:
    """Draws cells in rows, under a title."""
    columns = min(columns, len(cells))
    texts = [_wrapped(cell.text, cell.width, LINES) for cell in cells]
    width = max(cell.width for cell in cells) + GAP
    text_top = max(cell.height for cell in cells) + 2
    height = text_top + max(map(len, texts)) * LINE + GAP
    top = LINE + 2 * GAP if title else GAP
    sheet = Image.new(
        "RGB", (columns * width + GAP, math.ceil(len(cells) / columns) * height + top), "white"
    )
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((GAP, GAP), cut(title, sheet.width - 2 * GAP), fill="black", font=font())
    for i, (cell, lines) in enumerate(zip(cells, texts, strict=True)):
        x, y = GAP + i % columns * width, top + i // columns * height
        for row, line in enumerate(lines):
            draw.text((x, y + text_top + row * LINE), line, fill="black", font=font())
        for place, tile in enumerate(cell.tiles):
            sheet.paste(tile, (x, y))
            if cell.frames:
                box = (x, y, x + tile.width - 1, y + tile.height - 1)
                draw.rectangle(box, outline=cell.frames[place], width=3)
            x += tile.width + GAP // 2
    return sheet

"""What a run shows: metrics.jsonl, curves, grids of pictures."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS = "metrics.jsonl"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
"""Okabe and Ito's, told apart also by those who see fewer colours."""
GREY, GOOD, BAD = "#999999", "#009E73", "#D55E00"
SMALLEST, LARGEST = 96, 256
"""Pixels of a tile's longer side: small pictures are magnified (pixels stay pixels), large ones
reduced.
"""
FRAMES = 4
"""A video is shown as so many of its frames side by side."""
GAP, FONT, LINE, LINES = 8, 10, 13, 3
"""Pixels between cells, of the font and from line to line; a prompt gets so many lines."""


# Numbers


def append(folder: Path, metrics: Mapping[str, Any]) -> None:
    """One JSON object, one line; what is not finite becomes null."""
    with open(folder / METRICS, "a", encoding="utf-8") as file:
        file.write(json.dumps(_finite(metrics)) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line cut short by a kill is left out."""
    path = folder / METRICS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    metrics = []
    for line in lines:
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return metrics


def truncate(folder: Path, iteration: int) -> None:
    """Drop the lines after ``iteration``: the run resumes there and writes them again."""
    kept = [m for m in read(folder) if m["iteration"] <= iteration]
    _replace(folder / METRICS, "".join(json.dumps(m) + "\n" for m in kept))


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a whole file or none; what is not finite becomes null, as JSON knows no NaN."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, json.dumps(_finite(data), indent=1) + "\n")


def _replace(path: Path, text: str) -> None:
    staged = path.with_name(path.name + ".staged")
    staged.write_text(text, encoding="utf-8")
    os.replace(staged, path)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def series(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(iterations, values) of the lines that have ``key``; a list stays a row of the values."""
    points = [(m["iteration"], m[key]) for m in metrics if m.get(key) is not None]
    return np.array([x for x, _ in points], float), np.array([y for _, y in points], float)


# Pictures


def pixels(outputs: Tensor) -> np.ndarray:
    """[B,3,H,W] in [0, 1] to uint8 [B,H,W,3]."""
    return (outputs.float().clamp(0, 1) * 255).round().byte().movedim(-3, -1).cpu().numpy()


def grid(outputs: Tensor, prompts: Sequence[str], path: Path, columns: int = 8) -> None:
    """Pictures [B,3,H,W] or videos [B,F,3,H,W], each over its prompt; the prompts whole in a text
    file beside.
    """
    cells = [_Cell([tile], prompt) for tile, prompt in zip(_tiles(outputs), prompts, strict=False)]
    _save(cells, columns, path)
    path.with_suffix(".txt").write_text(
        "".join(f"{cell.text}\n" for cell in cells), encoding="utf-8"
    )


def before_after(
    before: Tensor,
    after: Tensor,
    prompts: Sequence[str],
    path: Path,
    rewards: tuple[Tensor, Tensor] | None = None,
    columns: int = 4,
) -> None:
    """Pairs from the same prompt and noise: before on the left, after on the right, the prompt
    below.

    rewards: ([B], [B]), drawn beside the prompt as "before → after" and as the frames' colour:
    green where the reward is over the middle of what occurs, orange below.
    """
    cells = []
    middle = (
        0.0 if rewards is None else float((min(map(min, rewards)) + max(map(max, rewards))) / 2)
    )
    for i, pair in enumerate(zip(_tiles(before), _tiles(after), strict=True)):
        cell = _Cell(pair, prompts[i])
        if rewards is not None:
            values = [float(reward[i]) for reward in rewards]
            frames = [GOOD if value > middle else BAD for value in values]
            cell = _Cell(pair, f"{values[0]:.2g} → {values[1]:.2g}:  {prompts[i]}", frames)
        cells.append(cell)
    _save(cells, columns, path, "each pair: before (left), after (right), same prompt and noise")


def group(outputs: Tensor, prompt: str, rewards: Tensor, advantages: Tensor, path: Path) -> None:
    """One group, best first, with every member's reward and advantage; green frames were pushed up,
    orange down.
    """
    tiles, cells = _tiles(outputs), []
    for i in rewards.argsort(descending=True, stable=True).tolist():
        reward, advantage = float(rewards[i]), float(advantages[i])
        colour = GOOD if advantage > 0 else BAD if advantage < 0 else GREY
        cells.append(_Cell([tiles[i]], f"{reward:.2f} ({advantage:+.2f})", [colour]))
    _save(cells, 8, path, f"{prompt}: reward (advantage)")


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
    """``text`` in at most so many lines of ``width`` pixels; what does not fit ends in an ellipsis."""
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


def _save(cells: Sequence[_Cell], columns: int, path: Path, title: str = "") -> None:
    """Draw cells in rows, under a title."""
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
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


# Curves

Panel = tuple[str, Callable[["Axes"], None]]
"""A title and what draws below it."""


def figures(folder: Path) -> None:
    """figures/curves.png from metrics.jsonl: what is learned, what the updates do, what it costs."""
    metrics, xlabel = by_experience(read(folder))
    save_panels(_panels(metrics), folder / "figures" / "curves.png", xlabel=xlabel)


def by_experience(metrics: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The lines, and what "iteration" is in them: where a run learns in environments, their steps
    so far.
    """
    steps = {0: 0.0, **{m["iteration"]: m["env_steps"] for m in metrics if "env_steps" in m}}
    if not any(steps.values()):
        return metrics, "iteration"
    lines = [{**m, "iteration": steps[m["iteration"]]} for m in metrics if m["iteration"] in steps]
    return lines, "environment steps"


def save_panels(panels: Sequence[Panel], path: Path, title: str = "", xlabel: str = "") -> None:
    """One figure of small panels, in as many columns as leave the fewest places empty."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = len(panels) if len(panels) <= 4 else min((4, 3), key=lambda n: -len(panels) % n)
    rows = math.ceil(len(panels) / max(columns, 1))
    figure = Figure(figsize=(4 * columns or 4, 3.1 * rows or 3), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (name, draw) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(xlabel, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        if axes.get_legend_handles_labels()[0] and axes.get_legend() is None:
            axes.legend(fontsize=7, frameon=False)
    if title:
        figure.suptitle(title, fontsize=12)
    _write_figure(figure, path)


def _write_figure(figure: "Figure", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}")
    figure.savefig(staged, format="png", dpi=110)
    os.replace(staged, path)


def smooth(values: np.ndarray) -> np.ndarray:
    """A centred running mean over a twelfth of the values: what a long, noisy curve does."""
    half = len(values) // 24
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def curve(
    axes: "Axes", metrics: Sequence[Mapping[str, Any]], key: str, label: str, colour: str
) -> None:
    """A metric of every iteration: the values faint, their running mean over them."""
    x, y = series(metrics, key)
    if len(x):
        axes.plot(x, y, color=colour, alpha=0.25, linewidth=1)
        axes.plot(x, smooth(y), color=colour, linewidth=1.6, label=label)


def evaluation(
    axes: "Axes", metrics: Sequence[Mapping[str, Any]], key: str, label: str, colour: str
) -> None:
    """An evaluation's points, the one before training included, with their 95 % intervals where
    there are some.
    """
    x, y = series(metrics, f"eval/{key}")
    band = series(metrics, f"eval/ci95/{key.removeprefix('reward/')}")[1]
    if len(x):
        axes.plot(x, y, marker="o", markersize=3.5, color=colour, linewidth=1.6, label=label)
    if len(band):
        axes.fill_between(x, band[:, 0], band[:, 1], color=colour, alpha=0.15, linewidth=0)


EPISODES = {
    "success_rate": ("success rate", "episode/success"),
    "return": ("return", "reward/return"),
    "length": ("environment steps of an episode", "episode/length"),
}
"""What an evaluation in environments measures: its title, and what the training sampler's is
called.
"""
PLAIN = {
    "policy/kl": "KL, as the method defines it",
    "grad_norm": "gradient norm before clipping",
    "bc/loss": "denoising loss on recorded actions",
    "critic/explained": "share of the returns' variance explained by the value",
}
"""What is one curve under a title."""


def _learned(metrics: list[dict[str, Any]], keys: Mapping[str, None]) -> list[Panel]:
    """A panel for everything that an evaluation measures: each reward, or success, return and
    length of episodes.
    """
    names = [key.removeprefix("eval/") for key in keys if key.startswith("eval/reward/")]
    if len(names) == 2:
        names.remove("reward/total")  # one reward: its total says the same
    episodes = [name for name in EPISODES if f"eval/{name}" in keys]
    if "success_rate" in episodes and all(
        m.get("eval/return") == m.get("eval/success_rate") for m in metrics
    ):
        episodes.remove("return")  # 1 for a success and 0 otherwise says the same
    panels: list[Panel] = []
    for name in [*names, *episodes]:
        title, training = EPISODES.get(name, (name.replace("reward/", "reward: "), name))

        def both(axes: "Axes", name: str = name, training: str = training) -> None:
            curve(axes, metrics, training, "training sampler", COLOURS[1])
            banded = f"eval/ci95/{name.removeprefix('reward/')}" in keys
            evaluation(axes, metrics, name, f"evaluation{', 95 % interval' * banded}", COLOURS[0])
            if name == "success_rate":
                axes.set_ylim(-0.02, 1.02)

        panels.append((title, both))
    return panels


def _panels(metrics: list[dict[str, Any]]) -> list[Panel]:
    keys = {key: None for m in metrics for key in m if m[key] is not None}
    panels = _learned(metrics, keys)
    if "eval/diversity" in keys:

        def diversity(axes: "Axes") -> None:
            axes.plot(
                *series(metrics, "eval/diversity"), marker="o", markersize=3.5, color=COLOURS[2]
            )
            axes.set_ylim(bottom=0)

        panels.append(("diversity within a prompt (pixel std)", diversity))
    if "policy/clip_fraction" in keys:

        def clipped(axes: "Axes") -> None:
            curve(axes, metrics, "policy/clip_fraction_positive", "advantage > 0", COLOURS[2])
            curve(axes, metrics, "policy/clip_fraction_negative", "advantage < 0", COLOURS[1])
            axes.set_ylim(bottom=0)

        panels.append(("clipped share of all rows", clipped))
    if "policy/log_ratio_square" in keys:

        def log_ratio(axes: "Axes") -> None:
            x, y = series(metrics, "policy/log_ratio_square")
            axes.plot(x, np.sqrt(y), color=COLOURS[0], linewidth=1)

        panels.append(("log-ratio (root mean square)", log_ratio))
    for key in (key for key in PLAIN if key in keys):

        def plain(axes: "Axes", key: str = key) -> None:
            curve(axes, metrics, key, "", COLOURS[0])

        panels.append((PLAIN[key], plain))
    phases = [key for key in keys if key.startswith("time/")]
    if phases:
        panels.append(("seconds an iteration", lambda axes: _stack(axes, metrics, phases)))
    return panels


def _stack(axes: "Axes", metrics: Sequence[Mapping[str, Any]], phases: Sequence[str]) -> None:
    """The phases' times, one over the other."""
    lines = [m for m in metrics if any(phase in m for phase in phases)]
    times = np.array([[m.get(phase) or 0.0 for m in lines] for phase in phases])
    names = [phase.removeprefix("time/") for phase in phases]
    axes.stackplot(
        [m["iteration"] for m in lines],
        times,
        labels=names,
        colors=COLOURS,
        linewidth=0,
        alpha=0.85,
    )
    axes.set_ylim(0, 1.5 * float(np.quantile(times.sum(0), 0.95)))  # the first iterations warm up
    axes.legend(fontsize=7, frameon=False, loc="upper right", ncols=3)

"""What a run shows: metrics.jsonl, curves, grids of pictures."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
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
"""Pixels of a tile's longer side: small pictures are magnified (pixels stay pixels), large ones reduced."""
FRAMES = 4
"""A video is shown as so many of its frames side by side."""
GAP, FONT = 6, 11


# -- numbers --------------------------------------------------------------------------------------------------


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


# -- pictures -------------------------------------------------------------------------------------------------


def pixels(outputs: Tensor) -> np.ndarray:
    """[B,3,H,W] in [0, 1] to uint8 [B,H,W,3]."""
    return (outputs.float().clamp(0, 1) * 255).round().byte().movedim(-3, -1).cpu().numpy()


def grid(outputs: Tensor, prompts: Sequence[str], path: Path, columns: int = 8) -> None:
    """Pictures [B,3,H,W] or videos [B,F,3,H,W], each over its prompt; the prompts whole in a text file beside."""
    tiles = _tiles(outputs)
    cells = [_cell([tile], prompt) for tile, prompt in zip(tiles, prompts, strict=False)]
    _save(_sheet(cells, columns), path)
    path.with_suffix(".txt").write_text("".join(f"{p}\n" for p in prompts[: len(tiles)]), encoding="utf-8")


def before_after(
    before: Tensor,
    after: Tensor,
    prompts: Sequence[str],
    path: Path,
    rewards: tuple[Tensor, Tensor] | None = None,
    columns: int = 4,
) -> None:
    """Pairs from the same prompt and noise: before on the left, after on the right, the prompt below.

    rewards: ([B], [B]), drawn beside the prompt as "before -> after" and as the frames' colour: green where the
    reward is over the middle of what occurs, orange below.
    """
    left, right = _tiles(before), _tiles(after)
    cells = []
    middle = 0.0 if rewards is None else float((min(map(min, rewards)) + max(map(max, rewards))) / 2)
    for i, prompt in enumerate(prompts[: len(left)]):
        frames, text = None, prompt
        if rewards is not None:
            values = [float(reward[i]) for reward in rewards]
            frames = [GOOD if value > middle else BAD for value in values]
            text = f"{values[0]:.2f} → {values[1]:.2f}   {prompt}"
        cells.append(_cell([left[i], right[i]], text, frames))
    _save(_sheet(cells, columns, "each pair: before (left), after (right), same prompt and noise"), path)


def group(outputs: Tensor, prompt: str, rewards: Tensor, advantages: Tensor, path: Path) -> None:
    """One group, best first, with every member's reward and advantage; green frames were pushed up, orange down."""
    tiles = _tiles(outputs)
    cells = [
        _cell(
            [tiles[i]],
            f"{float(rewards[i]):.2f} ({float(advantages[i]):+.2f})",
            [GOOD if advantages[i] > 0 else BAD if advantages[i] < 0 else GREY],
        )
        for i in rewards.argsort(descending=True, stable=True).tolist()
    ]
    _save(_sheet(cells, 8, f"{prompt}: reward (advantage)"), path)


def _tiles(outputs: Tensor) -> list[Image.Image]:
    if outputs.ndim == 5:
        shown = np.linspace(0, outputs.shape[1] - 1, min(FRAMES, outputs.shape[1])).round().astype(int)
        frames = pixels(outputs[:, shown.tolist()])
        return [_tile(np.concatenate(list(video), 1), outputs.shape[-2:]) for video in frames]
    return [_tile(picture, outputs.shape[-2:]) for picture in pixels(outputs)]


def _tile(picture: np.ndarray, size: Sequence[int]) -> Image.Image:
    """A picture (or a strip of frames of ``size`` = height, width) between `SMALLEST` and `LARGEST`."""
    image, side = Image.fromarray(picture), max(size)
    if side < SMALLEST:
        scale = -(-SMALLEST // side)
        return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    if side > LARGEST:
        image.thumbnail((image.width * LARGEST // side, LARGEST), Image.Resampling.LANCZOS)
    return image


def _font(size: int = FONT) -> Any:
    return ImageFont.load_default(size)


def _wrapped(text: str, width: int, lines: int) -> list[str]:
    """``text`` in at most so many lines of ``width`` pixels; what does not fit ends in an ellipsis."""
    font, wrapped = _font(), [""]
    for word in text.split():
        longer = f"{wrapped[-1]} {word}".strip()
        if font.getlength(longer) <= width or not wrapped[-1]:
            wrapped[-1] = longer
        else:
            wrapped.append(word)
    kept = wrapped[:lines]
    if len(wrapped) > lines:
        kept[-1] += " …"
    while kept and any(font.getlength(line) > width for line in kept):  # a word, or the ellipsis, is too long
        kept = [line if font.getlength(line) <= width else line.removesuffix(" …")[:-1] + "…" for line in kept]
    return kept


def _cell(tiles: Sequence[Image.Image], text: str, frames: Sequence[str] | None = None) -> Image.Image:
    """Tiles side by side over their text, each in a frame of its colour."""
    width = sum(tile.width for tile in tiles) + GAP // 2 * (len(tiles) - 1)
    height = max(tile.height for tile in tiles)
    lines = _wrapped(text, width, 3)
    cell = Image.new("RGB", (width, height + 4 + (FONT + 3) * 3), "white")
    draw, x = ImageDraw.Draw(cell), 0
    for i, tile in enumerate(tiles):
        cell.paste(tile, (x, 0))
        if frames is not None:
            draw.rectangle((x, 0, x + tile.width - 1, tile.height - 1), outline=frames[i], width=3)
        x += tile.width + GAP // 2
    for row, line in enumerate(lines):
        draw.text((0, height + 3 + row * (FONT + 3)), line, fill="black", font=_font())
    return cell


def _sheet(cells: Sequence[Image.Image], columns: int, title: str = "") -> Image.Image:
    """Cells of one size in rows, under a title."""
    columns = min(columns, len(cells))
    rows = math.ceil(len(cells) / columns)
    width, height = cells[0].width + GAP, cells[0].height + GAP
    top = FONT + 3 * GAP if title else GAP
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + top), "white")
    if title:
        ImageDraw.Draw(sheet).text((GAP, GAP), _wrapped(title, sheet.width - 2 * GAP, 1)[0], fill="black", font=_font(13))
    for i, cell in enumerate(cells):
        sheet.paste(cell, (GAP + i % columns * width, top + i // columns * height))
    return sheet


def _save(sheet: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


# -- curves ---------------------------------------------------------------------------------------------------

Panel = tuple[str, Callable[["Axes"], None]]
"""A title and what draws below it."""


def figures(folder: Path) -> None:
    """figures/curves.png from metrics.jsonl: what is learned, what the updates do, what it costs."""
    metrics = read(folder)
    save_panels(_panels(metrics), folder / "figures" / "curves.png", xlabel="iteration")


def save_panels(panels: Sequence[Panel], path: Path, columns: int = 4, title: str = "", xlabel: str = "") -> None:
    """One figure of small panels, ``columns`` to a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, max(len(panels), 1))
    rows = math.ceil(max(len(panels), 1) / columns)
    figure = Figure(figsize=(4 * columns, 3.1 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (name, draw) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(xlabel, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, frameon=False)
    if title:
        figure.suptitle(title, fontsize=12)
    _write_figure(figure, path)


def _write_figure(figure: "Figure", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}")
    figure.savefig(staged, format="png", dpi=110)
    os.replace(staged, path)


def smooth(values: np.ndarray, points: int = 40) -> np.ndarray:
    """A running mean over the last len/points values: what a long, noisy curve does."""
    window = max(len(values) // points, 1)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(1, len(values) + 1) - window, 0)
    high = np.arange(1, len(values) + 1)
    return (sums[high] - sums[low]) / (high - low)


def curve(axes: "Axes", metrics: Sequence[Mapping[str, Any]], key: str, label: str, colour: str) -> None:
    """A metric of every iteration: the values faint, their running mean over them."""
    x, y = series(metrics, key)
    if len(x):
        axes.plot(x, y, color=colour, alpha=0.25, linewidth=1)
        axes.plot(x, smooth(y), color=colour, linewidth=1.6, label=label)


def evaluation(axes: "Axes", metrics: Sequence[Mapping[str, Any]], name: str, label: str, colour: str) -> None:
    """An evaluation's points, the one before training included, with their 95 % intervals."""
    x, y = series(metrics, f"eval/reward/{name}")
    band = series(metrics, f"eval/ci95/{name}")[1]
    if len(x):
        axes.plot(x, y, marker="o", markersize=3.5, color=colour, linewidth=1.6, label=label)
        axes.fill_between(x, band[:, 0], band[:, 1], color=colour, alpha=0.15, linewidth=0)


def _panels(metrics: list[dict[str, Any]]) -> list[Panel]:
    keys = {key: None for m in metrics for key in m if m[key] is not None}
    panels: list[Panel] = []
    names = [key.removeprefix("eval/reward/") for key in keys if key.startswith("eval/reward/")]
    if len(names) == 2:
        names.remove("total")  # one reward: its total says the same
    for name in names:

        def reward(axes: "Axes", name: str = name) -> None:
            curve(axes, metrics, f"reward/{name}", "training sampler", COLOURS[1])
            evaluation(axes, metrics, name, "evaluation, 95 % interval", COLOURS[0])

        panels.append((f"reward: {name}", reward))
    if "eval/diversity" in keys:

        def diversity(axes: "Axes") -> None:
            axes.plot(*series(metrics, "eval/diversity"), marker="o", markersize=3.5, color=COLOURS[2])
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
    titles = {"policy/kl": "KL to the policy at step 0", "grad_norm": "gradient norm before clipping"}
    for key in (key for key in titles if key in keys):

        def plain(axes: "Axes", key: str = key) -> None:
            curve(axes, metrics, key, "", COLOURS[0])

        panels.append((titles[key], plain))
    phases = [key for key in keys if key.startswith("time/")]
    if phases:
        panels.append(("seconds an iteration", lambda axes: _stack(axes, metrics, phases)))
    return panels


def _stack(axes: "Axes", metrics: Sequence[Mapping[str, Any]], phases: Sequence[str]) -> None:
    """The phases' times, one over the other."""
    lines = [m for m in metrics if any(phase in m for phase in phases)]
    times = np.array([[m.get(phase) or 0.0 for m in lines] for phase in phases])
    names = [phase.removeprefix("time/") for phase in phases]
    axes.stackplot([m["iteration"] for m in lines], times, labels=names, colors=COLOURS, linewidth=0, alpha=0.85)

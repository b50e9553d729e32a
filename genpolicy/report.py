"""What a run shows: metrics.jsonl, curves, image grids."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

METRICS = "metrics.jsonl"


def append(folder: Path, metrics: dict[str, Any]) -> None:
    """One JSON object, one line."""
    with open(folder / METRICS, "a") as file:
        file.write(json.dumps(metrics) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line cut short by a kill is left out."""
    path = folder / METRICS
    lines = path.read_text().splitlines() if path.is_file() else []
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
    staged = folder / (METRICS + ".staged")
    staged.write_text("".join(json.dumps(m) + "\n" for m in kept))
    os.replace(staged, folder / METRICS)


def _tile(outputs: Tensor, scale: int) -> list[np.ndarray]:
    frames = outputs[:, 0] if outputs.ndim == 5 else outputs
    pixels = (frames.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [p.repeat(scale, 0).repeat(scale, 1) for p in pixels]


def grid(outputs: Tensor, prompts: Sequence[str], path: Path, columns: int = 8) -> None:
    """Images [B,3,H,W] in [0,1] side by side, with their prompts in a text file beside."""
    tiles = _tile(outputs, max(1, 96 // outputs.shape[-1]))
    rows = math.ceil(len(tiles) / columns)
    blank = np.full_like(tiles[0], 255)
    tiles += [blank] * (rows * columns - len(tiles))
    sheet = np.concatenate([np.concatenate(tiles[r * columns : (r + 1) * columns], 1) for r in range(rows)], 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)
    path.with_suffix(".txt").write_text("".join(f"{p}\n" for p in prompts[: len(outputs)]))


def group(outputs: Tensor, prompt: str, rewards: Tensor, advantages: Tensor, path: Path) -> None:
    """One group with the reward and the advantage of every member."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    n = len(outputs)
    columns = min(8, n)
    rows = math.ceil(n / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.3 * columns, 1.7 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, reward, advantage in zip(axes.flat, _tile(outputs, 1), rewards, advantages, strict=False):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(f"{float(reward):.2f} ({float(advantage):+.2f})", fontsize=8)
    figure.suptitle(f"{prompt}: reward (advantage)", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def figures(folder: Path) -> None:
    """figures/curves.png from metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    metrics = read(folder)
    names = ["reward/total", "policy/clip_fraction", "policy/kl", "grad_norm"]
    figure, axes = plt.subplots(1, len(names) + 1, figsize=(4 * (len(names) + 1), 3))
    evaluated = [m for m in metrics if any(k.startswith("eval/reward/") for k in m)]
    for key in sorted({k for m in evaluated for k in m if k.startswith("eval/reward/")}):
        points = [(m["iteration"], m[key], m[key.replace("reward", "ci95")]) for m in evaluated if key in m]
        x, y, ci = zip(*points, strict=True)
        line = axes[0].plot(x, y, marker="o", label=key.removeprefix("eval/reward/"))[0]
        axes[0].fill_between(x, [c[0] for c in ci], [c[1] for c in ci], alpha=0.2, color=line.get_color())
    axes[0].set_title("evaluation (95 % interval)")
    axes[0].legend(fontsize=7)
    for axis, name in zip(axes[1:], names, strict=True):
        points = [(m["iteration"], m[name]) for m in metrics if name in m]
        if points:
            axis.plot(*zip(*points, strict=True))
        axis.set_title(name)
        axis.set_xlabel("iteration")
    (folder / "figures").mkdir(exist_ok=True)
    figure.savefig(folder / "figures" / "curves.png", dpi=110, bbox_inches="tight")
    plt.close(figure)

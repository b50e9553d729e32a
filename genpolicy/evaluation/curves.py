"""Draws what a run measured, over its budget."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genpolicy.config.whole_file import replacing
from genpolicy.evaluation.metrics_file import read, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
"""Okabe and Ito's palette, which people who see fewer colours can tell apart too."""


# Curves

Panel = tuple[str, Callable[["Axes"], None]]
"""A title and what draws below it."""


def figures(folder: Path) -> None:
    """Draws figures/curves.png from metrics.jsonl: learning, updates and costs."""
    metrics, xlabel = by_experience(read(folder))
    save_panels(_panels(metrics), folder / "figures" / "curves.png", xlabel=xlabel)


def by_experience(metrics: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The lines of metrics, and the meaning of "iteration" in them: where a run learns in
    environments, their steps so far.
    """
    steps = {0: 0.0, **{m["iteration"]: m["env_steps"] for m in metrics if "env_steps" in m}}
    if not any(steps.values()):
        return metrics, "iteration"
    lines = [{**m, "iteration": steps[m["iteration"]]} for m in metrics if m["iteration"] in steps]
    return lines, "environment steps"


def save_panels(panels: Sequence[Panel], path: Path, title: str = "", xlabel: str = "") -> None:
    """Writes a figure of small panels, in as many columns as leave the fewest places empty."""
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
    with replacing(path) as staged:
        figure.savefig(staged, format="png", dpi=110)


def smooth(values: np.ndarray) -> np.ndarray:
    """The centred running mean over a twelfth of the values: the course of a long, noisy curve."""
    half = len(values) // 24
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def curve(
    axes: "Axes", metrics: Sequence[Mapping[str, Any]], key: str, label: str, colour: str
) -> None:
    """Draws a metric of every iteration: the values faint, their running mean over them."""
    x, y = series(metrics, key)
    if len(x):
        axes.plot(x, y, color=colour, alpha=0.25, linewidth=1)
        axes.plot(x, smooth(y), color=colour, linewidth=1.6, label=label)


def evaluation(
    axes: "Axes", metrics: Sequence[Mapping[str, Any]], key: str, label: str, colour: str
) -> None:
    """Draws an evaluation's points, the one before training included, with their 95 % intervals
    where there are some.
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
"""Metrics of an evaluation in environments: their titles, and the training sampler's metrics of the
same thing.
"""


PLAIN = {
    "policy/kl": "KL, as the method defines it",
    "grad_norm": "gradient norm before clipping",
    "bc/loss": "denoising loss on recorded actions",
    "critic/explained": "share of the returns' variance explained by the value",
}
"""Metrics that are drawn as one curve, and their titles."""


def _learned(metrics: list[dict[str, Any]], keys: Mapping[str, None]) -> list[Panel]:
    """The panels of everything that an evaluation measures: each reward, or success, return and
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
    """Draws the phases' times, one over the other."""
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

"""The comparison of finished runs: a table and one figure."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from genpolicy.config.origin import PERSON, Origin
from genpolicy.config.schema import Experiment
from genpolicy.evaluation.curves import COLOURS, EPISODES, Panel, by_experience, save_panels, smooth
from genpolicy.evaluation.metrics_file import series
from genpolicy.evaluation.statistics import paired

if TYPE_CHECKING:
    from matplotlib.axes import Axes


CLIPPED = ("policy/clip_fraction_positive", "policy/clip_fraction_negative")
"""Metrics of the rows that a ratio's clip leaves without gradient, by the advantage's sign."""
COSTS = (
    "nfe_per_sample",
    "evaluations",
    "env_decisions",
    "env_steps",
    "iterations",
    "training_s",
    "wall_time_s",
)
"""The costs of a run, by its summary's or its metrics' names."""


@dataclass(frozen=True)
class Arm:
    """A named experiment; its seed and output are set for each run."""

    name: str
    experiment: Experiment
    origin: Origin = PERSON


@dataclass(frozen=True)
class Finished:
    """One run and what it left in its folder."""

    arm: str
    seed: int
    folder: Path
    experiment: Mapping[str, Any]  # config.yaml
    summary: Mapping[str, Any]  # summary.json
    metrics: list[dict[str, Any]]  # the lines of metrics.jsonl

    def cost(self, name: str) -> float:
        """A number of the summary, or the mean over iterations of a metric; NaN where the method
        has none.
        """
        if name in self.summary:
            return float(self.summary[name])
        values = series(self.metrics, name)[1]
        return float(values.mean()) if len(values) else math.nan


# The table


def summarise(runs: Sequence[Finished]) -> dict[str, Any]:
    """The contents of compare.json: per arm the mean and standard deviation over seeds, the paired
    difference to the first arm, and every run.

    A reward's total is left out where the arms weigh rewards differently: it would not mean the
    same.
    """
    arms = list(dict.fromkeys(run.arm for run in runs))
    shared = [n for n in runs[0].summary["after"] if all(n in run.summary["after"] for run in runs)]
    of_episodes = [name for name in EPISODES if name in shared]
    after = [run.summary["after"] for run in runs]
    if all(found.get("return") == found.get("success_rate") for found in after):
        # 1 for a success and 0 otherwise says the same
        of_episodes = [name for name in of_episodes if name != "return"]
    names = of_episodes + [
        name for name in shared if name.startswith("reward/") or name == "diversity"
    ]
    weights = [run.experiment["reward"] for run in runs]
    if "reward/total" in names and (
        any(weight != weights[0] for weight in weights) or len(weights[0]) == 1
    ):
        names.remove("reward/total")
    table: dict[str, Any] = {
        "seeds": sorted({run.seed for run in runs}),
        "metrics": names,
        "arms": {},
        "runs": [],
    }
    for arm in arms:
        mine = [run for run in runs if run.arm == arm]
        entry: dict[str, Any] = {"metrics": {}, "difference": {}}
        for name in names:
            values = _after(mine, name)
            entry["metrics"][name] = {"before": _after(mine, name, "before"), **_spread(values)}
            if arm != arms[0]:
                other = _after([run for run in runs if run.arm == arms[0]], name)
                entry["difference"][name] = _seed_difference(values, other)
        for name in (*CLIPPED, *COSTS):
            entry[name] = _spread([run.cost(name) for run in mine])
        table["arms"][arm] = entry
    for run in runs:
        after = run.summary["after"]
        intervals = {name: after.get(f"ci95/{name.removeprefix('reward/')}") for name in names}
        measured = {name: {"value": after[name], "ci95": intervals[name]} for name in names}
        table["runs"].append(
            {"arm": run.arm, "seed": run.seed, "folder": str(run.folder), "metrics": measured}
        )
    return table


def _after(runs: Iterable[Finished], name: str, when: str = "after") -> list[float]:
    values = (run.summary[when].get(name) for run in runs)
    return [math.nan if value is None else float(value) for value in values]


def _spread(values: Sequence[float]) -> dict[str, Any]:
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return {"mean": float(np.mean(values)), "sd": sd, "values": list(values)}


def _seed_difference(values: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """The mean of value - other over seeds and its 95 % interval; no interval for a single seed."""
    first, second = (torch.tensor(each, dtype=torch.float64) for each in (others, values))
    mean, low, high = paired(first, second, len(values))
    return {"mean": mean, "ci95": None if len(values) < 2 else [low, high]}


def markdown(table: Mapping[str, Any]) -> str:
    """The table for people: arms are columns, so that long rows do not wrap."""
    arms, count = list(table["arms"]), len(table["seeds"])
    lines = [
        f"Mean ± sd over {count} seed{'s' * (count > 1)}; differences to {arms[0]} are paired by "
        "seed, with 95 % intervals (Student's t).",
        "",
        "|  | " + " | ".join(arms) + " |",
        "|---|" + "---|" * len(arms),
    ]

    def row(label: str, cells: Iterable[str]) -> None:
        lines.append(f"| {label} | " + " | ".join(cells) + " |")

    for name in table["metrics"]:
        label = f"eval/{name}"
        entries = [table["arms"][arm]["metrics"][name] for arm in arms]
        row(f"{label} before", (_plain(float(np.mean(e["before"]))) for e in entries))
        row(f"{label} after", (_plus_minus(e) for e in entries))
        if len(arms) > 1:
            row(
                f"{label} difference",
                ["", *(_interval(table["arms"][a]["difference"][name]) for a in arms[1:])],
            )
    labels = {
        CLIPPED[0]: "clipped, advantage > 0 (share of all rows)",
        CLIPPED[1]: "clipped, advantage < 0 (share of all rows)",
        "nfe_per_sample": "network evaluations per sample",
        "evaluations": "network evaluations in all",
        "env_decisions": "decisions in environments",
        "env_steps": "environment steps",
        "iterations": "iterations",
        "training_s": "training, s",
        "wall_time_s": "wall time, s",
    }
    for name, label in labels.items():
        entries = [table["arms"][arm][name] for arm in arms]
        if not name.startswith("env_") or any(entry["mean"] > 0 for entry in entries):
            row(label, map(_plus_minus, entries))
    lines += ["", "Each run's own result [95 % interval over its samples]:", ""]
    for run in table["runs"]:
        shown = [
            f"{name.removeprefix('reward/')} {_plain(m['value'])}"
            + (f" [{_plain(m['ci95'][0])}, {_plain(m['ci95'][1])}]" if m["ci95"] else "")
            for name, m in run["metrics"].items()
        ]
        lines.append(f"- {run['arm']}, seed {run['seed']}: {'; '.join(shown)}")
    return "\n".join(lines) + "\n"


def _plain(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.3f}"


def _plus_minus(entry: Mapping[str, Any]) -> str:
    return _plain(entry["mean"]) + (f" ± {_plain(entry['sd'])}" if entry["sd"] > 0 else "")


def _interval(entry: Mapping[str, Any]) -> str:
    if entry["ci95"] is None:
        return f"{entry['mean']:+.3f}"
    return f"{entry['mean']:+.3f} [{entry['ci95'][0]:+.3f}, {entry['ci95'][1]:+.3f}]"


# The figure


def figure(runs: Sequence[Finished], table: Mapping[str, Any], path: Path) -> None:
    """Draws evaluations, training, clipped shares, and the diversity that the reward cost; one
    colour per arm.
    """
    arms = list(table["arms"])
    colours = {arm: COLOURS[i % len(COLOURS)] for i, arm in enumerate(arms)}
    xlabel = by_experience(runs[0].metrics)[1]
    by_time = xlabel == "iteration" and not runs[0].summary["asked"]["iterations"]
    select = runs[0].experiment["eval"]["select"]
    names = [name for name in table["metrics"] if name != "diversity"]
    names.sort(key=lambda name: name != select)
    panels: list[Panel] = []

    def curves(key: str, thin: float, smoothed: bool) -> Any:
        def draw(axes: "Axes") -> None:
            for arm in arms:
                lines = [_line(run, key, by_time, smoothed) for run in runs if run.arm == arm]
                length = min(len(x) for x, _ in lines)
                for x, y in lines:
                    axes.plot(x, y, color=colours[arm], alpha=0.3, linewidth=thin)
                x, y = (np.mean([line[i][:length] for line in lines], 0) for i in (0, 1))
                marker = None if smoothed else "o"
                axes.plot(
                    x, y, color=colours[arm], linewidth=2, marker=marker, markersize=3.5, label=arm
                )
            axes.set_xlabel("seconds of training" if by_time else xlabel, fontsize=8)

        return draw

    for name in names:
        panels.append((f"evaluation: {_title(name)}", curves(f"eval/{name}", 0.8, smoothed=False)))
    shown = "reward/total" if "reward/total" in names else names[0]
    key = EPISODES[shown][1] if shown in EPISODES else shown
    if all(len(series(run.metrics, key)[0]) for run in runs):
        panels.append(
            (f"training: {_title(shown)} (running mean)", curves(key, 0.8, smoothed=True))
        )
    if any(not math.isnan(table["arms"][arm][CLIPPED[0]]["mean"]) for arm in arms):
        panels.append(("clipped share of all rows", lambda axes: _bars(axes, table, colours)))
    if any(run.summary["after"].get("diversity") is not None for run in runs):
        panels.append(
            (
                "diversity and reward of each run",
                lambda axes: _scatter(axes, runs, names[0], colours),
            )
        )
    count = len(table["seeds"])
    save_panels(
        panels, path, title=f"{' · '.join(arms)}: mean of {count} seeds thick, each seed thin"
    )


def _title(name: str) -> str:
    return EPISODES[name][0] if name in EPISODES else name.removeprefix("reward/")


def _line(run: Finished, key: str, by_time: bool, smoothed: bool) -> tuple[np.ndarray, np.ndarray]:
    x, y = series(run.metrics if by_time else by_experience(run.metrics)[0], key)
    if by_time:
        at = dict(zip(*series(run.metrics, "time_s"), strict=True))
        x = np.array([at.get(iteration, 0.0) for iteration in x])
    return x, smooth(y) if smoothed else y


def _bars(axes: "Axes", table: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    width = 0.8 / len(colours)
    for i, (arm, colour) in enumerate(colours.items()):
        for place, name in enumerate(CLIPPED):
            entry, x = table["arms"][arm][name], place + (i - (len(colours) - 1) / 2) * width
            axes.bar(
                x,
                entry["mean"],
                0.9 * width,
                color=colour,
                alpha=0.75,
                label=None if place else arm,
            )
            axes.plot([x] * len(entry["values"]), entry["values"], "k.", markersize=4)
    axes.set_xticks([0, 1], ["advantage > 0", "advantage < 0"])


def _scatter(axes: "Axes", runs: Sequence[Finished], name: str, colours: Mapping[str, str]) -> None:
    for arm, colour in colours.items():
        mine = [run for run in runs if run.arm == arm]
        axes.plot(_after(mine, name), _after(mine, "diversity"), "o", color=colour, label=arm)
    before = [_after(runs, key, "before") for key in (name, "diversity")]
    axes.plot(np.mean(before[0]), np.mean(before[1]), "k*", markersize=11, label="before")
    axes.set_xlabel(f"evaluation: {name.removeprefix('reward/')}", fontsize=8)
    axes.set_ylabel("diversity within a prompt", fontsize=8)

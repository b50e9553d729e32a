"""The file metrics.jsonl: one JSON object per line, appended, read and cut."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from genpolicy.config import whole_file

METRICS = "metrics.jsonl"


def append(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Appends one line, a JSON object; numbers that are not finite become null."""
    with open(folder / METRICS, "a", encoding="utf-8") as file:
        file.write(json.dumps(_finite(metrics)) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """Reads the lines of metrics.jsonl; a last line cut short by a kill is left out."""
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
    """Drops the lines after ``iteration``: the run resumes there and writes them again."""
    kept = [m for m in read(folder) if m["iteration"] <= iteration]
    whole_file.write_text(folder / METRICS, "".join(json.dumps(m) + "\n" for m in kept))


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes a whole file or none; numbers that are not finite become null, as JSON has no NaN."""
    whole_file.write_text(path, json.dumps(_finite(data), indent=1) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def series(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """The (iterations, values) of the lines that have ``key``; a list stays a row of the values."""
    points = [(m["iteration"], m[key]) for m in metrics if m.get(key) is not None]
    return np.array([x for x, _ in points], float), np.array([y for _, y in points], float)

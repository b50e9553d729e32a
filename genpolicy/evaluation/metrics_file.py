"""The file metrics.jsonl: one JSON object per line, with its checksum, appended, read and cut."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from genpolicy.config import whole_file
from genpolicy.config.errors import ConfigError
from genpolicy.config.seal import sealed, unsealed

METRICS = "metrics.jsonl"


def append(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Appends a line, a JSON object with its checksum; numbers that are not finite become null."""
    with open(folder / METRICS, "a", encoding="utf-8") as file:
        file.write(sealed(_finite(metrics)) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """Reads the lines of metrics.jsonl; one that is damaged, or cut by a kill, is left out."""
    return [metrics for _, metrics in _lines(folder) if metrics is not None]


def damaged(folder: Path) -> list[int]:
    """Returns the numbers, from 1, of the lines that `read` leaves out."""
    return [number for number, (_, found) in enumerate(_lines(folder), 1) if found is None]


def truncate(folder: Path, iteration: int) -> None:
    """Drops the lines after ``iteration``: the run resumes there and writes them again. A damaged
    line before them stays as it is, but for the last one, where a kill has cut it short.
    """
    kept: list[bytes] = []
    lines = _lines(folder)
    for line, metrics in lines:
        if metrics is not None and metrics["iteration"] > iteration:
            break
        if metrics is not None or line.endswith(b"\n"):
            kept.append(line)
    if len(kept) < len(lines):
        with whole_file.replacing(folder / METRICS) as staged:
            staged.write_bytes(b"".join(kept))


def _lines(folder: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """Every line as it stands, with its end, and what it says: None for a damaged one."""
    path = folder / METRICS
    # JSON's own line ends only
    whole = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    lines = [line + b"\n" for line in whole[:-1]] + [line for line in whole[-1:] if line]
    return [(line, _said(line)) for line in lines]


def _said(line: bytes) -> dict[str, Any] | None:
    try:
        metrics = unsealed(line.decode("utf-8"))
    except ValueError:
        return None
    return metrics if isinstance(metrics.get("iteration"), int) else None


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes a whole file or none; numbers that are not finite become null, as JSON has no NaN."""
    whole_file.write_text(path, json.dumps(_finite(data), indent=1) + "\n")


def write_sealed(path: Path, data: Mapping[str, Any]) -> None:
    """Does the same as `write_json`, with a checksum for `read_sealed`."""
    whole_file.write_text(path, sealed(_finite(data), indent=1) + "\n")


def read_sealed(path: Path) -> dict[str, Any]:
    """Reads what `write_sealed` wrote. Raises `ConfigError` where it is damaged."""
    try:
        return unsealed(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {' '.join(str(error).split())}") from None


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

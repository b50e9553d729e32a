"""Reads a JSON object key by key: every missing key and every wrong type is one sentence."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genpolicy_runtime.errors import ExportError, shown

FLOAT32 = (2 - 2**-23) * 2.0**127
"""The largest number that float32 holds."""
LARGEST = 2**28
"""Numbers that one array may hold, at most."""


class Fields:
    """An object of a JSON file, of which every value is asked for with its type.

    values: the object. file, way: where it stands, for the sentences.
    """

    def __init__(self, values: Mapping[str, Any], file: Path, way: str = "") -> None:
        self.values = values
        self.file = file
        self._way = way

    @classmethod
    def read(cls, file: Path) -> "Fields":
        """The object that a JSON file holds."""
        try:
            values = json.loads(
                file.read_text(encoding="utf-8"), parse_constant=_refuse, object_pairs_hook=_object
            )
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise ExportError(f"{file} is no JSON: {reason}") from None
        if not isinstance(values, dict):
            raise ExportError(f"{file} holds {shown(values)}; it must hold an object")
        return cls(values, file)

    def wrong(self, key: str, valid: str) -> ExportError:
        """The sentence for a value that can't be used."""
        return ExportError(
            f"{self.file}: {self._way}{key} is {shown(self.values.get(key))}; it must be {valid}"
        )

    def value(self, key: str) -> Any:
        """The value of a key, of any type."""
        if key not in self.values:
            raise ExportError(f"{self.file} has no {self._way}{key}: it is no whole manifest")
        return self.values[key]

    def none(self, key: str) -> bool:
        """True where the key says null."""
        return self.value(key) is None

    def fields(self, key: str) -> "Fields":
        """The object under a key."""
        value = self.value(key)
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Fields(value, self.file, f"{self._way}{key}.")

    def text(self, key: str) -> str:
        """A text."""
        value = self.value(key)
        if not isinstance(value, str):
            raise self.wrong(key, "a text")
        return value

    def one_of(self, key: str, valid: tuple[str, ...]) -> str:
        """A text out of a few."""
        value = self.value(key)
        if value not in valid:
            raise self.wrong(key, f"one of {', '.join(valid)}")
        return value

    def integer(self, key: str, least: int = 1) -> int:
        """A whole number."""
        value = self.value(key)
        if not _whole(value) or value < least:
            raise self.wrong(key, f"a whole number of at least {least}")
        return value

    def between(self, key: str, least: float, most: float) -> float:
        """A number from ``least`` to ``most``."""
        value = self.value(key)
        if not _number(value) or not least <= value <= most:
            raise self.wrong(key, f"a number from {least:g} to {most:g}")
        return float(value)

    def positive(self, key: str) -> float:
        """A finite number above 0."""
        value = self.value(key)
        if not _number(value) or value <= 0:
            raise self.wrong(key, "a number above 0")
        return float(value)

    def shape(self, key: str, least: int = 1) -> tuple[int, ...]:
        """The sizes of an array, each at least ``least``."""
        value = self.value(key)
        valid = isinstance(value, list) and all(_whole(size) and size >= least for size in value)
        if not valid or math.prod(value) > LARGEST:
            raise self.wrong(
                key, f"a list of whole numbers of at least {least}, whose product is in {LARGEST}"
            )
        return tuple(value)

    def limits(self, key: str, count: int, none: float) -> tuple[float, ...]:
        """A list of ``count`` numbers that float32 holds; ``none`` stands in the place of each
        null.
        """
        value = self.value(key)
        if (
            not isinstance(value, list)
            or len(value) != count
            or not all(one is None or (_number(one) and abs(one) <= FLOAT32) for one in value)
        ):
            raise self.wrong(
                key, f"a list of {count} numbers that float32 holds, null where there is no limit"
            )
        return tuple(none if one is None else float(one) for one in value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _number(value: Any) -> bool:
    return _whole(value) or (isinstance(value, float) and math.isfinite(value))


def _object(pairs: "list[tuple[str, Any]]") -> dict[str, Any]:
    """The object of these pairs, of which no two have one key."""
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"an object has the key {shown(twice)} twice")
    return values


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")

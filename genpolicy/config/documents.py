"""Reads YAML and JSON that anybody may have written: quickly, or refused in one sentence."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from genpolicy.config.errors import ConfigError

NODES = 100_000
"""Values that a YAML may have, with every alias written out."""
DEPTH = 100
"""Lists and mappings that may lie in one another."""
DIGITS = 40
"""Characters that a whole number may be written in."""
LOW, HIGH = -(2**63), 2**64 - 1
"""The range of whole numbers: those of 64 bits, with a sign or without."""
SENTENCE = 300
"""Characters that are kept of what a reader of a format complains about."""


class _Loader(yaml.SafeLoader):
    """A reader for which 1e-4 is a number, as in YAML 1.2; in PyYAML's YAML 1.1 it is a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    _require_short(str(node.value))
    return loader.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def yaml_value(text: str, what: str) -> Any:
    """The value of a YAML text, of ``what`` an error speaks; `ConfigError` for anything else."""
    try:
        _require_small(text)
        return _bounded(yaml.load(text, _Loader))
    except Exception as error:  # beside its own errors PyYAML lets those of Python's types through
        raise ConfigError(f"{what} is not readable YAML: {_brief(error)}") from None


def json_value(text: str, what: str) -> Any:
    """The value of a JSON text, of ``what`` an error speaks; `ConfigError` for anything else."""
    try:
        return _bounded(json.loads(text, parse_int=_json_number))
    except RecursionError:
        raise ConfigError(f"{what} is not readable JSON: {_too_deep()}") from None
    except ValueError as error:
        raise ConfigError(f"{what} is not readable JSON: {_brief(error)}") from None


def json_file(file: Path) -> Any:
    """The value of a JSON file. Raises `ConfigError` where it is none, `OSError` where there is no
    file.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not readable JSON: {_brief(error)}") from None
    return json_value(text, str(file))


def _json_number(text: str) -> int:
    _require_short(text)
    return int(text)


def _require_short(number: str) -> None:
    if len(number) > DIGITS:
        raise ValueError(f"it has a number of {len(number)} digits; {DIGITS} are the most")


def _require_small(text: str) -> None:
    """Raises where a YAML is too large with its aliases written out, too deep, or refers to itself.

    It reads events, which are as many as the text is long: nothing is written out.
    """
    sizes: dict[str, int] = {}  # values below an anchor, itself among them
    begun: list[tuple[str | None, int]] = []  # anchors of open collections, and the values before
    values = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in begun):
                raise ValueError(f"its anchor {event.anchor} refers to itself")
            values += sizes.get(event.anchor, 0)  # an unknown one is the reader's to refuse
        elif isinstance(event, yaml.ScalarEvent):
            values += 1
            sizes |= {event.anchor: 1} if event.anchor is not None else {}
        elif isinstance(event, yaml.CollectionStartEvent):
            begun.append((event.anchor, values))
            values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = begun.pop()
            sizes |= {anchor: values - before} if anchor is not None else {}
        if values > NODES:
            raise ValueError(
                f"with its aliases written out it has more than {NODES} values, which are the most"
            )
        if len(begun) > DEPTH:
            raise ValueError(_too_deep())


def _bounded(value: Any) -> Any:
    """The same value; raises where it is too deep, or has a number of more than 64 bits."""
    rest = [(value, 0)]
    while rest:
        at, depth = rest.pop()
        if depth > DEPTH:
            raise ValueError(_too_deep())
        if isinstance(at, int) and not LOW <= at <= HIGH:
            raise ValueError(f"its number {at} does not fit into 64 bits")
        if isinstance(at, Mapping):
            rest += [(item, depth + 1) for pair in at.items() for item in pair]
        elif isinstance(at, list | tuple | set):
            rest += [(item, depth + 1) for item in at]
    return value


def _too_deep() -> str:
    return f"its lists and mappings lie more than {DEPTH} deep in one another, which is the most"


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:SENTENCE]

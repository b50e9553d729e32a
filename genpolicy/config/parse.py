"""Reads experiments: YAML and command-line overrides to dataclasses, strictly, and back."""

import dataclasses
import logging
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import draccus
import yaml

from genpolicy.config import shipped
from genpolicy.config.documents import HIGH, LOW, yaml_value
from genpolicy.config.errors import ConfigError, choice, nearest, place, shown
from genpolicy.config.schema import Experiment

log = logging.getLogger(__name__)

NAMED = ("policy", "task", "method", "kernel", "data")
"""Sections that name a leaf: a bare name means its defaults."""
LONGEST = 1000
"""Characters of somebody else's complaint that an error repeats."""
MISUSE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
)
"""Errors, beside `ValueError` and `OSError`, of a class whose fields have the right types and
values that it can't work with: torch, for example, has a `RuntimeError` for a size below 0.
"""


LARGEST = 1e19
"""Numbers from here on have squares beyond 3.4e38, where the single precision ends in which
networks, losses and optimisers compute: they would be infinite at the first update.
"""
COUNT = 2**31
"""Whole numbers from here on count nothing that a run could hold or reach; seeds may be larger."""
PLAIN = {str, int, float, bool, type(None)}
"""Types of fields that hold no list and no mapping."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML mapping from a path or a shipped config's bare name."""
    try:
        found = shipped.find_config(str(path))
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from None
    try:
        text = found.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not readable YAML: {error}") from None
    raw = yaml_value(text, str(path))
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path} is not an experiment: it must be a YAML mapping with keys policy, task, method"
        )
    return raw


def override(raw: dict[str, Any], dotted: str) -> None:
    """Applies one ``--a.b=c`` to a raw config in place; the value is read as YAML."""
    key, equals, text = dotted.removeprefix("--").partition("=")
    if not dotted.startswith("--") or not equals or not all(key.split(".")):
        raise ConfigError(f"override {shown(dotted)} is not of the form --section.key=value")
    *sections, last = key.split(".")
    at: Any = raw
    for section in sections:
        if isinstance(at.get(section), str):
            at[section] = {"name": at[section]}
        at = at.setdefault(section, {})
        if not isinstance(at, dict):
            raise ConfigError(
                f"override {shown(dotted)}: {section} is a plain value and has no key {last!r}"
            )
    at[last] = yaml_value(text, f"override --{key}: its value")


def parse(raw: Mapping[str, Any]) -> Experiment:
    """Decodes a raw mapping as an `Experiment`; unknown keys, wrong types and missing sections
    raise `ConfigError`.
    """
    raw = dict(raw)
    if isinstance(raw.get("reward"), str):
        raw["reward"] = {raw["reward"]: 1.0}
    return decode(Experiment, raw, "the experiment")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads a YAML, applies the command line's overrides, and parses.

    An ``eval.select`` of the YAML that names a reward which the overrides have replaced is left
    out, with a warning.
    """
    raw = read_yaml(path)
    named = _rewards(raw)
    for dotted in overrides:
        override(raw, dotted)
    settings = raw.get("eval")
    select = str(settings.get("select")) if isinstance(settings, dict) else ""
    if isinstance(settings, dict) and select.removeprefix("reward/") in named - _rewards(raw):
        del settings["select"]
        log.warning(
            "eval.select is %s in %s, a reward that was replaced: the best policy is chosen by the"
            " sum of the rewards that there are",
            select,
            path,
        )
    return parse(raw)


def _rewards(raw: Mapping[str, Any]) -> set[str]:
    """The names of the rewards of a raw config."""
    section = raw.get("reward")
    if isinstance(section, str):
        return {section}
    return set(map(str, section)) if isinstance(section, Mapping) else set()


def decode[T](
    kind: type[T], raw: Mapping[str, Any], where: str, given: Mapping[str, Any] | None = None
) -> T:
    """Decodes a mapping as the dataclass ``kind``, strictly; every error is one sentence that names
    the key.

    given: values of fields that no file can set.
    """
    given = given or {}
    every = [f for f in dataclasses.fields(kind) if f.init]  # type: ignore[arg-type]
    fields = {f.name: f for f in every if f.name not in given}
    for key in raw:
        if key not in fields:
            raise ConfigError(f"{where} has no key {shown(key)}{nearest(str(key), list(fields))}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in raw:
            raise ConfigError(f"{where} needs the key {name!r}")
    hints = typing.get_type_hints(kind)
    values = {key: _value(hints[key], value, where, key) for key, value in raw.items()}
    try:
        return kind(**values, **given)
    except ConfigError:
        raise
    except OSError as error:
        cause = str(error) if error.filename is None else f"{error.strerror}: {error.filename}"
        raise ConfigError(f"{where}: {_brief(cause)}") from None
    except ValueError as error:
        # a field's own complaint
        raise ConfigError(f"{where}: {_brief(error)}") from None
    except MISUSE as error:
        # with its defaults alone the class is wrong, and not what was asked of it
        own = {name: v for name, v in values.items() if v != fields[name].default}
        if not own:
            raise
        made = ", ".join(f"{name} {shown(value)}" for name, value in own.items())
        raise ConfigError(
            f"{where} can't be made with {_brief(made)}: {type(error).__name__},"
            f" {_brief(error)} ({place(error)})"
        ) from None


def _brief(text: Any) -> str:
    """One line of a text, cut where it is long."""
    line = " ".join(str(text).split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."


def _value(hint: Any, value: Any, where: str, key: str) -> Any:
    """Decodes one field's value as its declared type."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return decode(hint, value, key if where == "the experiment" else f"{where}: {key}")
    kinds = typing.get_args(hint) or (hint,)
    if typing.get_origin(hint) is dict and key in NAMED and isinstance(value, str):
        return {"name": value}
    if typing.get_origin(hint) is typing.Literal:
        choice(f"{where}: {key}", value, [str(kind) for kind in kinds])
    if isinstance(value, float) and value.is_integer() and int in kinds and float not in kinds:
        value = int(value)  # 1e3
    _require_plain(value, hint, where, key)
    counts = int in kinds and isinstance(value, int) and key != "seed"
    if counts and not -COUNT < value < COUNT:
        raise ConfigError(f"{where}: {key} is {shown(value)}; it must be below {COUNT} (2^31)")
    if isinstance(value, list) and list[Any] in kinds:
        return value  # draccus would make a mapping of it, where that is allowed too
    try:
        if _misread(hint, value):
            raise ValueError
        plain = typing.get_origin(hint) not in (tuple, list) and set(kinds) <= PLAIN
        if isinstance(value, list | dict) and plain:
            raise ValueError  # draccus would make a text of it
        return draccus.decode(hint, value)
    except Exception:  # draccus raises whatever its decoders do, and says it in several lines
        raise ConfigError(f"{where}: {key} is {shown(value)}; it must be {_called(hint)}") from None


def _require_plain(value: Any, hint: Any, where: str, key: str) -> None:
    """Raises for what is wrong as a value of any type: NaN, a number of `LARGEST` or more, a whole
    number of more than 64 bits, a text with a null character, a key that is no text; in a list or a
    mapping too.
    """
    rest = [(key, value)]
    while rest:
        key, at = rest.pop()
        if isinstance(at, Mapping):
            for name in at:
                if not isinstance(name, str):
                    raise ConfigError(
                        f"{where}: {key} has the key {shown(name)}; its keys must be text"
                    )
            rest += [(key, name) for name in at]
            rest += [(f"{key}.{name}", inner) for name, inner in at.items()]
        elif isinstance(at, list | tuple):
            rest += [(key, inner) for inner in at]
        elif isinstance(at, float) and math.isnan(at):
            raise ConfigError(f"{where}: {key} is nan; it must be a finite number")
        elif isinstance(at, float) and LARGEST <= abs(at) < math.inf:
            raise ConfigError(
                f"{where}: {key} is {shown(at)}; a number must be below {LARGEST:g}, so that its"
                " square fits into single precision"
            )
        elif isinstance(at, int) and not LOW <= at <= HIGH:
            raise ConfigError(
                f"{where}: {key} is {shown(at)}; a whole number must fit into 64 bits"
            )
        elif isinstance(at, str) and "\0" in at:
            raise ConfigError(f"{where}: {key} is {shown(at)}; a text has no null character")


def _misread(hint: Any, value: Any) -> bool:
    """True for a value that draccus would take for another: it makes text of everything, numbers
    of true and false, lists of sets and bytes, and an empty section of an empty list.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or origin is typing.Literal:
        return False
    if origin in (typing.Union, types.UnionType):
        return all(_misread(arg, value) for arg in args)
    if origin in (list, tuple):
        return not isinstance(value, list | tuple) or any(_misread(args[0], one) for one in value)
    if origin in (dict, Mapping) or dataclasses.is_dataclass(hint):
        return not isinstance(value, Mapping)
    if hint is type(None):
        return value is not None
    if isinstance(value, bool):
        return hint is not bool
    return value is None or isinstance(value, Mapping | list | tuple | set | bytes)


def _called(hint: Any) -> str:
    """The name of a type in plain words."""
    plain = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_called(arg) for arg in args)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple:
        return f"a list of {len(args)}, each {_called(args[0])}"
    if origin is list:
        return f"a list, each {_called(args[0])}"
    return plain.get(hint, "a mapping of keys to values")


def to_yaml(experiment: Experiment) -> str:
    """The resolved experiment as YAML."""
    return yaml.safe_dump(_lists(dataclasses.asdict(experiment)), sort_keys=False)


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value

"""Reads experiments: YAML and command-line overrides to dataclasses, strictly, and back."""

import dataclasses
import logging
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import draccus
import yaml

from genpolicy.config import shipped
from genpolicy.config.documents import yaml_value
from genpolicy.config.errors import ConfigError, choice, nearest, shown
from genpolicy.config.schema import Experiment

log = logging.getLogger(__name__)

NAMED = ("policy", "task", "method", "kernel", "data")
"""Sections that name a leaf: a bare name means its defaults."""


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
        raise ConfigError(f"override {dotted!r} is not of the form --section.key=value")
    *sections, last = key.split(".")
    at: Any = raw
    for section in sections:
        if isinstance(at.get(section), str):
            at[section] = {"name": at[section]}
        at = at.setdefault(section, {})
        if not isinstance(at, dict):
            raise ConfigError(
                f"override {dotted!r}: {section} is a plain value and has no key {last!r}"
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
    except (ValueError, OSError) as error:
        # a field's own complaint; anything else is a bug and keeps its traceback
        raise ConfigError(" ".join(f"{where}: {error}".split())) from None


def _value(hint: Any, value: Any, where: str, key: str) -> Any:
    """Decodes one field's value as its declared type."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return decode(hint, value, key if where == "the experiment" else f"{where}: {key}")
    kinds = typing.get_args(hint) or (hint,)
    if typing.get_origin(hint) is dict and key in NAMED and isinstance(value, str):
        return {"name": value}
    if typing.get_origin(hint) is typing.Literal:
        choice(f"{where}: {key}", value, [str(kind) for kind in kinds])
    if isinstance(value, list) and list[Any] in kinds:
        return value  # draccus would make a mapping of it, where that is allowed too
    if isinstance(value, float) and value.is_integer() and int in kinds and float not in kinds:
        value = int(value)  # 1e3
    try:
        if value is None and not {type(None), Any} & set(kinds):
            raise ValueError
        return draccus.decode(hint, value)
    except Exception:  # draccus raises whatever its decoders do, and says it in several lines
        raise ConfigError(f"{where}: {key} is {shown(value)}; it must be {_called(hint)}") from None


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

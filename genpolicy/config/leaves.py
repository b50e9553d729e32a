"""Finds leaves: the class or function that a section of an experiment names.

Whoever asks says where the name comes from (`Origin`): a stranger's file has genpolicy's own leaves
alone, unless the person trusts it.
"""

import dataclasses
import importlib
import pkgutil
import typing
from collections.abc import Mapping
from typing import Any

from genpolicy.config import shipped
from genpolicy.config.errors import ConfigError, nearest, shown
from genpolicy.config.origin import Origin
from genpolicy.config.parse import decode

KINDS = ("methods", "models", "rewards", "tasks", "datasets", "formats")
"""The shelves of leaves."""
VERBS = {
    "methods": ("train",),
    "models": ("denoise",),
    "rewards": ("__call__",),
    "tasks": ("reset", "environments"),
    "datasets": ("rows", "pictures"),
    "formats": ("__call__",),
}
"""The verb of an entry of each shelf that is called; a dotted path may lead to something else."""
SHIPPED = ("assets/", "configs/", "robots/")
"""Paths of what ships begin like this."""


def names(kind: str) -> list[str]:
    """The shipped leaves of a kind, by file name."""
    package = importlib.import_module(f"genpolicy.{kind}")
    return sorted(
        m.name
        for m in pkgutil.iter_modules(package.__path__)
        if not m.ispkg and not m.name.startswith("_")
    )


def leaf(kind: str, name: str, origin: Origin) -> Any:
    """The entry of a leaf: the class or function of genpolicy/<kind>/<name>.py, or of a dotted path
    ``pkg.mod:entry`` where its origin may import it.
    """
    if ":" in name:
        origin.admit(name, kind[:-1])
        module_name, _, entry = name.partition(":")
        if not all((*module_name.split("."), *entry.split("."))) or "\0" in name:
            raise ConfigError(
                f"{kind[:-1]} {shown(name)} is no dotted path: it must be of the form pkg.mod:entry"
            )
        try:
            return getattr(importlib.import_module(module_name), entry)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{kind[:-1]} {shown(name)} can't be imported: {error}") from None
    if name not in names(kind):
        raise ConfigError(
            f"there is no {kind[:-1]} {shown(name)}{nearest(name, names(kind))} "
            "(or a dotted path pkg.mod:entry)"
        )
    module = importlib.import_module(f"genpolicy.{kind}.{name}")
    plain = name.replace("_", "")
    for attribute in vars(module):
        if attribute.lower().replace("_", "") == plain and callable(getattr(module, attribute)):
            return getattr(module, attribute)
    raise ConfigError(f"genpolicy/{kind}/{name}.py has no class or function named like the file")


def settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The leaf's own settings, with shipped paths (assets/..., configs/...) resolved."""
    return {key: _resolve(value, key) for key, value in raw.items() if key != "name"}


def _resolve(value: Any, key: str) -> Any:
    if isinstance(value, str) and value.startswith(SHIPPED):
        try:
            return str(shipped.path(value))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{key}: {error}") from None
    if isinstance(value, dict):
        return {name: _resolve(item, f"{key}.{name}") for name, item in value.items()}
    return value


def make(kind: str, raw: Mapping[str, Any], origin: Origin) -> Any:
    """Builds a leaf from its section: a dataclass is decoded strictly, a plain function is returned
    as it is.

    origin: of the section. A leaf that imports by names of its settings, or of files that they
    name, has a field of type `Origin`: it is filled in here, and no file can set it.
    """
    if not isinstance(raw.get("name"), str):
        raise ConfigError(
            f"the {kind[:-1]} section needs a name; valid are {', '.join(names(kind))}"
        )
    entry = leaf(kind, raw["name"], origin)
    if ":" in raw["name"] and not any(callable(getattr(entry, verb, None)) for verb in VERBS[kind]):
        raise ConfigError(
            f"{raw['name']} is no {kind[:-1]}: it has no {' or '.join(VERBS[kind])} to call"
        )
    if isinstance(entry, type) and dataclasses.is_dataclass(entry):
        hints = typing.get_type_hints(entry)
        asks = {f.name: origin for f in dataclasses.fields(entry) if hints[f.name] is Origin}
        return decode(entry, settings(raw), f"{kind[:-1]} {raw['name']}", asks)
    if isinstance(entry, type):
        raise ConfigError(
            f"{kind[:-1]} {raw['name']} is a plain class: "
            "make it a @dataclass, its fields are its settings"
        )
    if settings(raw):
        raise ConfigError(
            f"{kind[:-1]} {raw['name']} takes no settings, got {', '.join(settings(raw))}"
        )
    return entry

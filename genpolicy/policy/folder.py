"""The folder of a saved policy: the one of two that is whole, what its genpolicy.json says, and the
checks that its files are as they were saved.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genpolicy.config.errors import ConfigError
from genpolicy.config.leaves import leaf, names, settings
from genpolicy.config.origin import PERSON
from genpolicy.config.seal import changed, unsealed

SAMPLER = "genpolicy.json"
"""Beside a saved policy: how to load it again, the sampler it is deployed with, and its parts."""


def whole(folder: Path) -> Path:
    """A saved policy's folder; where its replacement was cut short, the one that was set aside."""
    aside = set_aside(folder)
    return aside if not folder.exists() and aside.is_dir() else folder


def set_aside(folder: Path) -> Path:
    """The name under which a policy's folder waits for the one that replaces it."""
    return folder.parent / f"{folder.name}.old"


def taken_from(section: Mapping[str, Any]) -> Path | None:
    """The folder of the saved policy of ours that a policy section goes on from: its adapter's, or
    the one that it takes its weights from; None where neither is one.
    """
    lora = section.get("lora")
    adapter = lora.get("start") if adapts(section) and isinstance(lora, Mapping) else None
    asked = settings({"adapter": adapter, "whole": section.get("pretrained")})
    folders = [Path(where) for where in asked.values() if isinstance(where, str | Path)]
    return next((folder for folder in folders if (folder / SAMPLER).is_file()), None)


def require_described(folder: Path) -> None:
    """Raise `ConfigError` where a policy of a run (RUN/policy, RUN/stages/NAME) has lost its
    genpolicy.json: it would be loaded as if somebody else had saved it, without its sampler and its
    parts.
    """
    runs = [home for home in folder.absolute().parents[:2] if (home / "config.yaml").is_file()]
    if runs and folder.is_dir() and not (folder / SAMPLER).is_file():
        raise ConfigError(
            f"{folder / SAMPLER} is missing: it says how the policy of the run {runs[0]} is loaded;"
            " put it back from a copy, or take another policy of the run"
        )


def require_whole(folder: Path) -> None:
    """Raise `ConfigError` where a file of a saved policy has changed or is missing; policies that
    were saved before they had checksums are taken as they are.
    """
    wrong = changed(folder, described(folder).get("files", {}))
    if wrong:
        raise ConfigError(
            f"{wrong}: the saved policy {folder} is damaged; put it back from a copy, or take"
            " another (a run writes its policy again when it is resumed)"
        )


def adapts(section: Mapping[str, Any]) -> bool:
    """True where an adapter of the pretrained model is what learns, and all that is saved: the
    section says so, or leaves it to its model's default.
    """
    name = section.get("name")
    model = leaf("models", str(name), PERSON) if name in names("models") else None
    fields = dataclasses.fields(model) if dataclasses.is_dataclass(model) else ()
    defaults = {field.name: field.default for field in fields}
    return section.get("train", defaults.get("train")) == "lora"


def described(folder: Path) -> dict[str, Any]:
    """The contents of a saved policy's genpolicy.json; `ConfigError` where it is damaged."""
    try:
        description = unsealed((folder / SAMPLER).read_text(encoding="utf-8"))
        sections = {name: dict(description[name]) for name in ("policy", "chain")}
        # policies saved before parts had a contract have no such key
        if "parts" in description:
            entries = description["parts"].items()
            sections["parts"] = {name: dict(entry) for name, entry in entries}
        return {**description, **sections}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"{folder / SAMPLER} is damaged: it must hold the sections policy and chain, what it"
            " says of parts must have a section for each, and its checksum crc32 must fit (whoever"
            " has changed the file leaves that key out)"
        ) from None

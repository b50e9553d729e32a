"""The parts of a saved policy: loaded from its folder, and tried before they are attached."""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from genpolicy.config.errors import ConfigError
from genpolicy.config.leaves import leaf, make, names
from genpolicy.config.origin import PERSON, STRANGER, Origin
from genpolicy.contracts.model import Model
from genpolicy.policy.folder import described, taken_from
from genpolicy.policy.policy import ChainPolicy, Part

PARTS = "parts"
"""In a saved policy's folder: a folder per part, by its name."""
OLD_BASE, OLD_JUDGE = "base", "judge"
"""The folders in which older policies keep the two parts that there were."""


def load_parts(
    section: Mapping[str, Any], model: Model, origin: Origin = STRANGER
) -> dict[str, Part]:
    """The parts of the saved policy that a policy section names, by name; none where it names none,
    or where what it names is the start of a student (`genpolicy.policy.teacher`).

    origin: of the section.

    Raises `ConfigError` for a part that is missing, damaged, newer than this version of genpolicy,
    or of an unknown kind: a policy without one of its parts is another policy.
    """
    folder = taken_from(section)
    if folder is None or "teacher" in section:
        return {}
    description = described(folder)
    if "parts" not in description:
        return _old_parts(section, folder, description, model, origin)
    return {
        name: _load_part(name, entry, folder / PARTS / name, model)
        for name, entry in description["parts"].items()
    }


def attached(policy: ChainPolicy, name: str, part: Part) -> ChainPolicy:
    """The policy with a part; `ConfigError` where it can't be saved or does not fit."""
    if policy.parts.get(name) is not part:
        require_savable(name, part, policy.model)
    try:
        return policy.attach(name, part)
    except ValueError as error:
        raise ConfigError(f"the policy's part {name!r}: {error}") from None


def require_savable(name: str, part: Part, model: Model) -> None:
    """Raise `ConfigError` unless a part comes back from a folder as it is now.

    It is saved and loaded once, before any work starts, so that nothing is lost at the end: neither
    weights nor settings.
    """
    kind = getattr(part, "kind", None)
    if kind not in names("policy.parts") or leaf("policy.parts", str(kind), PERSON) is not type(
        part
    ):
        raise ConfigError(
            f"the policy's part {name!r} is a {type(part).__name__}, which can't be saved with it;"
            f" kinds of parts are {', '.join(names('policy.parts'))}"
        )
    with tempfile.TemporaryDirectory() as folder:
        try:
            part.save(Path(folder))
            again = type(part).load(Path(folder), model)
            same = _equal(_contents(part), _contents(again))
        except Exception as error:
            raise ConfigError(
                f"the policy's part {name!r} can't be saved and loaded again:"
                f" {' '.join(str(error).split())}"
            ) from error
    if not same:
        raise ConfigError(
            f"the policy's part {name!r} ({kind}) does not come back from its folder as it was"
            " saved: it would be lost with the policy"
        )


def _load_part(name: str, entry: Mapping[str, Any], folder: Path, model: Model) -> Part:
    kind, version = entry.get("kind"), entry.get("version")
    if kind not in names("policy.parts"):
        raise ConfigError(
            f"{folder}: the policy's part {name!r} is of kind {kind!r}, which this version of"
            f" genpolicy does not know; it knows {', '.join(names('policy.parts'))}"
        )
    found = leaf("policy.parts", str(kind), PERSON)  # one of ours, see above
    if not isinstance(version, int) or not 1 <= version <= found.version:
        raise ConfigError(
            f"{folder}: the policy's part {name!r} ({kind}) has version {version}; this version of"
            f" genpolicy reads up to {found.version}"
        )
    return _read(name, folder, lambda: found.load(folder, model))


def _read[T](name: str, folder: Path, load: Callable[[], T]) -> T:
    """A part from its folder, or one sentence."""
    try:
        return load()
    except Exception as error:  # json, safetensors and torch each complain in types of their own
        missing = isinstance(error, FileNotFoundError)
        state = "incomplete" if missing else "damaged"
        raise ConfigError(
            f"the policy's part {name!r} in {folder} is {state}: {' '.join(str(error).split())}"
        ) from None


def _old_parts(
    section: Mapping[str, Any],
    folder: Path,
    description: Mapping[str, Any],
    model: Model,
    origin: Origin,
) -> dict[str, Part]:
    """The parts of a policy that was saved before they had a contract."""
    found: dict[str, Part] = {}
    if description.get("base_above") is not None:
        base = make("models", {**section, "pretrained": str(folder / OLD_BASE)}, origin)
        found["base"] = leaf("policy.parts", "base", PERSON).of(
            base, float(description["base_above"])
        )
    if (folder / OLD_JUDGE).is_dir():
        judge, best_of = folder / OLD_JUDGE, leaf("policy.parts", "best_of", PERSON)
        found["best_of"] = _read("best_of", judge, lambda: best_of.load(judge, model))
    return found


def _equal(one: Any, other: Any) -> bool:
    """Equality of two parts' contents, to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, torch.nn.Module) or dataclasses.is_dataclass(one):
        return type(one) is type(other) and _equal(_contents(one), _contents(other))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other


def _contents(value: Any) -> dict[str, Any]:
    """The attributes of a part; of a module its state_dict and every inner module's settings."""
    if not isinstance(value, torch.nn.Module):
        return vars(value)
    attributes = {
        f"{where}.{key}": attribute
        for where, inner in value.named_modules()
        for key, attribute in vars(inner).items()
        if not key.startswith("_") and key != "training"
    }
    return {"state": value.state_dict(), **attributes}

"""A policy and its folder: save it with its sampler and parts, find it, load it."""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from genpolicy.config.errors import ConfigError
from genpolicy.config.leaves import leaf, make, names, settings
from genpolicy.config.origin import PERSON, STRANGER, Origin
from genpolicy.config.schema import ChainConfig
from genpolicy.config.seal import changed, digests, sealed, unsealed
from genpolicy.contracts.model import Model
from genpolicy.policy.policy import ChainPolicy, Part
from genpolicy.policy.pretrained import foreign
from genpolicy.policy.sampler import make_policy, resampled

SAMPLER = "genpolicy.json"
"""Beside a saved policy: how to load it again, the sampler it is deployed with, and its parts."""
CARD = "README.md"
"""What a hub shows of a folder; it may be edited, and is no part of the policy."""
PARTS = "parts"
"""In a saved policy's folder: a folder per part, by its name."""
OLD_BASE, OLD_JUDGE = "base", "judge"
"""The folders in which older policies keep the two parts that there were."""


def save_policy(
    policy: ChainPolicy, section: Mapping[str, Any], sampler: ChainConfig, folder: Path
) -> None:
    """Write the policy in its ecosystem's format, with its sampler, its parts and the checksums of
    all beside it.

    section: the experiment's policy section, whose teacher is not kept. The folder that was there
    is set aside until the new one is in its place, so that a process that is killed leaves one of
    them for `whole`. ``best_of`` is the policy's, whatever the sampler's.
    """
    staged = folder.with_name(folder.name + ".staged")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    policy.model.save(staged, sampler)
    for name, part in policy.parts.items():
        (staged / PARTS / name).mkdir(parents=True)
        part.save(staged / PARTS / name)
    description = {
        "policy": {key: value for key, value in section.items() if key != "teacher"},
        "chain": dataclasses.asdict(replace(sampler, best_of=policy.best_of)),
        "parts": {
            name: {"kind": part.kind, "version": part.version}
            for name, part in policy.parts.items()
        },
        "files": {name: value for name, value in digests(staged).items() if name != CARD},
    }
    (staged / SAMPLER).write_text(sealed(description, indent=1) + "\n", encoding="utf-8")
    aside = _set_aside(folder)
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
    os.rename(staged, folder)
    shutil.rmtree(aside, ignore_errors=True)


def whole(folder: Path) -> Path:
    """A saved policy's folder; where its replacement was cut short, the one that was set aside."""
    aside = _set_aside(folder)
    return aside if not folder.exists() and aside.is_dir() else folder


def _set_aside(folder: Path) -> Path:
    """The name under which a policy's folder waits for the one that replaces it."""
    return folder.parent / f"{folder.name}.old"


@dataclass(frozen=True)
class Saved:
    """A policy on disk or on the hub.

    where: its folder or hub id.
    policy: its policy section.
    sampler: the one it is deployed with.
    run: the folder of the run that made it, if it lies in one.
    origin: of all that, a stranger's with what the person has replaced.
    """

    where: str
    policy: dict[str, Any]
    sampler: ChainConfig
    run: Path | None
    origin: Origin

    @property
    def acts(self) -> bool:
        """True where its samples are chunks of actions (`ControlModel`)."""
        return bool(leaf("models", str(self.policy.get("name")), self.origin).acts)

    def load(self) -> ChainPolicy:
        """The policy with its sampler and its parts."""
        model = make("models", self.policy, self.origin)
        parts = load_parts(self.policy, model, self.origin)
        return make_policy(model, self.sampler, parts, origin=self.origin)


def completed(section: Mapping[str, Any]) -> dict[str, Any]:
    """A policy section that names folders that are there (`whole`), and the head of the saved
    policy that it goes on from, where it names none: some folders' own format can't say it.

    Raises `ConfigError` where it names the folder of a run.
    """
    own = dict(section)
    own |= _found(own, "pretrained", "policy.pretrained")
    if isinstance(own.get("lora"), Mapping):
        own["lora"] = {**own["lora"], **_found(own["lora"], "start", "policy.lora.start")}
    folder = _origin(own)
    if folder is not None:
        _require_whole(folder)
        head = _described(folder)["policy"].get("prediction_type")
        if head is not None and own.get("prediction_type") is None:
            own["prediction_type"] = head
    return own


def _found(section: Mapping[str, Any], key: str, called: str) -> dict[str, str]:
    """The key with the folder to read in the place of the one that it names; nothing where that is
    the same. Raises `ConfigError` for the folder of a run; ``called`` is the key's whole name.
    """
    where = section.get(key)
    if not isinstance(where, str | Path):
        return {}
    folder = whole(Path(where))
    if (folder / "config.yaml").is_file() and not (folder / SAMPLER).is_file():
        policy = folder / "policy"
        which = (
            f"its policy is {policy}" if whole(policy).is_dir() else "it has saved no policy yet"
        )
        raise ConfigError(f"{called} is {where}, the folder of a run: {which}")
    _require_described(folder)
    return {} if folder == Path(where) else {key: str(folder)}


def load_parts(
    section: Mapping[str, Any], model: Model, origin: Origin = STRANGER
) -> dict[str, Part]:
    """The parts of the saved policy that a policy section names, by name; none where it names none,
    or where what it names is the start of a student (`genpolicy.policy.teacher`).

    origin: of the section.

    Raises `ConfigError` for a part that is missing, damaged, newer than this version of genpolicy,
    or of an unknown kind: a policy without one of its parts is another policy.
    """
    folder = _origin(section)
    if folder is None or "teacher" in section:
        return {}
    description = _described(folder)
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


def _origin(section: Mapping[str, Any]) -> Path | None:
    """The folder of the saved policy of ours that a policy section goes on from: its adapter's, or
    the one that it takes its weights from; None where neither is one.
    """
    lora = section.get("lora")
    adapter = lora.get("start") if adapts(section) and isinstance(lora, Mapping) else None
    asked = settings({"adapter": adapter, "whole": section.get("pretrained")})
    folders = [Path(where) for where in asked.values() if isinstance(where, str | Path)]
    return next((folder for folder in folders if (folder / SAMPLER).is_file()), None)


def _require_described(folder: Path) -> None:
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


def _require_whole(folder: Path) -> None:
    """Raise `ConfigError` where a file of a saved policy has changed or is missing; policies that
    were saved before they had checksums are taken as they are.
    """
    wrong = changed(folder, _described(folder).get("files", {}))
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


def _described(folder: Path) -> dict[str, Any]:
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


def saved(path: str | Path, *, trust: bool = False, **overrides: Any) -> Saved:
    """Find a policy: a run's folder (its policy/), a saved policy's folder, a shipped asset, a
    diffusers or LeRobot folder, a hub id.

    overrides: keys of `ChainConfig` that replace the saved sampler's (steps, guidance, kernel,
    ...). What is no policy of ours comes with the sampler that `foreign` says.
    trust: the person trusts who saved it: its files may import the code that they name.
    """
    folder = whole(Path(settings({"path": str(path)})["path"]))
    if not folder.is_dir() and (folder.is_absolute() or str(path).count("/") != 1):
        raise ConfigError(f"{path}: no such folder, and no hub id (owner/name) either")
    homes = (folder, folder.parent, folder.parent.parent)  # RUN, RUN/policy, RUN/stages/NAME
    run = next((home for home in homes if (home / "config.yaml").is_file()), None)
    if run == folder:
        folder = whole(folder / "policy")
        if not folder.is_dir():
            raise ConfigError(
                f"run {run} has saved no policy yet: it does so at its first checkpoint after"
                " iteration 0"
            )
    _require_described(folder)
    if not (folder / SAMPLER).is_file():
        section, sampler = foreign(str(folder))
        origin = Origin(trust=trust).reached(folder).naming(overrides)
        return Saved(str(path), section, resampled(sampler, overrides), None, origin)
    _require_whole(folder)
    description = _described(folder)
    section, sampler = description["policy"], description["chain"]
    origin = Origin(trust=trust).reached(folder / SAMPLER).naming(overrides)
    if adapts(section):
        section["lora"] = {**(section.get("lora") or {}), "start": str(folder)}
    else:
        section["pretrained"] = str(folder)
        # older runs of the whole network could name a LoRA, which they did not read
        section.pop("lora", None)
    return Saved(str(folder), section, resampled(sampler, overrides), run, origin)


def load(path: str | Path, *, trust: bool = False, **overrides: Any) -> ChainPolicy:
    """Load a policy with its deployed sampler; see `saved` for what ``path``, ``trust`` and
    ``overrides`` may be.
    """
    return saved(path, trust=trust, **overrides).load()

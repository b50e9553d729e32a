"""A policy and its folder: save it with its sampler and parts, find it, load it."""

import dataclasses
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from genpolicy.config.errors import ConfigError
from genpolicy.config.leaves import leaf, make, settings
from genpolicy.config.origin import Origin
from genpolicy.config.schema import ChainConfig
from genpolicy.config.seal import digests, sealed
from genpolicy.policy.folder import (
    SAMPLER,
    adapts,
    described,
    require_described,
    require_whole,
    set_aside,
    taken_from,
    whole,
)
from genpolicy.policy.parts_files import PARTS, load_parts
from genpolicy.policy.policy import ChainPolicy
from genpolicy.policy.pretrained import foreign
from genpolicy.policy.sampler import make_policy, resampled

CARD = "README.md"
"""The page that a hub shows of a folder; it may be edited, and is no part of the policy."""


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
    aside = set_aside(folder)
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
    os.rename(staged, folder)
    shutil.rmtree(aside, ignore_errors=True)


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
    folder = taken_from(own)
    if folder is not None:
        require_whole(folder)
        head = described(folder)["policy"].get("prediction_type")
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
    require_described(folder)
    return {} if folder == Path(where) else {key: str(folder)}


def saved(path: str | Path, *, trust: bool = False, **overrides: Any) -> Saved:
    """Find a policy: a run's folder (its policy/), a saved policy's folder, a shipped asset, a
    diffusers or LeRobot folder, a hub id.

    overrides: keys of `ChainConfig` that replace the saved sampler's (steps, guidance, kernel,
    ...). What is no policy of ours comes with the sampler that `foreign` says.
    trust: the person trusts who saved it: its files may import the code that they name.
    """
    folder = whole(Path(settings({"path": str(path)})["path"]))
    # what would lie in a folder that is here is no hub id
    local = folder.is_absolute() or str(path).count("/") != 1 or folder.parent.is_dir()
    if not folder.is_dir() and local:
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
    require_described(folder)
    if not (folder / SAMPLER).is_file():
        section, sampler = foreign(str(folder))
        origin = Origin(trust=trust).reached(folder).naming(overrides)
        return Saved(str(path), section, resampled(sampler, overrides), None, origin)
    require_whole(folder)
    description = described(folder)
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

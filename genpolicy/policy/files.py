"""A policy and its folder: save it with its sampler and parts, find it, load it."""

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from genpolicy.config.errors import ConfigError
from genpolicy.config.leaves import leaf, make, settings
from genpolicy.config.schema import ChainConfig, Experiment
from genpolicy.policy.best_of import QJudge
from genpolicy.policy.policy import Base, ChainPolicy, swapped
from genpolicy.policy.pretrained import foreign
from genpolicy.policy.sampler import make_policy, resampled

BASE = "base"
"""In a saved policy's folder: the frozen network of the noisier part of its chain, if it has one.
"""


JUDGE = "judge"
"""There too: the critic that picks for a best-of-N sampler, if it has one, whichever sampler is
deployed.
"""


SAMPLER = "genpolicy.json"
"""Beside a saved policy: how to load it again, and the sampler that it is deployed with."""


def save_policy(
    policy: ChainPolicy, experiment: Experiment, sampler: ChainConfig, folder: Path
) -> None:
    """Write the policy in its ecosystem's format with its sampler, and its judge if it has one,
    beside it; the folder is replaced in one move. ``best_of`` is the policy's, whatever the
    sampler's.
    """
    staged = folder.with_name(folder.name + ".staged")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    policy.model.save(staged)
    acted = replace(sampler, best_of=policy.best_of)
    description: dict[str, Any] = {"policy": experiment.policy, "chain": dataclasses.asdict(acted)}
    if policy.base is not None:
        description["base_above"] = policy.base.above
        (staged / BASE).mkdir()
        with swapped(list(policy.model.trainable().values()), policy.base.weights):
            policy.model.save(staged / BASE)
    if policy.judge is not None:
        assert isinstance(policy.judge, QJudge), "only a QJudge can be saved"
        (staged / JUDGE).mkdir()
        policy.judge.save(staged / JUDGE)
    (staged / SAMPLER).write_text(json.dumps(description, indent=1) + "\n")
    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
        os.rename(staged, folder)
        shutil.rmtree(old)
    else:
        os.rename(staged, folder)


@dataclass(frozen=True)
class Saved:
    """A policy on disk or on the hub: where, its policy section, its deployed sampler, and the run
    that made it.

    base: the folder of the frozen network of its chain's noisier part, and the noise time above
    which it acts. judge: the folder of its critic.
    """

    where: str
    policy: dict[str, Any]
    sampler: ChainConfig
    run: Path | None
    base: tuple[str, float] | None = None
    judge: Path | None = None

    @property
    def acts(self) -> bool:
        """Whether its samples are chunks of actions (`ControlModel`)."""
        return hasattr(leaf("models", self.policy["name"]), "event_mask")

    def load(self) -> ChainPolicy:
        """The policy with its sampler and its judge."""
        model = make("models", self.policy)
        judge = None if self.judge is None else QJudge.load(self.judge, model.device)
        policy = make_policy(model, self.sampler, judge)
        if self.base is None:
            return policy
        folder, above = self.base
        frozen = make("models", {**self.policy, "pretrained": folder}).trainable().values()
        return replace(policy, base=Base([value.detach() for value in frozen], above))


def saved(path: str | Path, **overrides: Any) -> Saved:
    """Find a policy: a run's folder (its policy/), a saved policy's folder, a shipped asset, a
    diffusers or LeRobot folder, a hub id.

    overrides: keys of `ChainConfig` that replace the saved sampler's (steps, guidance, kernel,
    ...). What is no policy of ours comes with the sampler that `foreign` says.
    """
    folder = Path(settings({"path": str(path)})["path"])
    if not folder.is_dir() and (folder.is_absolute() or str(path).count("/") != 1):
        raise ConfigError(f"{path}: no such folder, and no hub id (owner/name) either")
    homes = (folder, folder.parent, folder.parent.parent)  # RUN, RUN/policy, RUN/stages/NAME
    run = next((home for home in homes if (home / "config.yaml").is_file()), None)
    if run == folder:
        folder = folder / "policy"
        if not folder.is_dir():
            raise ConfigError(
                f"run {run} has saved no policy yet: it does so at its first checkpoint after iteration 0"
            )
    if not (folder / SAMPLER).is_file():
        section, sampler = foreign(str(folder))
        return Saved(str(path), section, resampled(sampler, overrides), None)
    try:
        description = json.loads((folder / SAMPLER).read_text())
        section, sampler = dict(description["policy"]), dict(description["chain"])
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{folder / SAMPLER} is damaged: it must hold the keys policy and chain"
        ) from None
    if section.get("train") == "lora":
        section["lora"] = {**(section.get("lora") or {}), "start": str(folder)}
    else:
        section["pretrained"] = str(folder)
    above = description.get("base_above")
    base = None if above is None else (str(folder / BASE), float(above))
    judge = folder / JUDGE if (folder / JUDGE).is_dir() else None
    return Saved(str(folder), section, resampled(sampler, overrides), run, base, judge)


def load(path: str | Path, **overrides: Any) -> ChainPolicy:
    """Load a policy with its deployed sampler; see `saved` for what ``path`` and ``overrides`` may
    be.
    """
    return saved(path, **overrides).load()

"""The teacher of a policy that is distilled: a saved policy, whose sampler the student learns to
reach in fewer steps.

policy:
  name: mlp
  teacher: runs/metaworld/rl100/policy_best      # or {path: ..., guidance: 4.0, steps: 20, ...}
  prediction_type: sample

The student begins with the teacher's weights, unless its section names others, and with none of the
teacher's parts: what they do is taught.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from genpolicy.config.errors import ConfigError, shown
from genpolicy.config.origin import Origin
from genpolicy.policy.files import saved
from genpolicy.policy.folder import adapts
from genpolicy.policy.policy import ChainPolicy

TEACHER = "teacher"
"""The key of a policy section that names the teacher."""
PATH = "path"
"""The key of the teacher's own section that names its folder; the others are its sampler's."""


def student(section: Mapping[str, Any]) -> dict[str, Any]:
    """A policy section that begins where its teacher stands, where it has one and names no weights
    of its own (``pretrained``; null draws fresh ones).

    A LoRA goes on from the teacher's adapter, or from a teacher that is a whole pipeline. Raises
    `ConfigError` where a whole network would have to begin from an adapter.
    """
    own = dict(section)
    if TEACHER not in own or "pretrained" in own:
        return own
    path, _ = _asked(own)
    found = saved(path)
    own.setdefault("name", found.policy["name"])
    if not adapts(found.policy):
        return own | {"pretrained": found.where}
    if not adapts(own):
        raise ConfigError(
            f"policy.teacher {path} is an adapter, from which a whole network can't begin: set"
            " policy.train to lora, or name the student's own policy.pretrained"
        )
    lora = {"rank": found.policy["lora"].get("rank"), **(own.get("lora") or {})}
    lora = {key: value for key, value in lora.items() if value is not None}
    start = found.policy["lora"]["start"]
    return own | {"pretrained": found.policy["pretrained"], "lora": {**lora, "start": start}}


def load_teacher(section: Mapping[str, Any], origin: Origin) -> ChainPolicy | None:
    """The teacher that a policy section names, with its deployed sampler but for the keys beside
    its path; None where it names none. origin: of the experiment.

    Raises `ConfigError` where it is no saved policy, or picks the best of several samples: such a
    sample is no function of one noise.
    """
    if TEACHER not in section:
        return None
    path, sampler = _asked(section)
    found = saved(path, trust=origin.trust, **sampler)
    # where the student computes, if it says so
    device = {name: section[name] for name in ("device",) if name in section}
    teacher = replace(found, policy=found.policy | device).load()
    if teacher.best_of > 1:
        raise ConfigError(
            f"policy.teacher picks the best of {teacher.best_of} samples, which is no function of"
            " one noise: teach with {path: ..., best_of: 1}"
        )
    return teacher


def _asked(section: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The teacher's folder and the keys of its sampler."""
    asked = section[TEACHER]
    keys = dict(asked) if isinstance(asked, Mapping) else {PATH: asked}
    path = keys.pop(PATH, None)
    if not isinstance(path, str):
        raise ConfigError(
            f"policy.teacher is {shown(asked)}; it must be a saved policy's folder, or"
            " {path: FOLDER, ...} with keys of the chain section"
        )
    return path, keys

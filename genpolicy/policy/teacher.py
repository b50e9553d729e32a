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
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from genpolicy.config.errors import ConfigError, choice, shown
from genpolicy.config.leaves import names
from genpolicy.config.origin import Origin
from genpolicy.config.schema import ChainConfig
from genpolicy.contracts.model import Model
from genpolicy.policy.files import Saved, saved
from genpolicy.policy.folder import SAMPLER, adapts
from genpolicy.policy.parts.base import Base
from genpolicy.policy.parts_files import load_parts
from genpolicy.policy.policy import ChainPolicy
from genpolicy.policy.sampler import make_policy
from genpolicy.policy.weights import digest

TEACHER = "teacher"
"""The key of a policy section that names the teacher."""
PATH = "path"
"""The key of the teacher's own section that names its folder; the others are its sampler's."""
NOT_CALLED = (TEACHER, "pretrained", "prediction_type", "lora")
"""Keys of a student's section that say which network it is, and not how it is called."""


class Taught:
    """The teacher of a run, as its checkpoints know it: a digest of its weights that can learn, of
    its parts and of its sampler, wherever its folder lies.
    """

    def __init__(self, teacher: ChainPolicy) -> None:
        parts = {name: part.state_dict() for name, part in teacher.parts.items()}
        chain = teacher.chain
        sampler = (chain.kernel, chain.grid.tolist(), chain.stochastic, teacher.guidance)
        whole = {"model": teacher.model.trainable(), "parts": parts, "sampler": sampler}
        self.digest = digest(whole)

    def state_dict(self) -> dict[str, str]:
        return {"digest": self.digest}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Raise `ConfigError` where another policy has taught so far."""
        if state["digest"] != self.digest:
            raise ConfigError(
                "policy.teacher is another policy, or has another sampler, than the one that has"
                " taught so far: bring that one back, or begin another run from this one's policy"
                " folder (policy.pretrained)"
            )


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
    if "name" not in own:
        # the student's section is the person's, and a stranger's name may be code
        name = str(found.policy["name"])
        choice(
            "policy.teacher's model; name the student's own as policy.name: it",
            name,
            names("models"),
        )
        own["name"] = name
    start = _adapter(found.policy)
    if start is None:
        return own | {"pretrained": found.where}
    if not adapts(own):
        raise ConfigError(
            f"policy.teacher {path} is an adapter, from which a whole network can't begin: set"
            " policy.train to lora, or name the student's own policy.pretrained"
        )
    lora = {"rank": found.policy["lora"].get("rank"), **(own.get("lora") or {})}
    lora = {key: value for key, value in lora.items() if value is not None}
    return own | {"pretrained": found.policy["pretrained"], "lora": {**lora, "start": start}}


def load_teacher(section: Mapping[str, Any], origin: Origin, model: Model) -> ChainPolicy | None:
    """The teacher that a policy section names, with its deployed sampler but for the keys beside
    its path; None where it names none. origin: of the experiment.

    model: the student's as it was built, before it learns. Where it draws pictures and began as
    the teacher itself, there is no second network: a copy of the weights that learn is in their
    place while the teacher denoises.

    Raises `ConfigError` where it is no saved policy, or picks the best of several samples: such a
    sample is no function of one noise.
    """
    if TEACHER not in section:
        return None
    path, sampler = _asked(section)
    found = saved(path, trust=origin.trust, **sampler)
    own = {key: value for key, value in section.items() if key not in NOT_CALLED}
    ours = (Path(found.where) / SAMPLER).is_file()
    if not ours and found.policy["name"] == own.get("name"):
        # what somebody else saved does not say how it is called: as the student is
        found = replace(found, policy={**own, **found.policy})
    if "device" in own:  # where the student computes, if it says so
        found = replace(found, policy=found.policy | {"device": own["device"]})
    teacher = _borrowed(found, section, model) or found.load()
    if teacher.best_of > 1:
        raise ConfigError(
            f"policy.teacher picks the best of {teacher.best_of} samples, which is no function of"
            " one noise: teach with {path: ..., best_of: 1}"
        )
    return teacher


def _borrowed(found: Saved, section: Mapping[str, Any], model: Model) -> ChainPolicy | None:
    """The teacher on the student's own network, with a copy of the weights that learn; None where
    the student began as something else, acts, or the teacher has parts of its own.
    """
    if model.acts or _begins(found.policy) != _begins(student(section)):
        return None
    if load_parts(found.policy, model, found.origin):
        return None
    policy = make_policy(model, found.sampler, origin=found.origin)
    return policy.attach("base", Base.of(model, above=0.0))


def _begins(section: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a policy section that say which network a model is before it learns."""
    kept = {key: value for key, value in section.items() if key not in (TEACHER, "train", "lora")}
    return {**kept, "start": _adapter(section)}


def _adapter(section: Mapping[str, Any]) -> str | None:
    """The adapter that a policy section starts from; None where it starts from a whole network."""
    lora = section.get("lora")
    return lora.get("start") if adapts(section) and isinstance(lora, Mapping) else None


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
    valid = [field.name for field in fields(ChainConfig)]
    for key in keys:
        choice("policy.teacher: a key of its sampler", key, valid)
    return path, keys

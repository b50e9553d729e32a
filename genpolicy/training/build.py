"""From an experiment to live objects, and a policy to its folder and back."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from genpolicy import chain
from genpolicy.chain import Chain
from genpolicy.config.schema import (
    ChainConfig,
    ConfigError,
    Experiment,
    decode,
    leaf,
    make,
    nearest,
    settings,
)
from genpolicy.contracts.dataset import Merged
from genpolicy.contracts.reward import WeightedRewards
from genpolicy.contracts.task import ControlTask, Dataset, read_prompts
from genpolicy.policy.best_of import QJudge
from genpolicy.policy.policy import Base, ChainPolicy, ControlModel, Judge, Model, swapped
from genpolicy.policy.pretrained import foreign

BASE = "base"
"""In a saved policy's folder: the frozen network of the noisier part of its chain, if it has one.
"""
JUDGE = "judge"
"""There too: the critic that picks for a best-of-N sampler, if it has one, whichever sampler is
deployed.
"""
SAMPLER = "genpolicy.json"
"""Beside a saved policy: how to load it again, and the sampler that it is deployed with."""


def kernels() -> dict[str, Callable[..., Any]]:
    """The kernels and solvers of genpolicy.chain by name: ddim, sde, cps, consistency, heun,
    dpmsolver, and the wrappers.
    """
    return {
        attribute.lower(): entry
        for attribute, entry in vars(chain).items()
        if isinstance(entry, type)
        and any(hasattr(entry, method) for method in ("coefficients", "integrate"))
    }


def make_kernel(raw: Mapping[str, Any]) -> Any:
    """A kernel or solver of `kernels` by name, or a dotted path."""
    name = raw.get("name")
    if not isinstance(name, str):
        raise ConfigError("chain: kernel needs a name, for example {name: ddim, eta: 1.0}")
    if ":" in name:
        return decode(leaf("kernels", name), settings(raw), f"kernel {name}")
    valid = kernels()
    if name not in valid:
        raise ConfigError(f"there is no kernel {name!r}{nearest(name, list(valid))}")
    inner = {
        key: make_kernel(value) if key == "kernel" else value
        for key, value in settings(raw).items()
    }
    known = [f.name for f in dataclasses.fields(valid[name])]  # type: ignore[arg-type]
    for key in inner:
        if key not in known:
            raise ConfigError(f"kernel {name} has no key {key!r}{nearest(key, known)}")
    try:
        return valid[name](**inner)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"kernel {name} does not fit: {error}") from None


def make_rewards(raw: Mapping[str, Any]) -> Any:
    """The reward section, name -> weight or {weight, settings...}, as `WeightedRewards`."""
    rewards: dict[str, tuple[Any, float]] = {}
    for name, value in raw.items():
        section = dict(value) if isinstance(value, dict) else {"weight": value}
        weight = section.pop("weight", 1.0)
        if not isinstance(weight, int | float):
            raise ConfigError(f"reward {name}: its weight must be a number, got {weight!r}")
        short = name.rpartition(":")[2]
        if short in rewards:
            raise ConfigError(f"two rewards are called {short}: rename one of them")
        rewards[short] = (make("rewards", {"name": name, **section}), float(weight))
    if not rewards:
        raise ConfigError("the reward section names no reward")
    return WeightedRewards(rewards)


def load_rewards(rewards: WeightedRewards) -> None:
    """Load the weights of those that have some now, so that what is missing is said before any work
    starts.
    """
    for reward, _ in rewards.rewards.values():
        try:
            getattr(reward, "load", lambda: None)()
        except ImportError as error:
            raise ConfigError(str(error)) from None


def make_data(raw: Mapping[str, Any] | Sequence[Any] | None) -> Dataset | None:
    """The data section: a data set, or a list of several that are learned from as one; a text in it
    is a LeRobotDataset's folder.
    """
    if raw is None:
        return None
    if isinstance(raw, Mapping):
        return make("datasets", raw)
    sections = [
        {"name": "lerobot_dataset", "root": one} if isinstance(one, str) else one for one in raw
    ]
    if not sections:
        raise ConfigError("the data section is an empty list: name a folder, or leave it out")
    try:
        return Merged([make("datasets", section) for section in sections])
    except ValueError as error:
        raise ConfigError(f"data: {error}") from None


def control_model(
    section: Mapping[str, Any], task: ControlTask, data: Dataset | None
) -> ControlModel:
    """A model for a task of many decisions, given its shapes and statistics by the data set where
    it is new. Raises `ConfigError` where model and task do not fit.
    """
    model = make("models", section)
    if not hasattr(model, "executed"):
        raise ConfigError(
            f"model {section['name']} has no actions: it can't act in a task of environments"
        )
    if model.pretrained is None:
        if data is None:
            raise ConfigError(
                "policy.pretrained is not set: a new policy needs the data section, which gives it shapes"
            )
        model.initialise(data)
    require_fit(model, task)
    return model


def require_fit(model: ControlModel, task: ControlTask) -> None:
    """Raise `ConfigError` where the task does not show what the model needs to see, or takes other
    actions.
    """
    for name, shape in model.shapes.items():
        seen = tuple(task.shapes[name]) if name in task.shapes else None
        if seen != tuple(shape):
            has = (
                ", ".join(f"{n} {tuple(s)}" for n, s in task.shapes.items())
                if seen is None
                else f"shape {seen}"
            )
            raise ConfigError(
                f"the policy needs {name} of shape {tuple(shape)}; the task has {has}"
            )
    if model.action_dim != task.action_dim:
        raise ConfigError(
            f"the policy gives actions of {model.action_dim} dims; the task takes {task.action_dim}"
        )


def require_trainable(chain: ChainConfig) -> None:
    """Raise `ConfigError` for a sampler that acts but can't be trained."""
    if chain.best_of > 1:
        raise ConfigError(
            f"chain: best_of is {chain.best_of}, and what is picked from several samples has no likelihood to train on:"
            " leave it at 1, and set eval.sampler.best_of for the sampler that is deployed"
        )


def make_policy(model: Model, sampler: ChainConfig, judge: Judge | None = None) -> ChainPolicy:
    """A model with a sampler; a sampler that does not fit the model's schedule, or one of several
    samples without the judge that picks one, raises `ConfigError`.
    """
    if sampler.best_of > 1 and judge is None:
        raise ConfigError(
            f"best_of is {sampler.best_of}, but the policy has no critic that could pick one sample of several: RL-100's"
            " offline stage (method rl100) learns one, which is saved beside its policies"
        )
    try:
        grid = model.grid(sampler.steps)
        built = Chain(model.schedule, grid, make_kernel(sampler.kernel), window=sampler.window)
        interval = sampler.guidance_interval or (0.0, float("inf"))
        policy = ChainPolicy(model, built, sampler.guidance, interval, sampler.negative_gradient)
        policy = replace(policy, best_of=sampler.best_of, judge=judge)
        for k in built.stochastic:
            policy.std(k)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"chain: {error}") from None
    if sampler.window_size is not None and not 1 <= sampler.window_size <= len(built.stochastic):
        raise ConfigError(
            f"chain: window_size {sampler.window_size} does not fit into the window of {len(built.stochastic)} steps"
        )
    return policy


def deployed_sampler(
    rollout: ChainConfig, overrides: Mapping[str, Any], control: bool = False
) -> ChainConfig:
    """The sampler that is evaluated and saved: the rollout's steps and guidance, unless overridden;
    pictures with the ODE, which keeps their diversity, actions (``control``) with the mean of the
    kernel that they were trained with. The best of several actions is picked from the kernel's own
    samples: its means are nearly the same for all noise.
    """
    if control:
        default = replace(
            rollout, kernel={"name": "mean", "kernel": rollout.kernel}, window_size=None
        )
    else:
        default = replace(
            rollout, kernel={"name": "ddim", "eta": 0.0}, window=None, window_size=None
        )
    sampler = decode(ChainConfig, {**dataclasses.asdict(default), **overrides}, "eval: sampler")
    if not control or sampler.best_of == 1 or "kernel" in overrides:
        return sampler
    sampler = replace(sampler, kernel=rollout.kernel)
    return sampler if "window" in overrides else without_last_noise(sampler)


def without_last_noise(sampler: ChainConfig) -> ChainConfig:
    """The same sampler, whose kernel does not act at the last step."""
    low, high = sampler.window or (0, sampler.steps)
    return replace(sampler, window=(low, max(min(high, sampler.steps - 1), low)))


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


def resampled(own: Mapping[str, Any], overrides: Mapping[str, Any]) -> ChainConfig:
    """A sampler with some keys replaced; a window that was the whole chain stays the whole chain."""
    merged = {**own, **overrides}
    if (
        "window" not in overrides
        and own.get("window") is not None
        and [*own["window"]] == [0, own.get("steps")]
    ):
        merged["window"] = [0, merged["steps"]]
    return decode(ChainConfig, merged, "the sampler")


def load(path: str | Path, **overrides: Any) -> ChainPolicy:
    """Load a policy with its deployed sampler; see `saved` for what ``path`` and ``overrides`` may
    be.
    """
    return saved(path, **overrides).load()


def prompt_lines(path: str) -> tuple[str, ...]:
    """The prompts of a file, which may be a shipped one (assets/...)."""
    try:
        return read_prompts(settings({"prompts": path})["prompts"])
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None

"""The needs of methods, and the sentences that tell what an experiment lacks."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from genpolicy.config.errors import ConfigError
from genpolicy.contracts.dataset import Dataset, Pictures
from genpolicy.contracts.model import Model, TokenModel
from genpolicy.contracts.task import is_control
from genpolicy.policy.parts.base import Base
from genpolicy.policy.policy import ChainPolicy
from genpolicy.rollout.examples import require_pictures
from genpolicy.training.processes import Processes

World = Literal["prompts", "robots"]
WORLDS: tuple[World, ...] = get_args(World)


@dataclass(frozen=True)
class Needs:
    """The needs of a method, which it states as its attribute ``needs``.

    worlds: the kinds of tasks that it can train: prompts, robots (environments), or both.
    data: recorded examples, named in the data section.
    window: at least one step of the chain at which noise is drawn.
    likelihoods: a density at every step of that window.
    denoising: it asks the network at noisy states x_t of its own choice, so that its policies must
        denoise (a window or likelihoods say so already).
    teacher: a saved policy that the policy section names as its teacher.
    split: names of settings that count the groups or episodes which the processes share out; those
        that the method has are held against the number of processes before any work
        (`require_counts`).
    whole_updates: each of its ``updates`` takes whole groups, which are then held against those
        too.
    """

    worlds: tuple[World, ...] = WORLDS
    data: bool = False
    window: bool = False
    likelihoods: bool = False
    denoising: bool = False
    teacher: bool = False
    split: tuple[str, ...] = ("groups", "episodes")
    whole_updates: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.worlds, str) or not self.worlds or set(self.worlds) - set(WORLDS):
            raise ConfigError(
                f"needs: worlds is {self.worlds!r}; it must be a tuple of {' and '.join(WORLDS)}"
            )


def world_of(task: Any) -> World:
    """The world of a task: robots where it has environments, else prompts."""
    return "robots" if is_control(task) else "prompts"


def require_sections(name: str, needs: Needs, world: World, data: bool) -> None:
    """Raise `ConfigError` unless method ``name`` can train this world with (or without) data."""
    if world not in needs.worlds:
        raise ConfigError(
            f"method {name} trains {' and '.join(needs.worlds)}, and the task is one of {world}"
        )
    if needs.data and not data:
        raise ConfigError(
            f"method {name} learns from recorded examples: name them in the data section"
        )


def require_teacher(name: str, needs: Needs, taught: bool) -> None:
    """Raise `ConfigError` where method ``name`` lacks the teacher that it needs, or has one that it
    would not listen to.
    """
    if needs.teacher and not taught:
        raise ConfigError(f"method {name} learns from a teacher: name its folder as policy.teacher")
    if taught and not needs.teacher:
        raise ConfigError(
            f"policy.teacher is set, and method {name} learns from no teacher: leave it out, and go"
            " on from a saved policy with policy.pretrained"
        )


def require_kind(world: World, data: Dataset | Pictures | None) -> None:
    """Raise `ConfigError` where the data are of the other world."""
    if data is not None and isinstance(data, Pictures) != (world == "prompts"):
        found = "pictures" if isinstance(data, Pictures) else "recorded episodes"
        raise ConfigError(f"the data section names {found}, and the task is one of {world}")


def require_counts(method: Any, needs: Needs, processes: Processes) -> None:
    """Raise `ConfigError` where a count of the method's settings that `Needs.split` names can't be
    split into whole groups or episodes over the processes (and over its updates, where each takes
    whole groups).
    """
    settings = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    for name in needs.split:
        if name in settings:
            updates = settings["updates"] if needs.whole_updates else 1
            processes.require_split(f"method: {name}", settings[name], updates)


def require_shape(model: Model, data: Dataset | Pictures | None) -> None:
    """Raise `ConfigError` where the data section's first picture is no event of the model; each of
    the others is held against it when it is read (`genpolicy.rollout.examples`).
    """
    if isinstance(data, Pictures):
        require_pictures(data, model, [0])


def require_chain(name: str, needs: Needs, policy: ChainPolicy) -> None:
    """Raise `ConfigError` unless the chain can be trained as method ``name`` needs it."""
    if isinstance(policy.model, TokenModel) and (
        needs.denoising or needs.window or needs.likelihoods
    ):
        raise ConfigError(
            f"method {name} trains the denoising steps of a chain, and a policy of tokens has none:"
            " clone it (bc), steer its noise (find), or take a policy that denoises"
        )
    window = policy.chain.stochastic
    if not needs.window and not needs.likelihoods:
        return
    if not window:
        raise ConfigError(
            f"method {name}: the chain has no stochastic step to train: widen chain.window or use a"
            " kernel with noise"
        )
    _require_learned(policy)
    if needs.likelihoods:
        _require_density(name, policy)
    first = float(policy.chain.grid[window.start])
    for part in policy.parts.values():
        if isinstance(part, Base) and first > part.above:
            raise ConfigError(
                f"the policy's base denoises above noise time {part.above:.3f}, and chain.window"
                f" begins at {first:.3f}: its frozen steps can't be trained, so begin the window"
                " later"
            )


def expert_remark(model: Model) -> str | None:
    """A line for the person where a second network of the policy stays as it is; None elsewhere."""
    if model.learns_from == 0:
        return None
    return (
        "this pipeline has two denoisers (Wan 2.2's experts): only the one of noise times from"
        f" {model.learns_from:g} on learns; below, the second denoises and stays as it is"
    )


def _require_learned(policy: ChainPolicy) -> None:
    """Raise `ConfigError` where at a step of the window another network than the one that learns
    denoises.
    """
    window, lowest = policy.chain.stochastic, policy.model.learns_from
    learned = [k for k in window if float(policy.chain.grid[k].max()) >= lowest]
    if len(learned) == len(window):
        return
    k = next(k for k in window if k not in learned)
    advice = (
        f"end chain.window there, [{window.start}, {k}]"
        if learned
        else "begin chain.window in the noisier steps, or take more chain.steps"
    )
    raise ConfigError(
        f"below noise time {lowest:g} a second network of this pipeline denoises, which does not"
        f" learn, and step {k} of chain.window is at {float(policy.chain.grid[k].max()):.3f}:"
        f" {advice}"
    )


def _require_density(name: str, policy: ChainPolicy) -> None:
    for k in policy.chain.stochastic:
        if policy.noise is None and float(policy.std(k)) == 0:
            raise ConfigError(
                f"step {k} of the window is deterministic (std 0) under kernel"
                f" {policy.chain.kernel}: method {name} needs likelihoods and can't train it; use"
                " ddim with eta > 0, sde or cps, or another window"
            )
    if policy.refiner is not None:
        raise ConfigError(
            f"the policy's actions are refined by gradient steps and have no likelihood, which"
            f" method {name} needs"
        )

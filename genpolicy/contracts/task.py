"""Tasks: what a policy is asked to do. A prompt is a task of horizon 1; an environment is one of
many decisions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from genpolicy.config.errors import ConfigError

Observation = Mapping[str, Tensor]
"""LeRobot's names ("observation.state", "observation.images.top", ...) -> Float[B,history,*shape],
the oldest frame first; images are [C,H,W] in [0,1].
"""


@dataclass(frozen=True)
class Context:
    """The questions to B rows: their prompts (for robots: instructions),
    and what the robot sees.
    """

    prompts: Sequence[str]
    observation: Observation = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: slice | Tensor) -> "Context":
        index = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
        return Context(
            [self.prompts[row] for row in index],
            {name: value[rows] for name, value in self.observation.items()},
        )

    @classmethod
    def cat(cls, contexts: Sequence["Context"]) -> "Context":
        """The rows of several contexts, one after the other."""
        prompts = [prompt for context in contexts for prompt in context.prompts]
        names = contexts[0].observation
        return cls(
            prompts, {name: torch.cat([c.observation[name] for c in contexts]) for name in names}
        )


class TaskError(ValueError):
    """The answer of a task that can't be learned from (not a finite number), or none at all."""


@runtime_checkable
class Task(Protocol):
    """Episodes by number. The same number is the same episode on any machine and any number of
    processes.
    """

    def reset(self, episodes: range) -> Context:
        """Begin the given episodes: their prompts, one row each."""
        ...


@dataclass(frozen=True)
class TaskStep:
    """The outcome of one decision (a chunk of up to T actions) in n environments.

    context: what is seen after it, n rows; where the episode ended, its final observation. rewards
    [n,T]: of each environment step, 0 after the end. executed [n]: how many of the T actions were
    taken. terminated [n]: the episode ended by itself (nothing comes after); truncated [n]: it was
    cut by the time limit (never both). success [n]: the task's own verdict so far.
    Where a person can take over: actions [n,T,D] as executed (behind ``executed`` the rest of the
    robot's plan, or the person's last one again), and human [n,T], the steps that the person took;
    None elsewhere.
    """

    context: Context
    rewards: Tensor
    executed: Tensor
    terminated: Tensor
    truncated: Tensor
    success: Tensor
    actions: Tensor | None = None
    human: Tensor | None = None


class Environments(Protocol):
    """Environments side by side in numbered slots, each in its own episode."""

    count: int

    def reset(self, slots: Sequence[int], seeds: Sequence[int]) -> Context:
        """Begin an episode in each of the slots; the same seed is the same episode, whatever ran in
        the slot before.
        """
        ...

    def step(self, slots: Sequence[int], actions: Tensor) -> TaskStep:
        """Take the actions Float[n,T,D] of the n slots,
        each until its chunk or its episode ends.
        """
        ...

    def render(self, slot: int) -> Any:
        """The picture of a camera, uint8 [H,W,3]; raises `genpolicy.config.errors.RenderError`
        with one sentence where there is none.
        """
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


@dataclass(frozen=True)
class Demonstration:
    """One recorded episode, often of somebody who knows the task, of L steps: observation name ->
    [L,*shape] (what was seen before each action; pictures in [0,1], or bytes), actions [L,D] as
    executed, rewards [L], and whether it succeeded. All fp32 on the CPU.

    instruction: what was asked, in words; None: what the task says. columns: what else is recorded
    of every step, name -> [L,*shape].
    """

    observation: Mapping[str, Tensor]
    actions: Tensor
    rewards: Tensor
    success: bool
    instruction: str | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class ControlTask(Protocol):
    """A task of many decisions: environments that a policy acts in.

    shapes: of what is seen, by LeRobot's names. action_dim: D. action_low, action_high: the limits
    to which the environments clip actions, [D], infinite where there is none. limit: environment
    steps after which an episode is cut. fps: environment steps a second of the robot's time.
    instruction: what is asked, in words. has_success: whether the task itself says what success is
    (else there are only returns).
    """

    shapes: Mapping[str, tuple[int, ...]]
    action_dim: int
    action_low: list[float]
    action_high: list[float]
    limit: int
    fps: int
    instruction: str
    has_success: bool

    def environments(self, count: int, history: int) -> Environments:
        """``count`` environments whose observations carry the last ``history`` frames (the first
        one repeated).
        """
        ...

    def demonstrate(self, seed: int, noise: float) -> Demonstration:
        """An expert's episode from this reset seed, with Gaussian ``noise`` (std) on its actions.
        Raises `ValueError` with one sentence where the task has no expert.
        """
        ...


class Person(Protocol):
    """One who can do a task and sees what the robot sees, for the length of an episode."""

    def act(self, context: Context) -> Tensor:
        """The next action Float[D], for what is seen (one row)."""
        ...

    def progress(self, context: Context) -> float:
        """The progress of the task, for what is seen (one row); more is better."""
        ...


@runtime_checkable
class Attended(Protocol):
    """A `ControlTask` beside which a person can stand."""

    action_low: list[float]
    action_high: list[float]

    def person(self) -> Person:
        """A new person, for one episode. Raises `ConfigError` where what is shown is not enough to
        act on.
        """
        ...


def is_control(task: Task | ControlTask) -> TypeGuard[ControlTask]:
    """True where a task has environments to act in; otherwise it is prompts, judged by the run's
    reward. Raises `ConfigError` where it lacks a part of both.
    """
    if isinstance(task, ControlTask):
        return True
    if not isinstance(task, Task):
        raise ConfigError(
            f"task {type(task).__name__} is neither one of prompts (it has no reset) nor whole as"
            " one of environments, which has all that genpolicy.contracts.task.ControlTask names"
        )
    return False


def read_prompts(path: str) -> tuple[str, ...]:
    """The non-empty lines of a prompt file.
    Raises with one sentence if it is missing or has none.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"prompt file {path} does not exist")
    lines = tuple(
        line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()
    )
    if not lines:
        raise ValueError(f"prompt file {path} has no prompts: it needs one a line")
    return lines

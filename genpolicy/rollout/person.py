"""A person who watches a policy act, takes over by a rule stated beforehand, and hands back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genpolicy.config.errors import ConfigError, at_least, share
from genpolicy.contracts.task import (
    Attended,
    Context,
    ControlTask,
    Environments,
    Person,
    TaskStep,
)


@dataclass(frozen=True)
class Intervention:
    """The rule by which a person takes over and hands back; `ConfigError` for what is no rule.

    Progress is a step after which `Person.progress` exceeds the episode's best so far by ``gain``.
    """

    # environment steps of the robot without progress, after which the person takes over; ours
    patience: int = 30
    # steps of progress by the person, in one take-over, after which the robot acts again; 0: the
    # person keeps the rest of the episode; ours
    hand_back: int = 0
    # the least rise of the best progress that counts, in the task's unit (metres); ours
    gain: float = 0.01
    # std of the Gaussian noise on the person's actions, in the environment's units
    noise: float = 0.0
    # share of the start states whose episodes are watched
    share: float = 1.0

    def __post_init__(self) -> None:
        at_least("person", self, patience=1, hand_back=0, gain=0, noise=0)
        share("person", self, "share")


def attended(task: object) -> Attended:
    """The task, of which a person knows enough to take over; `ConfigError` for any other."""
    if not isinstance(task, Attended):
        raise ConfigError(
            f"person: task {type(task).__name__} has no expert who can take over step by step;"
            " metaworld has one where it shows its state"
        )
    task.person()  # says now what it lacks
    return task


@dataclass
class _Watch:
    """The state of one slot's episode."""

    person: Person
    seed: int
    watched: bool
    view: Context  # what is seen now, one row
    best: float  # progress, the largest so far
    taken: int = 0  # environment steps so far
    idle: int = 0  # the robot's steps since its last progress, or since it was handed back to
    gains: int = 0  # the person's steps of progress in this take-over
    acts: bool = False  # the person acts


class Watched:
    """Environments with a person beside them, who acts in the policy's place by an `Intervention`.

    A chunk is carried out action by action. Where the person takes over, the robot's decision ends
    early: its `TaskStep.executed` counts its own steps, and it is neither terminated nor truncated.
    The decisions that follow are the person's, whatever the policy planned, of up to T steps each,
    until the person hands back or the episode ends; so no decision mixes the two. Every answer says
    what was executed (``actions``) and by whom (``human``).

    An episode is a function of its seed and of the actions asked for: the person's noise, and which
    episodes are watched, are drawn from the reset seed (members of one start share both).
    Raises `ConfigError` for a task that has no person.
    """

    def __init__(
        self, environments: Environments, task: ControlTask, settings: Intervention
    ) -> None:
        self.count = environments.count
        self._environments = environments
        self._task = attended(task)
        self._settings = settings
        self._low = torch.tensor(task.action_low)
        self._high = torch.tensor(task.action_high)
        self._watch: dict[int, _Watch] = {}

    def reset(self, slots: Sequence[int], seeds: Sequence[int]) -> Context:
        context = self._environments.reset(slots, seeds)
        for row, (slot, seed) in enumerate(zip(slots, seeds, strict=True)):
            person = self._task.person()
            view = context[row : row + 1]
            watched = _draws(seed, 0).random() < self._settings.share
            self._watch[slot] = _Watch(person, seed, watched, view, person.progress(view))
        return context

    def step(self, slots: Sequence[int], actions: Tensor) -> TaskStep:
        n, length = actions.shape[:2]
        done = actions.clone()
        rewards = torch.zeros(n, length)
        human = torch.zeros(n, length, dtype=torch.bool)
        executed = torch.zeros(n, dtype=torch.long)
        terminated, truncated, success = (torch.zeros(n, dtype=torch.bool) for _ in range(3))
        watches = [self._watch[slot] for slot in slots]
        begun = [watch.acts for watch in watches]
        going = list(range(n))  # the rows whose decision goes on
        for j in range(length):
            if not going:
                break
            for row in going:
                if begun[row]:
                    done[row, j] = self._act(watches[row])
            rows = torch.tensor(going)
            step = self._environments.step([slots[row] for row in going], done[rows, j : j + 1])
            rewards[rows, j] = step.rewards[:, 0]
            executed[rows] = j + 1
            terminated[rows] = step.terminated
            truncated[rows] = step.truncated
            success[rows] = step.success
            over = (step.terminated | step.truncated).tolist()
            for place, row in enumerate(going):
                human[row, j] = begun[row]
                self._judge(watches[row], step.context[place : place + 1])
            going = [
                row
                for row, ended in zip(going, over, strict=True)
                if not ended and watches[row].acts == begun[row]
            ]
        # behind what was executed a person's last action stands again, and the robot's plan stays
        last = torch.where(human.any(1), executed - 1, length)[:, None]
        held = torch.arange(length).expand(n, -1).minimum(last)
        done = done.gather(1, held[..., None].expand_as(done))
        seen = Context.cat([watch.view for watch in watches])
        return TaskStep(seen, rewards, executed, terminated, truncated, success, done, human)

    def render(self, slot: int) -> Any:
        return self._environments.render(slot)

    def close(self) -> None:
        self._environments.close()

    def _act(self, watch: _Watch) -> Tensor:
        """The person's next action [D], within the limits."""
        action = watch.person.act(watch.view).clamp(self._low, self._high)
        if self._settings.noise:
            drawn = _draws(watch.seed, 1 + watch.taken).standard_normal(len(action))
            action = action + self._settings.noise * torch.from_numpy(drawn).float()
        return action.clamp(self._low, self._high)

    def _judge(self, watch: _Watch, view: Context) -> None:
        """Looks at what a step came to, and lets the person take over or hand back."""
        watch.view = view
        watch.taken += 1
        now = watch.person.progress(view)
        gained = now > watch.best + self._settings.gain
        if gained:
            watch.best = now
        if watch.acts:
            watch.gains += gained
            if self._settings.hand_back and watch.gains >= self._settings.hand_back:
                watch.acts = False
                watch.idle = 0
        else:
            watch.idle = 0 if gained else watch.idle + 1
            if watch.watched and watch.idle >= self._settings.patience:
                watch.acts = True
                watch.gains = 0


def takeovers(human: Tensor, first: Tensor) -> Tensor:
    """True where a person takes over: bool [R] of decisions with their steps ``human`` [R,T], of
    which ``first`` [R] begin an episode.
    """
    theirs = human.any(1)
    return theirs & (first | ~theirs.roll(1))


def _draws(seed: int, place: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, place], np.uint64)))

"""Episodes that go on from any of their moments.

A moment is reached again by its reset seed and the actions that led there, which is exact to the
bit. The simulator's positions and velocities are not its whole state: contacts, the mocap body and
what MetaWorld remembers in Python belong to it, and its environments can't be copied.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genpolicy.chain import Noise
from genpolicy.contracts.task import Context, TaskStep
from genpolicy.learning.critic import bellman_target
from genpolicy.policy.policy import ChainPolicy
from genpolicy.rollout.episodes import Decision, play
from genpolicy.tasks._environments import Environments
from genpolicy.tasks._slots import Frame, Simulation

SLOTS = 20
"""Simulations side by side."""


@dataclass(frozen=True)
class Moment:
    """A moment of an episode: its reset seed, and the actions [D] that led there."""

    seed: int
    actions: tuple[Tensor, ...] = ()

    def after(self, actions: Tensor) -> "Moment":
        """The moment after some more actions, [n,D]."""
        return Moment(self.seed, (*self.actions, *actions))


class Resumed:
    """A `genpolicy.tasks._slots.Simulation` that begins at moments: `reset` with seed n goes to the
    n-th. An episode is cut ``limit`` environment steps after its own beginning.
    """

    def __init__(
        self, make: Callable[[], Simulation], moments: Sequence[Moment], limit: int
    ) -> None:
        self._simulation, self._moments, self._limit = make(), moments, limit
        self.action_space = self._simulation.action_space

    def reset(self, *, seed: int) -> tuple[Frame, dict[str, Any]]:
        moment = self._moments[seed]
        frame, info = self._simulation.reset(seed=moment.seed)
        space = self.action_space
        for action in moment.actions:
            clipped = action.numpy().clip(space.low, space.high)
            frame, _, _, _, info = self._simulation.step(clipped)
        self._left = self._limit - len(moment.actions)
        return frame, info

    def step(self, action: np.ndarray) -> tuple[Frame, float, bool, bool, dict[str, Any]]:
        frame, reward, ended, cut, info = self._simulation.step(action)
        self._left -= 1
        return frame, reward, ended, cut or not self._left, info

    def render(self) -> np.ndarray:
        return self._simulation.render()

    def close(self) -> None:
        self._simulation.close()


class World:
    """Environments that go on from any moment of an episode."""

    def __init__(self, make: Callable[[], Simulation], limit: int, count: int = SLOTS) -> None:
        self._moments: list[Moment] = []
        self._environments = Environments(
            lambda: Resumed(make, self._moments, limit), count, 1, limit, ""
        )

    def play(
        self, policy: ChainPolicy, moments: Sequence[Moment], noise: Noise, gamma: float
    ) -> tuple[Tensor, Tensor]:
        """Success and discounted return of an episode from each moment on, both [E] fp64."""
        success = torch.zeros(len(moments), dtype=torch.float64)
        returns, discount = torch.zeros_like(success), torch.ones_like(success)
        for decision in self.decisions(policy, moments, noise):
            rows, step = decision.episode, decision.step
            returns[rows] += discount[rows] * gained(step, gamma)
            discount[rows] *= gamma ** step.executed.double()
            success[rows] = step.success.double()
        return success, returns

    def decisions(
        self, policy: ChainPolicy, moments: Sequence[Moment], noise: Noise
    ) -> Iterator[Decision]:
        """The decisions of an episode from each moment on, as `play` yields them."""
        self._moments[:] = moments
        numbers = range(len(moments))
        return play(policy, self._environments, numbers, noise, keep=(0, 0))

    def carry_out(self, moments: Sequence[Moment], actions: Tensor) -> TaskStep:
        """One chunk [n,T,D] from each of the moments."""
        self._moments[:] = moments
        steps = []
        for part in torch.arange(len(moments)).split(self._environments.count):
            slots = list(range(len(part)))
            self._environments.reset(slots, part.tolist())
            steps.append(self._environments.step(slots, actions[part]))
        names = ("rewards", "executed", "terminated", "truncated", "success")
        joined = {name: torch.cat([getattr(step, name) for step in steps]) for name in names}
        return TaskStep(Context.cat([step.context for step in steps]), **joined)

    def close(self) -> None:
        """Gives everything back."""
        self._environments.close()


def gained(step: TaskStep, gamma: float) -> Tensor:
    """The discounted rewards of a decision, [n] fp64."""
    over = torch.ones_like(step.terminated)
    nothing = torch.zeros(len(over), dtype=torch.float64)
    return bellman_target(step.rewards, step.executed, over, nothing, gamma)

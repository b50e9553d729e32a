"""Simulations side by side in one process, in numpy: processes that only simulate never import
torch (3 s and half a gigabyte each).
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from genpolicy.config.errors import RenderError

Frame = Mapping[str, np.ndarray]
"""The observation of one moment: float32 in raw units, images uint8 [C,H,W]."""


class Simulation(Protocol):
    """One simulated world, as Gymnasium has it, with `Frame` observations and info["success"]."""

    action_space: Any

    def reset(self, *, seed: int) -> tuple[Frame, dict[str, Any]]: ...

    def step(self, action: np.ndarray) -> tuple[Frame, float, bool, bool, dict[str, Any]]: ...

    def render(self) -> np.ndarray: ...

    def close(self) -> None: ...


class Taken(NamedTuple):
    """A `genpolicy.contracts.task.TaskStep` in numpy; seen: name -> [n,history,*shape]."""

    seen: dict[str, np.ndarray]
    rewards: np.ndarray
    executed: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    success: np.ndarray


class Slots:
    """``count`` simulations of one process, each with its last ``history`` frames and its count of
    steps.
    """

    def __init__(
        self, make: Callable[[], Simulation], count: int, history: int, limit: int
    ) -> None:
        self._simulations = [make() for _ in range(count)]
        self._frames: list[deque[Frame]] = [deque(maxlen=history) for _ in range(count)]
        self._left = [0] * count  # environment steps until the limit; 0 once the episode has ended
        self._success = [False] * count
        self._history = history
        self._limit = limit
        space = self._simulations[0].action_space
        self._low, self._high = space.low, space.high

    def reset(self, slots: Sequence[int], seeds: Sequence[int]) -> dict[str, np.ndarray]:
        for slot, seed in zip(slots, seeds, strict=True):
            frame, _ = self._simulations[slot].reset(seed=seed)
            self._frames[slot].extend([frame] * self._history)
            self._left[slot] = self._limit
            self._success[slot] = False
        return self._seen(slots)

    def step(self, slots: Sequence[int], actions: np.ndarray) -> Taken:
        n, length = actions.shape[:2]
        if actions.shape[2:] != self._low.shape:
            raise ValueError(
                f"an action has {actions.shape[2]} numbers; this environment takes {self._low.size}"
            )
        actions = actions.clip(self._low, self._high)
        rewards, executed = np.zeros((n, length), np.float32), np.zeros(n, np.int64)
        terminated = np.zeros(n, bool)
        truncated = np.zeros(n, bool)
        for row, slot in enumerate(slots):
            if not self._left[slot]:
                raise ValueError(
                    "an environment was stepped whose episode has ended or not begun; "
                    "reset it first"
                )
            for place in range(length):
                frame, reward, ended, cut, info = self._simulations[slot].step(actions[row, place])
                self._frames[slot].append(frame)
                self._left[slot] -= 1
                self._success[slot] = self._success[slot] or bool(info["success"])
                rewards[row, place] = reward
                executed[row] += 1
                if ended or cut or not self._left[slot]:
                    terminated[row] = ended
                    truncated[row] = not ended
                    self._left[slot] = 0
                    break
        success = np.array([self._success[slot] for slot in slots])
        return Taken(self._seen(slots), rewards, executed, terminated, truncated, success)

    def render(self, slot: int) -> np.ndarray:
        try:
            return self._simulations[slot].render()
        except RenderError:
            raise
        except Exception as error:  # of whichever graphics library the simulation draws with
            raise RenderError(
                f"this environment can't be drawn here: {' '.join(str(error).split())}"
            ) from error

    def close(self) -> None:
        for simulation in self._simulations:
            simulation.close()

    def ask(self, verb: str, *arguments: Any) -> Callable[[], Any]:
        """Does the same as `Worker.ask`, but works when the answer is wanted."""
        return partial(getattr(self, verb), *arguments)

    def _seen(self, slots: Sequence[int]) -> dict[str, np.ndarray]:
        names = self._frames[slots[0]][0]
        return {
            name: np.array([[f[name] for f in self._frames[slot]] for slot in slots])
            for name in names
        }

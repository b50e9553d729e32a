"""A cart that a task's expert drives to 0: what the tests record instead of a simulator."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genpolicy.contracts.task import Context, Demonstration, TaskStep

STATE, CAMERA = "observation.state", "observation.images.top"


@dataclass
class Cart:
    """The state is (place, steps so far); an action is a displacement, within .1.
    Success: |place| < .05.
    """

    camera: bool = False
    limit: int = 12
    clumsy: bool = False
    expert: bool = True

    def __post_init__(self) -> None:
        self.shapes: Mapping[str, tuple[int, ...]] = {STATE: (2,)} | (
            {CAMERA: (3, 4, 6)} if self.camera else {}
        )
        self.action_dim, self.fps, self.instruction = 1, 10, "go to the middle"
        self.action_low, self.action_high = [-0.1], [0.1]
        self.has_success = True

    def environments(self, count: int, history: int) -> "Carts":
        return Carts(self, count, history)

    def demonstrate(self, seed: int, noise: float) -> Demonstration:
        if not self.expert:
            raise ValueError("task cart has no expert")
        generator, at = np.random.default_rng(seed), start(seed)
        seen, actions, success = [], [], False
        while not success and len(actions) < self.limit:
            action = (
                0.0
                if self.clumsy
                else float(np.clip(-at + noise * generator.standard_normal(), -0.1, 0.1))
            )
            seen.append([at, len(actions)])
            actions.append([action])
            at += action
            success = abs(at) < 0.05
        states = torch.tensor(seen, dtype=torch.float32)
        pictures = (
            {CAMERA: states[:, :1, None, None].abs().expand(-1, 3, 4, 6)} if self.camera else {}
        )
        rewards = torch.zeros(len(actions))
        rewards[-1] = success
        return Demonstration({STATE: states, **pictures}, torch.tensor(actions), rewards, success)


def start(seed: int) -> float:
    return float(np.random.default_rng([seed, 7]).uniform(0.2, 1.2))


class Carts:
    """`Cart`s side by side."""

    def __init__(self, cart: Cart, count: int, history: int) -> None:
        self.cart, self.count, self.history = cart, count, history
        self.seen: dict[int, list[list[float]]] = {}

    def reset(self, slots: Sequence[int], seeds: Sequence[int]) -> Context:
        for slot, seed in zip(slots, seeds, strict=True):
            self.seen[slot] = [[start(seed), 0.0]] * self.history
        return self._context(slots)

    def step(self, slots: Sequence[int], actions: Tensor) -> TaskStep:
        n, T = actions.shape[:2]
        rewards, executed = torch.zeros(n, T), torch.zeros(n, dtype=torch.long)
        terminated, truncated = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
        for row, slot in enumerate(slots):
            for j in range(T):
                at, steps = self.seen[slot][-1]
                at, steps = at + float(actions[row, j].clamp(-0.1, 0.1)), steps + 1
                self.seen[slot] = [*self.seen[slot][1:], [at, steps]]
                executed[row] += 1
                rewards[row, j] = terminated[row] = abs(at) < 0.05
                truncated[row] = not terminated[row] and steps == self.cart.limit
                if terminated[row] or truncated[row]:
                    break
        return TaskStep(
            self._context(slots), rewards, executed, terminated, truncated, terminated.clone()
        )

    def render(self, slot: int) -> Any:
        raise ValueError("a cart has no camera here")

    def close(self) -> None:
        self.seen.clear()

    def _context(self, slots: Sequence[int]) -> Context:
        return Context(
            [self.cart.instruction] * len(slots),
            {STATE: torch.tensor([self.seen[slot] for slot in slots])},
        )

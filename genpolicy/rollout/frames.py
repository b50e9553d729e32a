"""Frames: what a robot saw before each single action, where a recorder keeps only what was seen at
its decisions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from genpolicy.contracts.task import Context, Environments, TaskStep
from genpolicy.rollout.episodes import singly

PICTURES = "observation.image"
"""The beginning of the names of pictures."""


class FrameByFrame:
    """Environments that carry chunks out action by action, with the same result as at once, and
    keep the frames of the episode in each slot.
    """

    def __init__(self, environments: Environments) -> None:
        self.count, self._world = environments.count, environments
        self._now: dict[int, Context] = {}
        self._kept: dict[int, list[dict[str, Tensor]]] = {}

    def frames(self, slot: int) -> dict[str, Tensor]:
        """Returns what was seen before each of the L actions of a slot's episode, oldest first:
        name -> [L,*shape], pictures as bytes.
        """
        kept = self._kept[slot]
        return {name: torch.stack([frame[name] for frame in kept]) for name in kept[0]}

    def reset(self, slots: Sequence[int], seeds: Sequence[int]) -> Context:
        """See `Environments`."""
        context = self._world.reset(slots, seeds)
        for row, slot in enumerate(slots):
            self._now[slot] = context[row : row + 1]
            self._kept[slot] = []
        return context

    def step(self, slots: Sequence[int], actions: Tensor) -> TaskStep:
        """See `Environments`."""
        seen = Context.cat([self._now[slot] for slot in slots])
        step = singly(self._world, slots, slots, seen, actions, self._keep)
        for row, slot in enumerate(slots):
            self._now[slot] = step.context[row : row + 1]
        return step

    def render(self, slot: int) -> Any:
        """See `Environments`."""
        return self._world.render(slot)

    def close(self) -> None:
        """See `Environments`."""
        self._world.close()

    def _keep(
        self,
        slots: Sequence[int],
        _playing: Sequence[int],
        seen: Context,
        _action: Tensor,
        _step: TaskStep,
    ) -> None:
        for row, slot in enumerate(slots):
            self._kept[slot].append(_small(seen.observation, row))


def _small(observation: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    """The newest frame of a row; pictures in [0,1] as bytes."""
    newest = {name: value[row, -1] for name, value in observation.items()}
    return {
        name: (value * 255).round().byte() if name.startswith(PICTURES) else value.clone()
        for name, value in newest.items()
    }

"""Noise as a pure function of where it is used: never a shared stream.

This is what makes one process equal two, any batch split equal another, and a resumed run equal an
uninterrupted one.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

PRIOR = -1
"""The ``k`` of the draw that starts a chain."""
TRUNK = -1
"""The ``member`` of the rows that a whole group shares (a common start, the trunk before a branch).
"""

FAN = 1 << 32
"""The distance between the members of a row's fan: more than a group ever has."""

WORD = 1 << 64
"""The number of values that a word of the counter or of the key has: 64 bits."""


@dataclass(frozen=True)
class Noise:
    """Standard normal noise(seed, iteration, group, member, decision, k), drawn per row.

    group, member [B] name the rows, and with environments so does the ``decision`` h of their
    episode. Philox is a counter-based generator: (seed, iteration) is its key and (member, group,
    (h, k)) the upper three words of its counter, so that two different names can't share a stretch
    of the stream.
    """

    seed: int
    iteration: int
    group: Tensor
    member: Tensor
    decision: Tensor | None = None

    @classmethod
    def rows(cls, seed: int, iteration: int, groups: Tensor, members: int) -> "Noise":
        """Noise for ``groups`` [M] of ``members`` = N rows each, group-major: B = M N."""
        member = torch.arange(members).repeat(len(groups))
        return cls(seed, iteration, groups.repeat_interleave(members), member)

    def __len__(self) -> int:
        return len(self.group)

    def __getitem__(self, index: Tensor | slice) -> "Noise":
        decision = None if self.decision is None else self.decision[index]
        return Noise(self.seed, self.iteration, self.group[index], self.member[index], decision)

    def at(self, decision: Tensor) -> "Noise":
        """The same rows at decision h [B] of their episodes."""
        return replace(self, decision=decision)

    def fan(self, width: int) -> "Noise":
        """``width`` rows for each, with draws of their own: [B width]. The first of a row's are the
        row's own draws.
        """
        every = torch.arange(len(self)).repeat_interleave(width)
        within = torch.arange(width).repeat(len(self))
        rows = self[every]
        return replace(rows, member=rows.member + FAN * within)

    def trunk(self, members: int) -> "Noise":
        """One row per group of ``members`` consecutive rows, drawn independently of all of them: [B
        / members].
        """
        first = self[::members]
        return replace(first, member=torch.full_like(first.group, TRUNK))

    def __call__(
        self, k: int, shape: tuple[int, ...], device: torch.device | str = "cpu"
    ) -> Tensor:
        """[B,*shape] fp32 standard normal for step ``k`` (``PRIOR`` for the start of the chain)."""
        draws = np.empty((len(self), *shape), dtype=np.float32)
        decision = torch.zeros_like(self.group) if self.decision is None else self.decision
        names = zip(*map(_integers, (self.group, self.member, decision)), strict=True)
        # One generator for all rows, set to each row's counter: a new one costs ten times that.
        philox = np.random.Philox(key=0)
        draw = np.random.Generator(philox).standard_normal
        # Plain integers are read faster than arrays of them.
        state: Any = philox.state
        state["buffer"] = state["buffer"].tolist()
        words: dict[str, tuple[int, ...]] = {"key": (self.seed % WORD, self.iteration % WORD)}
        state["state"] = words
        for row, (group, member, h) in enumerate(names):
            step = (h << 32) + k + 1
            words["counter"] = (0, (member + 1) % WORD, group % WORD, step % WORD)
            philox.state = state
            draw(dtype=np.float32, out=draws[row])
        return torch.as_tensor(draws).to(device)


def _integers(values: Tensor) -> list[int]:
    return values.tolist()  # type: ignore[no-any-return]

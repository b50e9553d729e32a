"""Samples of a policy at recorded views, drawn once for each version of the policy."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from genpolicy.methods.parts.offline_data import Experience
from genpolicy.training.run import Run

AT_ONCE = 4096
"""Samples that are drawn together."""


class CachedSamples:
    """N samples of the policy at every view of a replay, without its critic's choice.

    A critic's targets ask for them again and again, and a chain of K steps costs K evaluations each
    time (PA-RL, arXiv 2412.06685, keeps them likewise). They are drawn where they are first asked
    for, recording by recording, so that a run that is resumed draws the same ones to the bit. The
    version, the iteration in which the policy last changed, is saved and resumed with the run.

    A view's samples follow from run, version and view alone. Call `renew` whenever the policy has
    changed and before anything is asked for again.
    """

    def __init__(self, run: Run, experience: Experience, count: int) -> None:
        self.run, self.experience, self.count = run, experience, count
        self.version = 0
        self._drawn: list[Tensor] = []
        self._all: Tensor | None = None
        run.register(cached_samples=self)

    def renew(self) -> None:
        """Forgets the samples of the policy as it was."""
        self.version = self.run.iteration
        self._drawn, self._all = [], None

    def at(self, views: Tensor) -> Tensor:
        """The samples at the views [b] of the replay, Float[b,N,*E]."""
        parts = self.experience.learned
        if self._all is None or len(self._drawn) < len(parts):
            while len(self._drawn) < len(parts):
                begin = sum(map(len, self._drawn))
                self._drawn.append(self._draw(begin, begin + len(parts[len(self._drawn)].views)))
            self._all = torch.cat(self._drawn)
        return self._all[views]

    @torch.no_grad()
    def _draw(self, begin: int, end: int) -> Tensor:
        """The samples at the views from ``begin`` to ``end``."""
        run, count = self.run, self.count
        policy = replace(run.policy, best_of=1, refiner=None)
        conditions = self.experience.conditions
        rows = torch.arange(begin, end).repeat_interleave(count)
        member = torch.arange(count).repeat(end - begin)
        noise = run.noise("cached samples", rows, iteration=self.version)
        noise = replace(noise, member=member)
        found = [
            policy.sample(conditions[rows[part]], noise[part], keep=(0, 0)).x0
            for part in torch.arange(len(rows)).split(AT_ONCE)
        ]
        return torch.cat(found).unflatten(0, (end - begin, count))

    def state_dict(self) -> dict[str, Any]:
        return {"version": self.version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.version = state["version"]
        self._drawn, self._all = [], None

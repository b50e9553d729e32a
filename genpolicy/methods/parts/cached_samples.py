"""Samples of a policy at recorded views, drawn once for each version of the policy."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from genpolicy.chain import Condition, Noise
from genpolicy.methods.parts.offline_data import Experience
from genpolicy.policy.policy import ChainPolicy
from genpolicy.rollout.micro_batch import recount
from genpolicy.training.run import Run

AT_ONCE = 4096
"""Samples that are drawn by one of the processes, together where memory allows,"""
SHARED = 256
"""and of samples that are drawn for a few views, of which several processes have a share."""


class CachedSamples:
    """N samples of the policy at every view of a replay, without its critic's choice.

    A critic's targets ask for them again and again, and a chain of K steps costs K evaluations each
    time (PA-RL, arXiv 2412.06685, keeps them likewise). They are drawn where they are first asked
    for, recording by recording, so that a run that is resumed draws the same ones to the bit. The
    version, the iteration in which the policy last changed, is saved and resumed with the run.

    counted: of so many recordings the evaluations were counted already.

    A view's samples follow from run, version and view alone. Call `renew` whenever the policy has
    changed and before anything is asked for again.
    """

    def __init__(
        self,
        run: Run,
        experience: Experience,
        count: int,
        draws: Callable[[], ChainPolicy] | None = None,
    ) -> None:
        """draws: the policy that draws, by default the run's, without its critic's choice."""
        self.run, self.experience, self.count = run, experience, count
        self.draws = draws or (lambda: run.policy)
        self.version = self.counted = 0
        self._forget()
        run.register(cached_samples=self)

    def renew(self) -> None:
        """Forgets the samples of the policy as it was."""
        self.version, self.counted = self.run.iteration, 0
        self._forget()

    def fresh(self, views: Tensor) -> Tensor:
        """The samples at the views [b] of the replay, drawn now for these alone, each once,
        Float[b,N,*E].
        """
        model, replay = self.run.policy.model, self.experience.replay
        asked, place = views.unique(return_inverse=True)
        return self._draw(model.encode(replay.views[asked]), asked, each=SHARED)[0][place]

    def _forget(self) -> None:
        self._drawn: list[tuple[Tensor, Tensor]] = []
        self._all: tuple[Tensor, Tensor] | None = None

    def at(self, views: Tensor) -> Tensor:
        """The samples at the views [b] of the replay, Float[b,N,*E]."""
        return self._whole()[0][views]

    def starts(self, views: Tensor) -> Tensor:
        """The noise that each of them was drawn from, Float[b,N,*E]."""
        return self._whole()[1][views]

    def _whole(self) -> tuple[Tensor, Tensor]:
        parts = self.experience.learned
        if self._all is None or len(self._drawn) < len(parts):
            while len(self._drawn) < len(parts):
                begin = sum(len(x0) for x0, _ in self._drawn)
                model, counted = self.run.policy.model, self.run.policy.model.evaluations
                views = torch.arange(begin, begin + len(parts[len(self._drawn)].views))
                conditions = self.experience.conditions[views]
                self._drawn.append(self._draw(conditions, views, len(self._drawn)))
                if len(self._drawn) <= self.counted:  # before the run was stopped
                    model.evaluations = counted
            self.counted = len(self._drawn)
            x0, start = zip(*self._drawn, strict=True)
            self._all = torch.cat(x0), torch.cat(start)
        return self._all

    @torch.no_grad()
    def _draw(
        self, conditions: Condition, views: Tensor, first: int = 0, each: int = AT_ONCE
    ) -> tuple[Tensor, Tensor]:
        """The samples at views [b], which are seen as ``conditions`` [b], and their starts. first:
        the number of the process that begins. each: samples that one of them draws in its turn.
        """
        count, policy = self.count, replace(self.draws(), best_of=1, refiner=None)
        rows = torch.arange(len(views)).repeat_interleave(count)
        member = torch.arange(count).repeat(len(views))
        noise = self.run.noise("cached samples", views[rows], iteration=self.version)
        noise = replace(noise, member=member)
        processes, model = self.run.processes, policy.model
        drawn = torch.zeros(2, len(rows), *model.event_shape, device=model.device)
        for number, part in enumerate(torch.arange(len(rows)).split(each), first):
            if number % processes.count == processes.index:
                condition, own = conditions[rows[part]], noise[part]

                def sampled(
                    some: slice, condition: Condition = condition, own: Noise = own
                ) -> Tensor:
                    found = policy.sample(condition[some], own[some], keep=(0, 0))
                    assert found.start is not None
                    return torch.stack([found.x0, found.start / policy.chain.scale])

                fits = self.run.micro_batches
                drawn[:, part] = torch.cat(fits(sampled, len(part), 1, recount(policy)), 1)
        x0, start = processes.reduce(drawn).unflatten(1, (len(views), count))
        return x0, start

    def state_dict(self) -> dict[str, Any]:
        return {"version": self.version, "counted": self.counted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.version, self.counted = state["version"], state["counted"]
        self._forget()

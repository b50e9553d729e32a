"""The states at which a student is taught: prompts, recorded observations, or what is seen where
the student or its teacher acts.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from genpolicy.config.errors import ConfigError, at_least, choice
from genpolicy.contracts.task import Context, is_control
from genpolicy.methods.parts.offline_data import Experience
from genpolicy.rollout.examples import examples
from genpolicy.training.run import Run

Actor = Literal["student", "teacher"]


@dataclass
class Visits:
    """Episodes that are played to see what there is to teach at (robots). The defaults are ours."""

    # episodes per iteration; all that were seen so far are taught at, with the recorded ones
    episodes: int = 0
    # who acts: the student meets the states that it will meet (DAgger, arXiv 1011.0686)
    actor: Actor = "student"

    def __post_init__(self) -> None:
        at_least("method: visits", self, episodes=0)
        choice("method: visits: actor", self.actor, ["student", "teacher"])


class Observations:
    """Draws what a run's student is taught at, with repetition."""

    def __init__(self, run: Run, settings: Visits) -> None:
        self.run, self.settings = run, settings
        self.experience: Experience | None = None
        if not is_control(run.task):
            if settings.episodes:
                raise ConfigError("method: visits.episodes is for robots, and the task is prompts")
        elif settings.episodes:
            run.require_split("method: visits.episodes", settings.episodes)
            self.experience = Experience(run, cut_fails=True)
        elif run.data is None:
            raise ConfigError(
                "the student has no states to be taught at: name recorded episodes in the data"
                " section, or let some be played (method: visits.episodes)"
            )

    def gather(self) -> None:
        """Plays this iteration's episodes."""
        if self.experience is None:
            return
        run = self.run
        actor = run.policy if self.settings.actor == "student" else run.teacher
        assert actor is not None
        steps = actor.chain.stochastic
        window = (steps.start, steps.stop)
        run.collect(self.settings.episodes, 1, keep=True, policy=actor, window=window)
        self.experience.add(run.iteration)

    def __call__(self, count: int, events: bool) -> tuple[Context, Tensor, Tensor | None]:
        """This process's share of ``count`` contexts, their numbers among the ``count``, and, where
        ``events`` are asked for and were recorded, what was done (or drawn) there, [b,*E].
        """
        run = self.run
        place = run.mine(np.arange(count))
        if self.experience is not None:
            replay = self.experience.everything
            rows = run.rows(len(replay), count, "observations")
            event = replay.event[rows].to(run.policy.model.device)
            return replay.views[replay.now[rows]], place, event if events else None
        if run.data is None or not events:
            return *run.contexts(count), None
        rows = run.rows(len(run.data), count, "observations")
        context, event, _ = examples(run.data, run.policy.model, rows)
        return context, place, event

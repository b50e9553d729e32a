"""The episodes of a method that learns from everything that was done: those that there are, some in
the first iteration, and a few in every later one. A prompt is an episode of one decision.
"""

from dataclasses import dataclass, field

from genpolicy.config.errors import ConfigError, at_least, share, unread
from genpolicy.contracts.task import is_control
from genpolicy.methods.parts.failures import Failures
from genpolicy.methods.parts.offline_data import Experience
from genpolicy.rollout.person import Intervention, attended
from genpolicy.training.run import Run


@dataclass
class Practice:
    """The episodes of an off-policy method. The defaults are ours."""

    # of the policy as it came (of prompts: so many samples, each of its own), in the first
    # iteration, from which critics first learn, beside the data section's; 0: from those alone
    first: int = 50
    episodes: int = 10  # per iteration after that; 0: none, all learning is offline
    # share of the later iterations' episodes that begin where an earlier one failed, as far as
    # there are such starts
    retry: float = 0.0
    # the rule by which a person takes over; share is 0, so that nobody does
    person: Intervention = field(default_factory=lambda: Intervention(share=0.0))

    def __post_init__(self) -> None:
        at_least("method: practice", self, first=0, episodes=0)
        share("method: practice", self, "retry")


class Episodes:
    """A run's episodes as one replay, whose first decisions, the data section's and the first
    iteration's, are those before the policy improved.
    """

    def __init__(self, run: Run, settings: Practice, cut_fails: bool) -> None:
        if run.data is None and not settings.first:
            raise ConfigError(
                "there is nothing that critics could first learn from: name recorded episodes in"
                " the data section, or let some be played (method: practice.first)"
            )
        limits = run.experiment.budget
        others = (limits.iterations, limits.nfe, limits.seconds)
        if not settings.episodes and others == (None, None, None):
            raise ConfigError(
                "method: practice.episodes is 0, and environment steps alone would never spend the"
                " budget: set budget.iterations"
            )
        if settings.person.share:
            attended(run.task)
        if not is_control(run.task):
            unread("method: practice", settings, "where prompts are drawn", "retry", "person")
        self.run, self.settings = run, settings
        for name in ("first", "episodes"):
            if count := getattr(settings, name):
                run.require_split(f"method: practice.{name}", count)
        self.experience = Experience(run, cut_fails)
        self.failures = Failures(run)

    def gather(self) -> None:
        """Plays the iteration's episodes with the policy that acts now."""
        run, settings = self.run, self.settings
        first = run.iteration == 1
        episodes = settings.first if first else settings.episodes
        if episodes and not is_control(run.task):
            run.collect(episodes, 1, keep=True)
            self.experience.add(run.iteration)
        elif episodes:
            starts = self.failures.mixed(run.starts(episodes), 0.0 if first else settings.retry)
            person = settings.person if settings.person.share else None
            played = run.collect(episodes, 1, keep=True, starts=starts, person=person)
            self.failures.note(starts, played.success)
            self.experience.add(run.iteration)

    @property
    def before(self) -> int:
        """The number of the replay's decisions that are older than the policy's improvement."""
        parts = self.experience.learned
        first = (self.run.data is not None) + (self.settings.first > 0)
        return sum(map(len, parts[:first]))

"""The loop of methods that learn from everything that was done: episodes, the policy's samples at
all that was seen, and a critic of chunks.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from genpolicy.config.errors import ConfigError, unread
from genpolicy.contracts.task import is_control
from genpolicy.methods.parts.cached_samples import CachedSamples
from genpolicy.methods.parts.chunk_critic import ChunkCritic, Following, Valuing
from genpolicy.methods.parts.imitation import Imitation
from genpolicy.methods.parts.practice import Episodes, Practice
from genpolicy.policy.policy import ChainPolicy
from genpolicy.training.run import Run


class Settings(Protocol):
    """The settings that these methods share.

    gamma: discount per environment step. cut_fails: True where nothing comes after an episode that
    its time limit cut. samples: N, of the policy at every view.
    """

    gamma: float
    cut_fails: bool
    samples: int
    practice: Practice
    critic: Valuing


class OffPolicy:
    """Episodes, cached samples of the policy and a critic, in one loop.

    parts: the names of those of the policy that `train`'s ``begin`` attaches, by the first of which
    a resumed run knows that it has begun; "best_of" is the critic itself. draws: see
    `CachedSamples`. Raises `ConfigError` for a policy that came with a refiner or an editor that is
    not among ``parts``: it would go on to act. Where prompts are drawn nothing comes after a
    sample: `ConfigError` for settings of what comes after, and for a data section, whose pictures
    nobody rewarded.
    """

    def __init__(
        self,
        run: Run,
        settings: Settings,
        parts: tuple[str, ...] = ("best_of",),
        draws: Callable[[], ChainPolicy] | None = None,
    ) -> None:
        for name in ("refiner", "editor"):
            if name in run.policy.parts and name not in parts:
                raise ConfigError(
                    f"method {run.experiment.method['name']}: a part of the policy's, its {name},"
                    " would go on to act beside the method: begin with a policy without one"
                )
        if not is_control(run.task):
            _require_one_decision(run, settings)
        self.run = run
        self.episodes = Episodes(run, settings.practice, settings.cut_fails)
        self.experience = self.episodes.experience
        self.samples = CachedSamples(run, self.experience, settings.samples, draws)
        self.critic = ChunkCritic(run, settings.critic, settings.gamma, "best_of" in parts)
        self.parts = parts
        self.updates = 0  # of the critic in this iteration

    def train(
        self,
        begin: Callable[[], None],
        improve: Callable[[], None],
        learn: Callable[[], None],
    ) -> None:
        """Trains until the budget is spent.

        begin: called once, when there is something to learn from and before the critic learns:
        attaches what acts from then on (and again in a resumed run). improve: the policy, in every
        later iteration, before the critic learns from its episodes. learn: the iteration's
        ``updates`` of the critic.
        """
        run, critic = self.run, self.critic
        for iteration in run.iterations():
            if self.parts and run.awaits(self.parts[0]):
                begin()
            self.episodes.gather()
            self.updates = critic.settings.updates
            if iteration == 1:
                critic.standardise(self.experience.features)
                begin()
                self.updates = critic.settings.first
            else:
                improve()
            learn()
            if iteration == 1:  # what follows is learned online
                critic.renew_optimizer()

    def learn(self, following: Following | None = None) -> None:
        """Makes the iteration's updates of the critic. following: what the policy carries out at
        views; by default what its critic picks.
        """
        replay, features = self.experience.replay, self.experience.features
        before = self.episodes.before
        self.critic.learn(
            replay, features, before, self.updates, following or self.chosen, self.samples.at
        )

    def chosen(self, views: Tensor, features: Tensor) -> Tensor:
        """The chunk that the policy's critic picks of its cached samples at views [b], [b,*E]."""
        return self.run.policy.chosen(features, self.samples.at(views).flatten(0, 1))[0]

    def imitate_everything(self, updates: int, batch: int) -> None:
        """Imitates what was carried out, whoever did it."""
        Imitation(self.run, self.experience.done, len(self.experience.replay), batch)(updates)
        self.changed()

    def drawn(self, views: Tensor) -> Tensor:
        """Samples of the policy at views [b], Float[b,N,*E]: those that its critic learned with,
        and where prompts are drawn, of which it needs none, new ones at these views alone.
        """
        kept = is_control(self.run.task)
        return self.samples.at(views) if kept else self.samples.fresh(views)

    def changed(self) -> None:
        """Forgets what the policy, and its encoder, made of the views: they have learned."""
        self.experience.renew()
        self.samples.renew()


def _require_one_decision(run: Run, settings: Settings) -> None:
    """Raises where settings, or data, are of decisions that follow one another."""
    where = f"method {run.experiment.method['name']}"
    if run.data is not None:
        raise ConfigError(
            f"{where}: the data section's pictures have no reward, and a critic learns from"
            " rewards: leave it out"
        )
    why = "where nothing comes after a sample"
    unread(where, settings, why, "gamma", "cut_fails")
    unread(f"{where}: critic", settings.critic, why, "kind", "subset", "polyak")

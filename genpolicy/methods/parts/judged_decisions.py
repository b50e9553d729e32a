"""New decisions at recorded ones, judged by a critic that learns from all episodes so far."""

from dataclasses import dataclass

import torch
from torch import Tensor

from genpolicy.config.errors import at_least, positive, share
from genpolicy.methods.parts.iql import ActionValue
from genpolicy.methods.parts.offline_data import Experience
from genpolicy.rollout.rollout import Rollout
from genpolicy.training.run import Run


@dataclass
class Judge:
    """The critic of a robot's decisions, implicit Q-learning (arXiv 2110.06169), and the episodes
    that it learns from. Defaults without a source are ours.
    """

    episodes: int = 20  # played per iteration, all processes together
    gamma: float = 0.99  # discount per environment step
    expectile: float = 0.7  # of V, in [0, 1]; RL-100
    pessimism: float = 1.0  # stds over its networks that are taken off Q
    monte_carlo: float = 0.5  # share of the observed return in the target of Q, in [0, 1]
    critic_updates: int = 300  # of Q and V per iteration
    critic_lr: float = 3e-4  # learning rate of Q and V
    cut_fails: bool = True  # True: nothing comes after an episode that its time limit cut

    def __post_init__(self) -> None:
        at_least("method: judge", self, episodes=1, critic_updates=1)
        positive("method: judge", self, "critic_lr", "pessimism")
        share("method: judge", self, "gamma", "expectile", "monte_carlo")


class JudgedDecisions:
    """The episodes that a run plays, the critic of them, and decisions that are drawn anew; all is
    saved and resumed with the run.
    """

    def __init__(self, run: Run, settings: Judge) -> None:
        self.run, self.settings = run, settings
        run.require_split("method: judge.episodes", settings.episodes)
        self.experience = Experience(run, settings.cut_fails, own=True)
        self.value = ActionValue(
            run,
            settings.gamma,
            expectile=settings.expectile,
            pessimism=settings.pessimism,
            monte_carlo=settings.monte_carlo,
            lr=settings.critic_lr,
        )

    def gather(self) -> None:
        """Plays the iteration's episodes, and lets the critic learn from all that there are."""
        self.run.collect(self.settings.episodes, 1, keep=True)
        self.experience.renew()  # the encoder may have learned
        self.experience.add(self.run.iteration)
        experience = self.experience
        self.value.learn(experience.replay, experience.features, self.settings.critic_updates)

    @torch.no_grad()
    def redraw(self, states: int, samples: int, branch_at: int) -> tuple[Rollout, Tensor]:
        """``samples`` decisions at each of ``states`` recorded ones, which share their first
        ``branch_at`` denoising steps, and their advantages Q - V [R].
        """
        rollout, index = self.experience.redraw(states, 0, samples, branch_at)
        seen = self.experience.seen(index)
        return rollout, self.value.advantage(seen, rollout.trajectory.x0)

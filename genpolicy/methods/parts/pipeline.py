"""The stages that RL-100 and Uni-O4 share: learning offline from recorded decisions, and online RL.

offline     Q, V <- IQL(D);  T <- transition model(D)
            A = Q - V of decisions that pi draws anew at recorded states
            J(pi) = E sum_h Q(s_h, a_h) in imagination (`genpolicy.methods.parts.gate`)
online      V goes on from the offline one (`genpolicy.methods.parts.online`)
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from genpolicy.config.schema import OptimizerConfig
from genpolicy.learning.acceptance import Comparison, compare
from genpolicy.methods.parts.gate import OfflineEvaluation
from genpolicy.methods.parts.iql import ActionValue
from genpolicy.methods.parts.offline_data import Experience
from genpolicy.methods.parts.ppo import chunk_log_ratio
from genpolicy.policy.policy import Part
from genpolicy.policy.weights import Weights
from genpolicy.rollout.rollout import Rollout
from genpolicy.training.run import Run

Act = Callable[[], bool | None]
"""One iteration of a stage; it returns True where the stage is through before its time."""


def train_stages(
    run: Run,
    acts: Mapping[str, Act],
    leave: Callable[[str], None],
    parts: Mapping[str, Part],
    ready: Callable[[], None],
) -> None:
    """Trains one stage after the other until the last is through or the budget is spent.

    ready: called before anything is learned, when the policy has played its first evaluation; it
    raises where the run can't go on. acts: by the stage's name. leave: called with the name of a
    stage that is through. parts: of the policy, by name, that some stage attaches; a resumed run
    takes up those that its checkpoint has before a stage changes anything.
    """
    for number, _ in enumerate(run.iterations()):
        if number == 0:
            ready()
        run.attach(**{name: part for name, part in parts.items() if run.awaits(name)})
        through = acts[run.stages.now.name]()
        run.advance(bool(through), leave)


def constant(common: OptimizerConfig) -> OptimizerConfig:
    """The same optimiser at a constant learning rate, without averaged weights."""
    return replace(common, warmup=0, final=1.0, ema=0.0)


class OfflineLearner:
    """Recorded decisions D, and the critics and the model that are learned from them.

    experience: D. value: Q and V. evaluation: T, and J in it. Each saves and resumes itself with
    the run.
    """

    def __init__(
        self, run: Run, experience: Experience, value: ActionValue, evaluation: OfflineEvaluation
    ) -> None:
        self.run = run
        self.experience = experience
        self.value = value
        self.evaluation = evaluation

    def learn(self, critic_updates: int, model_updates: int) -> None:
        """Q, V <- IQL(D);  T <- transition model(D)."""
        replay = self.experience.replay
        features = self.experience.features
        self.value.learn(replay, features, critic_updates)
        self.run.seen(self.value.batch * critic_updates)  # the stage itself collects nothing
        self.evaluation.learn(replay, features, model_updates)

    def redraw(
        self, states: int, number: int, samples: int, tolerance: float
    ) -> tuple[Rollout, Tensor]:
        """Returns decisions that the policy as it stands draws at recorded states, and their
        advantage Q - V, [R].

        states: how many, of all processes together. number: of this redrawing in its iteration.
        samples: decisions per state, in consecutive rows. tolerance: see `Run.verified`.
        """
        rollout, index = self.experience.redraw(states, number, samples)
        rollout = self.run.verified(rollout, chunk_log_ratio, tolerance)
        seen = self.experience.seen(index)
        return rollout, self.value.advantage(seen, rollout.trajectory.x0)

    def verdict(self, in_force: Weights) -> Comparison:
        """J of the policy as it stands against J of the weights ``in_force``, from the same starts
        with the same luck, as the main process finds it: all must decide alike.
        """
        replay = self.experience.replay
        features = self.experience.features
        new = self.evaluation(replay, features)
        with in_force.using():
            old = self.evaluation(replay, features)
        found = compare(new, old)
        return Comparison(*self.run.processes.agreed([found.difference, found.error, found.old]))

"""The evaluation of a run before, between and after: prompts and rewards, or episodes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from genpolicy.config.errors import ConfigError
from genpolicy.config.schema import EvalConfig
from genpolicy.contracts.reward import WeightedRewards
from genpolicy.contracts.task import Environments
from genpolicy.evaluation import pictures
from genpolicy.evaluation.episode_scores import ControlEvaluation, evaluate_control
from genpolicy.evaluation.prompt_scores import evaluate
from genpolicy.policy.policy import ChainPolicy
from genpolicy.rollout.micro_batch import MicroBatches
from genpolicy.training.iteration_metrics import IterationMetrics
from genpolicy.training.processes import Processes


class Evaluator(Protocol):
    """The same questions for every policy that is to be compared.

    measured: the metrics that may select the best policy; the first is the default. of_actions:
    True where the policy acts in environments.
    """

    of_actions: ClassVar[bool]

    @property
    def measured(self) -> Sequence[str]: ...

    def __call__(
        self, policy: ChainPolicy, processes: Processes, micro_batches: MicroBatches, folder: Path
    ) -> dict[str, Any]:
        """The policy's metrics, the same on every process; the main one writes what there is to
        look at to ``folder``.
        """
        ...

    def try_out(
        self,
        policy: ChainPolicy,
        processes: Processes,
        metrics: IterationMetrics,
        episodes: int,
        seed: int,
    ) -> Tensor:
        """The success (or, where the task does not judge, return) of ``episodes`` episodes whose
        reset seeds begin at ``seed``, [E] fp64; they count as collected ones. Raises `ConfigError`
        where the task has none.
        """
        ...

    def close(self) -> None:
        """Let go of environments."""
        ...


@dataclass(frozen=True)
class PromptEvaluator:
    """Rewards of samples of fixed prompts."""

    reward: WeightedRewards
    prompts: Sequence[str]
    settings: EvalConfig

    of_actions: ClassVar[bool] = False

    @property
    def measured(self) -> Sequence[str]:
        return ["reward/total", *(f"reward/{name}" for name in self.reward.rewards), "diversity"]

    def __call__(
        self, policy: ChainPolicy, processes: Processes, micro_batches: MicroBatches, folder: Path
    ) -> dict[str, Any]:
        found = evaluate(
            policy,
            self.reward,
            prompts=self.prompts,
            samples=self.settings.samples,
            seed=self.settings.seed,
            process=(processes.index, processes.count),
            gather=processes.gather,
            micro_batches=micro_batches,
        )
        if processes.main:
            pictures.grid(found.outputs, found.prompts, folder / "grid.png")
        return found.metrics()

    def try_out(
        self,
        policy: ChainPolicy,
        processes: Processes,
        metrics: IterationMetrics,
        episodes: int,
        seed: int,
    ) -> Tensor:
        """Raise `ConfigError`: prompts have no episodes."""
        raise ConfigError(
            "try_out: a policy is tried out in the episodes of a robot's task, and prompts have no"
            " episodes"
        )

    def close(self) -> None:
        """Do nothing: prompts hold nothing open."""


@dataclass(frozen=True)
class EpisodeEvaluator:
    """Success and return of episodes from fixed starts."""

    environments: Environments
    judged: bool
    settings: EvalConfig

    of_actions: ClassVar[bool] = True

    @property
    def measured(self) -> Sequence[str]:
        return ["success_rate", "return"] if self.judged else ["return"]

    def __call__(
        self, policy: ChainPolicy, processes: Processes, micro_batches: MicroBatches, folder: Path
    ) -> dict[str, Any]:
        return self.play(policy, processes, self.settings.episodes, self.settings.seed).metrics()

    def play(
        self, policy: ChainPolicy, processes: Processes, episodes: int, seed: int
    ) -> ControlEvaluation:
        """``episodes`` episodes whose reset seeds begin at ``seed``."""
        return evaluate_control(
            policy,
            self.environments,
            episodes=episodes,
            seed=seed,
            judged=self.judged,
            process=(processes.index, processes.count),
            gather=processes.gather,
        )

    def try_out(
        self,
        policy: ChainPolicy,
        processes: Processes,
        metrics: IterationMetrics,
        episodes: int,
        seed: int,
    ) -> Tensor:
        """The outcomes of episodes that count as collected ones."""
        found = self.play(policy, processes, episodes, seed)
        metrics.env_steps += processes.share(int(found.lengths.sum()))
        metrics.collected += processes.share(int(found.decisions))
        return found.success if found.judged else found.returns

    def close(self) -> None:
        self.environments.close()

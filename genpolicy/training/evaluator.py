"""What a run is judged by, before, between and after: prompts and rewards, or episodes in
environments.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from genpolicy.config.schema import EvalConfig
from genpolicy.contracts.reward import WeightedRewards
from genpolicy.contracts.task import Environments
from genpolicy.evaluation import pictures
from genpolicy.evaluation.episode_scores import evaluate_control
from genpolicy.evaluation.prompt_scores import evaluate
from genpolicy.policy.policy import ChainPolicy
from genpolicy.rollout.micro_batch import MicroBatches
from genpolicy.training.processes import Processes


class Exam(Protocol):
    """The same questions for every policy that is to be compared.

    measured: the metrics that may select the best policy; the first is the default.
    """

    @property
    def measured(self) -> Sequence[str]: ...

    def __call__(
        self, policy: ChainPolicy, processes: Processes, micro_batches: MicroBatches, folder: Path
    ) -> dict[str, Any]:
        """The policy's metrics, the same on every process; the main one writes what there is to
        look at to ``folder``.
        """
        ...


@dataclass(frozen=True)
class PromptExam:
    """Rewards of samples of fixed prompts."""

    reward: WeightedRewards
    prompts: Sequence[str]
    settings: EvalConfig

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


@dataclass(frozen=True)
class ControlExam:
    """Success and return of episodes from fixed starts."""

    environments: Environments
    judged: bool
    settings: EvalConfig

    @property
    def measured(self) -> Sequence[str]:
        return ["success_rate", "return"] if self.judged else ["return"]

    def __call__(
        self, policy: ChainPolicy, processes: Processes, micro_batches: MicroBatches, folder: Path
    ) -> dict[str, Any]:
        found = evaluate_control(
            policy,
            self.environments,
            episodes=self.settings.episodes,
            seed=self.settings.seed,
            judged=self.judged,
            process=(processes.index, processes.count),
            gather=processes.gather,
        )
        return found.metrics()

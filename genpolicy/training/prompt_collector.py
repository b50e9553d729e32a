"""The collector of prompts: samples, scored by the rewards."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genpolicy.chain import Noise
from genpolicy.config.errors import ConfigError
from genpolicy.config.outside import outside
from genpolicy.contracts.model import Model
from genpolicy.contracts.reward import WeightedRewards
from genpolicy.contracts.task import Context, Task, TaskError
from genpolicy.policy.policy import ChainPolicy
from genpolicy.rollout.micro_batch import MicroBatches, recount
from genpolicy.rollout.prompts import Judged, collect, concatenate
from genpolicy.rollout.rollout import Rollout, single
from genpolicy.rollout.store import COLLECTED, EpisodeStore
from genpolicy.training.collector import Request, acting
from genpolicy.training.iteration_metrics import IterationMetrics
from genpolicy.training.processes import Processes


@dataclass(frozen=True)
class PromptCollector:
    """Collects samples of the task's prompts; see `genpolicy.training.collector.Collector`.

    model: the one that learns. store: where samples that are kept are written, each as an episode
    of one decision.
    """

    seed: int
    model: Model
    task: Task
    reward: WeightedRewards
    processes: Processes
    metrics: IterationMetrics
    micro_batches: MicroBatches
    store: EpisodeStore

    def __call__(self, policy: ChainPolicy, iteration: int, request: Request) -> Rollout:
        groups, members, updates = request.groups, request.members, request.updates
        branch, window = request.branch_at, policy.chain.stochastic
        if branch is not None and not 0 <= branch < window.stop:
            raise ValueError(
                f"collect: branch_at is {branch}; it must be a step from 0 to {window.stop - 1},"
                " where the window's last noise is drawn"
            )
        keep = None if branch is None else (max(branch, window.start), window.stop)
        if request.starts is not None:
            raise ConfigError(
                "collect: starts are the reset seeds of environments, and the task is one of"
                " prompts"
            )
        local = self.processes.groups(groups, updates)
        noise = Noise.rows(self.seed, iteration, local, members)
        prompts = self._prompts(iteration, groups)
        asked = [prompts[g] for g in local.tolist() for _ in range(members)]

        def chunk(rows: slice) -> Judged:
            return collect(
                policy,
                Context(asked[rows]),
                self.reward,
                noise[rows],
                members=members,
                branch_at=branch,
                keep=keep,
                on_phase=self.metrics.phase,
            )

        with acting(policy, self.model, self.metrics):
            chunks = self.micro_batches(chunk, len(asked), members, recount(policy))
        judged = concatenate(chunks, policy)
        self.metrics.phase(None)
        self.metrics.collected += len(asked)
        if request.keep:
            self._keep(iteration, judged, noise, (groups, members))
        parts = {
            name: self.processes.gather_groups(value.view(-1, members), updates)
            for name, value in judged.parts.items()
        }
        place = (local[:, None] * members + torch.arange(members)).flatten()
        return Rollout(
            judged.trajectory,
            judged.context,
            judged.outputs,
            parts,
            self.reward.weights,
            self.reward.total(parts),
            prompts,
            local,
            single(self.reward.total(judged.parts), judged.context, place, groups * members),
        )

    def example(self) -> Context:
        return self.task.reset(range(1))

    def contexts(self, iteration: int, place: Tensor, total: int) -> Context:
        prompts = self._prompts(iteration, total)
        return Context([prompts[p] for p in place.tolist()])

    def trim(self, iteration: int) -> None:
        self.store.trim(iteration)

    def pin(self, iteration: int) -> None:
        self.store.pinned.add(iteration)

    def kept(self, iteration: int) -> Any:
        return self.store.kept(iteration)

    def _keep(
        self, iteration: int, judged: Judged, noise: Noise, collected: tuple[int, int]
    ) -> None:
        """Writes samples as episodes of one decision, in the layout of
        `genpolicy.rollout.recorder.live`. collected: groups and members of all processes.
        """
        rewards = self.reward.total(judged.parts)
        x0, start = judged.trajectory.x0.cpu(), judged.trajectory.start
        assert start is not None
        over, no = torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.bool)
        for row in range(len(x0)):
            one = slice(row, row + 1)
            name = f"{int(noise.group[row])}-{int(noise.member[row])}"
            self.store.write(
                iteration,
                name,
                {
                    "x0": x0[one].clone(),
                    "start": start[one].cpu().clone(),
                    "rewards": rewards[one, None].clone(),
                    "executed": torch.ones(1, dtype=torch.long),
                    "terminated": over,
                    "truncated": no,
                    "success": no,  # nothing but the reward tells of a sample
                    "prompts": [judged.context.prompts[row]],
                    "observation": {},
                    "final": {},
                    COLLECTED: torch.tensor(collected),
                },
            )

    def _prompts(self, iteration: int, count: int) -> tuple[str, ...]:
        """The prompts of an iteration: the task's, one iteration's after the other's."""
        first = (iteration - 1) * count
        with outside("the task", self.reward.patience, TaskError):
            return tuple(self.task.reset(range(first, first + count)).prompts)

"""Collecting: an iteration's rollout, of prompts or of episodes, by however many processes."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from genpolicy.chain import Noise
from genpolicy.config.errors import ConfigError
from genpolicy.contracts.reward import WeightedRewards
from genpolicy.contracts.task import Context, ControlTask, Environments, Task
from genpolicy.policy.policy import ChainPolicy
from genpolicy.rollout.episodes import reset_seed
from genpolicy.rollout.micro_batch import MicroBatches, recount
from genpolicy.rollout.prompts import Judged, collect, concatenate
from genpolicy.rollout.recorder import Lived, live
from genpolicy.rollout.rollout import Decisions, Rollout, single
from genpolicy.rollout.store import EpisodeStore
from genpolicy.training.iteration_metrics import Journal
from genpolicy.training.processes import Processes


@dataclass(frozen=True)
class Collector:
    """Who is asked (task, with its environments where it has some), who judges (reward, of
    prompts), and who takes part.

    circumstances: all that an episode depends on beside weights and start, in words.
    """

    seed: int
    circumstances: str
    task: Task | ControlTask
    reward: WeightedRewards | None
    environments: Environments | None
    processes: Processes
    journal: Journal
    micro_batches: MicroBatches
    store: EpisodeStore

    def __call__(
        self,
        policy: ChainPolicy,
        iteration: int,
        groups: int,
        members: int,
        updates: int,
        branch: int | None,
        keep: bool = False,
        starts: Sequence[int] | None = None,
    ) -> Rollout:
        """``groups`` = M prompts or start states of this iteration, ``members`` = N samples or
        episodes each; the minibatches of ``updates`` get whole groups. branch: the step up to which
        a group's samples share their chain. keep: write every episode into the store as it ends,
        and take what is there already from it. starts: reset seeds of the M groups, if not this
        iteration's own.
        """
        local = self.processes.groups(groups, updates)
        noise = Noise.rows(self.seed, iteration, local, members)
        if self.environments is None:
            return self._prompts(policy, iteration, groups, members, local, noise, updates, branch)
        if branch is not None:
            raise ConfigError(
                "shared_prefix is for prompts: the episodes of a group see different states"
            )
        starts = starts or [reset_seed(self.seed, iteration, group) for group in range(groups)]
        return self._episodes(
            policy, self.environments, iteration, starts, members, local, noise, updates, keep
        )

    def _prompts(
        self,
        policy: ChainPolicy,
        iteration: int,
        groups: int,
        members: int,
        local: Tensor,
        noise: Noise,
        updates: int,
        branch: int | None,
    ) -> Rollout:
        """Samples of prompts, judged by the rewards."""
        reward, task = cast(WeightedRewards, self.reward), cast(Task, self.task)
        base = (iteration - 1) * groups
        prompts = tuple(task.reset(range(base, base + groups)).prompts)
        asked = [prompts[g] for g in local.tolist() for _ in range(members)]

        def chunk(rows: slice) -> Judged:
            context, phase = Context(asked[rows]), self.journal.phase
            return collect(
                policy,
                context,
                reward,
                noise[rows],
                members=members,
                branch_at=branch,
                on_phase=phase,
            )

        judged = concatenate(
            self.micro_batches(chunk, len(asked), members, recount(policy)), policy
        )
        self.journal.phase(None)
        self.journal.collected += len(asked)
        parts = self._of_all(judged.parts, members, updates)
        place = (local[:, None] * members + torch.arange(members)).flatten()
        return Rollout(
            judged.trajectory,
            judged.context,
            judged.outputs,
            parts,
            reward.weights,
            reward.total(parts),
            prompts,
            local,
            single(reward.total(judged.parts), judged.context, place, groups * members),
        )

    def _episodes(
        self,
        policy: ChainPolicy,
        environments: Environments,
        iteration: int,
        starts: Sequence[int],
        members: int,
        local: Tensor,
        noise: Noise,
        updates: int,
        keep: bool,
    ) -> Rollout:
        """Episodes in environments; the members of a group begin in the same state."""
        seeds = [starts[group] for group in local.tolist() for _ in range(members)]
        ledger = _Page(self.store, iteration, noise, self._origin(policy, starts)) if keep else None
        lived = live(policy, environments, seeds, noise, ledger=ledger, on_phase=self.journal.phase)
        self.journal.phase(None)
        self.journal.collected += len(lived.trajectory)
        self.journal.env_steps += float(lived.parts["length"].sum())
        counts = lived.decisions.episode.bincount(minlength=len(seeds))
        found = self._of_all({**lived.parts, "decisions": counts}, members, updates)
        decisions = _placed(lived, counts, found.pop("decisions"), local)
        success, length = found.pop("success"), found.pop("length")
        self.journal.log("episode/success", success.mean().item())
        self.journal.log("episode/length", length.mean().item())
        prompts = tuple(f"start {seed}" for seed in starts)
        return Rollout(
            lived.trajectory,
            lived.context,
            lived.outputs,
            found,
            {"return": 1.0},
            found["return"],
            prompts,
            local,
            decisions,
            success,
        )

    def _origin(self, policy: ChainPolicy, starts: Sequence[int]) -> str:
        """What an iteration's episodes come from, as eight letters that are the same on every
        process.
        """
        digest = hashlib.sha256(repr((self.seed, self.circumstances, list(starts))).encode())
        for parameter in policy.model.trainable().values():
            digest.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        mine = torch.tensor([int.from_bytes(digest.digest()[:4], "big")])
        return f"{int(self.processes.gather(mine)[0]):08x}"

    def _of_all(self, parts: Mapping[str, Tensor], members: int, updates: int) -> dict[str, Tensor]:
        """This process's values by name [m*N] to everybody's [M,N]."""
        return {
            name: self.processes.gather_groups(value.view(-1, members), updates)
            for name, value in parts.items()
        }


@dataclass(frozen=True)
class _Page:
    """One iteration's episodes in the store, by their group and member: the names that all
    processes agree on.
    """

    store: EpisodeStore
    iteration: int
    noise: Noise
    origin: str

    def __post_init__(self) -> None:
        self.store.forget_others(self.iteration, self.origin)

    def read(self, episode: int) -> dict[str, Any] | None:
        return self.store.read(self.iteration, self._name(episode))

    def write(self, episode: int, rows: dict[str, Any]) -> None:
        self.store.write(self.iteration, self._name(episode), rows)

    def _name(self, episode: int) -> str:
        return f"{int(self.noise.group[episode])}-{int(self.noise.member[episode])}-{self.origin}"


def _placed(lived: Lived, counts: Tensor, everybody: Tensor, local: Tensor) -> Decisions:
    """Decisions with their places among those of all processes: episode by episode, group-major.
    counts [m*N] of this process's episodes, everybody [M,N] of all.
    """
    episode = lived.decisions.episode
    begins = (
        (everybody.flatten().cumsum(0) - everybody.flatten()).view_as(everybody)[local].flatten()
    )
    within = torch.arange(len(episode)) - (counts.cumsum(0) - counts)[episode]
    return replace(lived.decisions, place=begins[episode] + within, total=int(everybody.sum()))

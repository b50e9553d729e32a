"""The collector of episodes: a policy acts in environments until every episode has ended."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from genpolicy.chain import Noise
from genpolicy.config.errors import ConfigError
from genpolicy.contracts.model import Model
from genpolicy.contracts.task import Context, ControlTask, Environments
from genpolicy.policy.policy import ChainPolicy
from genpolicy.rollout.episodes import reset_seed
from genpolicy.rollout.frames import FrameByFrame
from genpolicy.rollout.person import Intervention, Watched
from genpolicy.rollout.recorder import Lived, live
from genpolicy.rollout.rollout import Decisions, Rollout
from genpolicy.rollout.store import COLLECTED, EpisodeStore
from genpolicy.training.collector import Request, acting
from genpolicy.training.iteration_metrics import IterationMetrics
from genpolicy.training.processes import Processes


@dataclass(frozen=True)
class EpisodeCollector:
    """Collects episodes in environments; see `genpolicy.training.collector.Collector`.

    model: the one that learns. circumstances: all that an episode depends on beside weights and
    start, in words. environments: of the ``task``. store: where episodes that are kept are
    written. record: every episode is kept, frame by frame.
    """

    seed: int
    model: Model
    circumstances: str
    environments: Environments
    task: ControlTask
    processes: Processes
    metrics: IterationMetrics
    store: EpisodeStore
    record: bool = False

    def __call__(self, policy: ChainPolicy, iteration: int, request: Request) -> Rollout:
        groups, members, updates = request.groups, request.members, request.updates
        if request.branch_at is not None:
            raise ConfigError(
                "shared_prefix is for prompts: the episodes of a group see different states"
            )
        starts = request.starts
        if starts is not None and len(starts) != groups:
            raise ConfigError(
                f"collect: there are {len(starts)} starts for {groups} groups; each has one"
            )
        local = self.processes.groups(groups, updates)
        noise = Noise.rows(self.seed, iteration, local, members)
        starts = starts or [reset_seed(self.seed, iteration, group) for group in range(groups)]
        # play this process's episodes; the members of a group begin in the same state
        seeds = [starts[group] for group in local.tolist() for _ in range(members)]
        ledger = None
        if request.keep or self.record:
            origin = self._origin(policy, starts, request.person)
            ledger = _Page(self.store, iteration, noise, origin, (groups, members))
        frames = FrameByFrame(self.environments) if self.record else None
        environments: Environments = frames or self.environments
        if request.person is not None:
            environments = Watched(environments, self.task, request.person)
        phase = self.metrics.phase
        with acting(policy, self.model, self.metrics):
            lived = live(
                policy,
                environments,
                seeds,
                noise,
                ledger=ledger,
                frames=frames,
                on_phase=phase,
            )
        self.metrics.phase(None)
        self.metrics.collected += len(lived.trajectory)
        self.metrics.env_steps += float(lived.parts["length"].sum())
        # put them beside everybody's
        counts = lived.decisions.episode.bincount(minlength=len(seeds))
        found = {
            name: self.processes.gather_groups(value.view(-1, members), updates)
            for name, value in {**lived.parts, "decisions": counts}.items()
        }
        decisions = _placed(lived, counts, found.pop("decisions"), local)
        success, length = found.pop("success"), found.pop("length")
        if request.person is not None:
            self.metrics.log("person/steps", found.pop("person").sum().item())
            self.metrics.log("person/takeovers", found.pop("takeovers").sum().item())
        if self.task.has_success:
            self.metrics.log("episode/success", success.mean().item())
        self.metrics.log("episode/length", length.mean().item())
        return Rollout(
            lived.trajectory,
            lived.context,
            lived.outputs,
            found,
            {"return": 1.0},
            found["return"],
            tuple(f"start {seed}" for seed in starts),
            local,
            decisions,
            success if self.task.has_success else None,
        )

    def example(self) -> Context:
        return self.environments.reset([0], [0])

    def contexts(self, iteration: int, place: Tensor, total: int) -> Context:
        raise ConfigError(
            "what a robot sees is not known before it acts: name recorded episodes in the data"
            " section"
        )

    def trim(self, iteration: int) -> None:
        self.store.trim(iteration)

    def pin(self, iteration: int) -> None:
        self.store.pinned.add(iteration)

    def kept(self, iteration: int) -> Any:
        return self.store.kept(iteration)

    def _origin(
        self, policy: ChainPolicy, starts: Sequence[int], person: Intervention | None
    ) -> str:
        """A digest of what an iteration's episodes come from, eight letters, the same on every
        process.
        """
        told = (self.seed, self.circumstances, list(starts), *([person] if person else []))
        digest = hashlib.sha256(repr(told).encode())
        for parameter in policy.model.trainable().values():
            digest.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        mine = torch.tensor([int.from_bytes(digest.digest()[:4], "big")])
        return f"{int(self.processes.gather(mine)[0]):08x}"


@dataclass(frozen=True)
class _Page:
    """One iteration's episodes in the store, by their group and member: the names that all
    processes agree on. collected: how many groups and members all processes collect.
    """

    store: EpisodeStore
    iteration: int
    noise: Noise
    origin: str
    collected: tuple[int, int]

    def __post_init__(self) -> None:
        self.store.forget_others(self.iteration, self.origin)

    def read(self, episode: int) -> dict[str, Any] | None:
        return self.store.read(self.iteration, self._name(episode))

    def write(self, episode: int, rows: dict[str, Any]) -> None:
        told = {**rows, COLLECTED: torch.tensor(self.collected)}
        self.store.write(self.iteration, self._name(episode), told)

    def found(self, known: int, asked: int) -> None:
        played = (
            f"the other {asked - known} are played, those in flight again from their beginning"
            if known < asked
            else "none is played"
        )
        self.store.say(
            f"iteration {self.iteration}: {known} of {asked} episodes were on disk already and are"
            f" taken as they were written; {played}"
        )

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

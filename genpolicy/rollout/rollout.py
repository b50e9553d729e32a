"""Rollouts: policy x task -> trajectories with rewards, in groups."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from genpolicy.chain import Trajectory
from genpolicy.contracts.task import Context


@dataclass(frozen=True)
class Decisions:
    """The outcome of a rollout's R rows. A row is one decision; an episode's rows stand together,
    in order.

    episode [R]: whose it is, counted over this process's episodes (group-major). rewards [R,T]: of
    its environment steps. executed [R]: how many it took. terminated [R]: nothing comes after it.
    last [R]: its episode ended here, by itself or cut. final: what was seen at the end of each
    episode. place [R]: its number among ``total`` rows of all processes, whatever their count.
    """

    episode: Tensor
    rewards: Tensor
    executed: Tensor
    terminated: Tensor
    last: Tensor
    final: Context
    place: Tensor
    total: int


@dataclass(frozen=True)
class Rollout:
    """M groups of N episodes, of which this process owns some; a prompt is an episode of one
    decision.

    trajectory, context, outputs: the R rows (decisions) of the groups ``local`` [m], group-major.
    parts, rewards: of the episodes of *all* groups, [M,N] fp64 on the CPU, so that every process
    computes the same advantages. weights: of the parts. prompts: the M groups' prompts. success: of
    the episodes, like the rewards, where the task has it.
    """

    trajectory: Trajectory
    context: Context
    outputs: Tensor
    parts: Mapping[str, Tensor]
    weights: Mapping[str, float]
    rewards: Tensor
    prompts: tuple[str, ...]
    local: Tensor
    decisions: Decisions
    success: Tensor | None = None

    @property
    def ragged(self) -> bool:
        """True where episodes, of whatever process, have several decisions, so that rows are not
        groups of N.
        """
        return self.decisions.total > self.rewards.numel()

    def metrics(self) -> dict[str, float]:
        """reward/NAME of every part and of the total, the total's 95 % half width, and the share of
        groups whose rewards do not differ.
        """
        found = {**self.parts, "total": self.rewards}
        means = {f"reward/{name}": value.mean().item() for name, value in found.items()}
        groups = len(self.rewards)
        spread = self.rewards.mean(1).std().item() / max(groups, 2) ** 0.5
        same = (self.rewards.std(1, correction=0) == 0).double().mean().item()
        return {**means, "reward/total_ci95": 1.96 * spread, "reward/group_std_zero": same}

    def rows(self, values: Tensor) -> Tensor:
        """Pick this process's rows from episodes' values [M,N] (or [M,N,m]): [R] (or [R,m]) fp32
        on the trajectory's device.
        """
        return (
            values[self.local]
            .flatten(0, 1)[self.decisions.episode]
            .float()
            .to(self.trajectory.x0.device)
        )

    def ungrouped(self) -> "Rollout":
        """The same rollout, each row of which is scored by itself, so that a pass may leave out
        rows of a group that shares its start.
        """
        return replace(self, trajectory=replace(self.trajectory, shared=1))


def single(rewards: Tensor, context: Context, place: Tensor, total: int) -> Decisions:
    """Prompts as episodes of one decision: rewards [B], all over after it."""
    rows, ended = torch.arange(len(rewards)), torch.ones(len(rewards), dtype=torch.bool)
    return Decisions(
        rows, rewards[:, None], torch.ones_like(rows), ended, ended, context, place, total
    )


def unjudged(trajectory: Trajectory, place: Tensor, total: int) -> Rollout:
    """Decisions that nobody carried out: B rows of ``total``, without rewards, each a group of its
    own.
    """
    context = Context([""] * len(place))
    unknown = torch.zeros(total, 1, dtype=torch.float64)
    decisions = single(unknown[place, 0], context, place, total)
    return Rollout(trajectory, context, trajectory.x0, {}, {}, unknown, (), place, decisions)

"""Sampling prompts: a policy draws one output per row, which is decoded and scored."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from genpolicy.chain import Noise, Trajectory
from genpolicy.contracts.reward import WeightedRewards
from genpolicy.contracts.task import Context
from genpolicy.policy.policy import ChainPolicy


@dataclass(frozen=True)
class Judged:
    """The result of `collect` for the groups it was given:
    B rows, and their rewards by name [B].
    """

    trajectory: Trajectory
    context: Context
    outputs: Tensor
    parts: dict[str, Tensor]


def collect(
    policy: ChainPolicy,
    context: Context,
    reward: WeightedRewards,
    noise: Noise,
    *,
    members: int,
    branch_at: int | None = None,
    keep: tuple[int, int] | None = None,
    storage: torch.dtype = torch.float32,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> Judged:
    """Sample one output per row of ``context`` (group-major, ``members`` to a group), decode it and
    judge it.

    ``on_phase`` is told "sample", "decode", "reward" as each begins (timing, moving models in
    turn).
    """
    on_phase("sample")
    with torch.no_grad():
        condition = policy.model.encode(context)
    trajectory = policy.sample(
        condition, noise, members=members, branch_at=branch_at, keep=keep, storage=storage
    )
    on_phase("decode")
    with torch.no_grad():
        outputs = policy.model.decode(trajectory.x0)
    on_phase("reward")
    parts = reward.parts(outputs, context)
    return Judged(trajectory, context, outputs.float().cpu(), parts)


def concatenate(judged: list[Judged], policy: ChainPolicy) -> Judged:
    """Chunks of rows sampled one after the other, as one."""
    if len(judged) == 1:
        return judged[0]
    prompts = [prompt for j in judged for prompt in j.context.prompts]
    condition = policy.model.encode(Context(prompts))
    trajectory = Trajectory.cat([j.trajectory for j in judged], condition)
    parts = {name: torch.cat([j.parts[name] for j in judged]) for name in judged[0].parts}
    return Judged(trajectory, Context(prompts), torch.cat([j.outputs for j in judged]), parts)

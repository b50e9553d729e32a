"""Rollouts: policy x task -> trajectories with rewards, in groups."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from genpolicy.chain import Gaussian, Noise, Trajectory
from genpolicy.policy import ChainPolicy
from genpolicy.reward import WeightedRewards
from genpolicy.task import Context


@dataclass(frozen=True)
class Rollout:
    """M groups of N rows, of which this process owns some.

    trajectory, context, outputs: the B rows of the groups ``local`` [m], group-major. parts, rewards: of *all* groups,
    [M,N] fp64 on the CPU, so that every process computes the same advantages. prompts: the M groups' prompts.
    """

    trajectory: Trajectory
    context: Context
    outputs: Tensor
    parts: Mapping[str, Tensor]
    rewards: Tensor
    prompts: tuple[str, ...]
    local: Tensor

    def rows(self, values: Tensor) -> Tensor:
        """Pick this process's rows from [M,N] values: [B] fp32 on the trajectory's device."""
        return values[self.local].flatten().float().to(self.trajectory.x0.device)


@dataclass(frozen=True)
class Scored:
    """A stored step k of b rows under the current weights: all that a loss on transitions needs.

    new: the transition now (with its graph); old: the one that acted; reference: the one of the policy at step 0, if
    asked; x [b,*E] the sample all three are scored on; advantage [b]; std: the step's total std; dt = t - s > 0; gain:
    kappa = d mean / d output.
    """

    new: Gaussian
    old: Gaussian
    reference: Gaussian | None
    x: Tensor
    advantage: Tensor
    std: float
    dt: float
    gain: float


@dataclass(frozen=True)
class Judged:
    """What `collect` returns for the groups it was given: B rows, and their rewards by name [B]."""

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
    """Sample one output per row of ``context`` (group-major, ``members`` to a group), decode it and judge it.

    ``on_phase`` is told "sample", "decode", "reward" as each begins (timing, moving models in turn).
    """
    on_phase("sample")
    condition = policy.model.encode(context)
    trajectory = policy.sample(condition, noise, members=members, branch_at=branch_at, keep=keep, storage=storage)
    on_phase("decode")
    with torch.no_grad():
        outputs = policy.model.decode(trajectory.x0)
    on_phase("reward")
    parts = reward.parts(outputs, context)
    return Judged(trajectory, context, outputs.float().cpu(), parts)


def recount(policy: ChainPolicy) -> Callable[[], None]:
    """What to call before work begins again: evaluations since now are forgotten, because aborted work does not count."""
    counted = policy.model.evaluations

    def restart() -> None:
        policy.model.evaluations = counted

    return restart


def concatenate(judged: list[Judged], policy: ChainPolicy) -> Judged:
    """Chunks of rows sampled one after the other, as one."""
    if len(judged) == 1:
        return judged[0]
    prompts = [prompt for j in judged for prompt in j.context.prompts]
    first = judged[0].trajectory
    trajectory = replace(
        first,
        condition=policy.model.encode(Context(prompts)),
        **{name: torch.cat([getattr(j.trajectory, name) for j in judged]) for name in ("x", "mean", "std", "x0")},
    )
    parts = {name: torch.cat([j.parts[name] for j in judged]) for name in judged[0].parts}
    return Judged(trajectory, Context(prompts), torch.cat([j.outputs for j in judged]), parts)

"""Redrawn decisions: the policy's samples at given conditions, carried out by nobody."""

import torch
from torch import Tensor

from genpolicy.chain import Condition, Noise, Trajectory
from genpolicy.policy.policy import ChainPolicy
from genpolicy.rollout.micro_batch import MicroBatches, recount


def require_groups(place: Tensor, members: int) -> None:
    """Raise `ValueError` where the numbers ``place`` [B] do not name whole groups of ``members``,
    group after group.
    """
    first = place[::members, None]
    whole = ((first - first % members) + torch.arange(members)).flatten()
    if members > 1 and not torch.equal(place, whole):
        raise ValueError(
            f"place must hold whole groups of {members} consecutive numbers each, the first of"
            f" them a multiple of {members}"
        )


def redrawn(
    policy: ChainPolicy,
    condition: Condition,
    noise: Noise,
    micro_batches: MicroBatches,
    members: int = 1,
    branch_at: int | None = None,
) -> Trajectory:
    """Sample B rows of ``condition`` once more, groups of ``members`` one after the other, as many
    rows at once as memory allows.

    branch_at: the members of a group share their first ``branch_at`` steps, and only the steps
    after them are kept. A process without a row (B = 0) asks the network nothing. Raises
    `ValueError` for a branch behind the last noise of the policy's window.
    """
    window = policy.chain.stochastic
    first = window.start if branch_at is None else max(branch_at, window.start)
    if branch_at is not None and not 0 <= branch_at < window.stop:
        raise ValueError(
            f"branch_at is {branch_at}; it must be a step from 0 to {window.stop - 1}, where the"
            " window's last noise is drawn"
        )
    if not len(noise):
        return _nothing(policy, condition, range(first, window.stop))
    keep = (first, window.stop)

    def drawn(rows: slice) -> Trajectory:
        options = {"members": members, "branch_at": branch_at, "keep": keep}
        return policy.sample(condition[rows], noise[rows], **options)

    parts = micro_batches(drawn, len(noise), members, recount(policy))
    return parts[0] if len(parts) == 1 else Trajectory.cat(parts, condition)


def _nothing(policy: ChainPolicy, condition: Condition, steps: range) -> Trajectory:
    """A trajectory of no row."""
    shape = policy.model.event_shape
    x0 = torch.empty(0, *shape, device=policy.model.device)
    states = x0.new_empty(0, len(steps) + 1, *shape)
    transitions = states[:, :-1]
    return Trajectory(condition, states, transitions, transitions, x0, steps.start, start=x0)

"""Pairs out of a policy's own groups: the best member beside the worst."""

from dataclasses import dataclass

import torch
from torch import Tensor

from genpolicy.rollout.rollout import Rollout


@dataclass(frozen=True)
class Contrast:
    """Pairs of a rollout's rows, of this process.

    better, worse [b]: the rows. group [b]: whose pair it is, among the M of all processes. margin:
    the share of the M groups that have a pair.
    """

    better: Tensor
    worse: Tensor
    group: Tensor
    margin: float


def contrasted(rollout: Rollout, uniform: Tensor) -> Contrast:
    """Every row (decision) of each group's best episode with a random one of its worst; of equal
    ones the first. Groups without a difference have no pair.

    uniform [R of all processes] in [0,1): by the better row's place it says which row of the worst.
    """
    rewards, decisions = rollout.rewards, rollout.decisions
    members = rewards.shape[1]
    differs = rewards.amax(1) > rewards.amin(1)
    group = torch.as_tensor(rollout.local)[decisions.episode // members]
    member = decisions.episode % members
    better = ((member == rewards.argmax(1)[group]) & differs[group]).nonzero().flatten()
    worse = ((member == rewards.argmin(1)[group]) & differs[group]).nonzero().flatten()

    # the rows of the worst episodes stand together, group after group, as the better ones' do
    counts = torch.zeros(len(rewards), dtype=torch.long).index_add(
        0, group[worse], torch.ones_like(worse)
    )
    first = counts.cumsum(0) - counts
    of = group[better]
    place = (uniform[decisions.place[better]] * counts[of]).long()
    return Contrast(better, worse[first[of] + place], of, float(differs.double().mean()))

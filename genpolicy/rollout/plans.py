"""The plans of the episodes that are being played: all that a warm start remembers."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from genpolicy.chain import Condition, Noise, Trajectory
from genpolicy.policy.policy import ChainPolicy


class Plans:
    """The latest plan of every episode, by its number.

    An episode's first decision finds none and begins from noise, whatever the others are at; the
    plan of an episode that no longer decides is forgotten.
    """

    def __init__(self, policy: ChainPolicy) -> None:
        self.policy = policy
        self._latest: dict[int, Tensor] = {}

    def sample(
        self,
        episodes: Sequence[int],
        condition: Condition,
        noise: Noise,
        *,
        keep: tuple[int, int] | None = None,
    ) -> Trajectory:
        """Decide in ``episodes``, a row each: `ChainPolicy.sample`, from the plan of the decision
        before where the policy has a warm start and the episode a plan. Such trajectories keep no
        step.
        """
        policy = self.policy
        if policy.warm is None:
            return policy.sample(condition, noise, keep=keep)
        begun = torch.tensor([episode in self._latest for episode in episodes])
        fresh, going = (~begun).nonzero().flatten(), begun.nonzero().flatten()
        drawn: list[Trajectory] = []
        if len(fresh):
            drawn.append(policy.sample(condition[fresh], noise[fresh], keep=(0, 0)))
        if len(going):
            previous = torch.stack([self._latest[episodes[row]] for row in going.tolist()])
            drawn.append(policy.sample(condition[going], noise[going], previous=previous))
        trajectory = _joined(drawn, condition, torch.cat([fresh, going]).argsort())
        self._latest = dict(zip(episodes, trajectory.x0, strict=True))
        return trajectory


def _joined(drawn: Sequence[Trajectory], condition: Condition, order: Tensor) -> Trajectory:
    """The results of several trajectories that keep no step, their rows in ``order``."""
    x0 = torch.cat([one.x0 for one in drawn])[order]
    starts = [one.start for one in drawn if one.start is not None]
    start = torch.cat(starts)[order] if len(starts) == len(drawn) else None
    empty = x0[:, None][:, :0]
    return replace(
        drawn[0], condition=condition, x=empty, mean=empty, std=empty, x0=x0, start=start
    )

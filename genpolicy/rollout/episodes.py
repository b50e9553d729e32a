"""Episodes: a policy acts in environments, decision by decision, until every episode has ended."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from genpolicy.chain import Noise, Trajectory
from genpolicy.contracts.task import Context, Environments, TaskStep
from genpolicy.policy.policy import ChainPolicy
from genpolicy.rollout.plans import Plans

Watch = Callable[[Sequence[int], Sequence[int], Context, Tensor, TaskStep], None]
"""(slots, episodes, what they saw, the action [n,1,D], what came of it): called at every
environment step.
"""


@dataclass(frozen=True)
class Decision:
    """One decision of n environments at once: where (``slots``), whose (``episode`` [n], the
    ``h``-th of each [n]), what they saw, what was sampled, the actions Float[n,T,D] as executed,
    and what came of it.
    """

    slots: Sequence[int]
    episode: Tensor
    h: Tensor
    context: Context
    trajectory: Trajectory
    actions: Tensor
    step: TaskStep


def reset_seed(seed: int, iteration: int, group: int) -> int:
    """The seed from which every member of a group begins its episode: a pure function, 31 bits."""
    return int(
        np.random.SeedSequence([seed % 2**64, iteration + 1, group]).generate_state(1)[0] >> 1
    )


@torch.no_grad()
def play(
    policy: ChainPolicy,
    environments: Environments,
    seeds: Sequence[int],
    noise: Noise,
    *,
    keep: tuple[int, int] | None = None,
    watch: Watch | None = None,
) -> Iterator[Decision]:
    """Play an episode for each of the reset ``seeds``, as many at once as there are environments.

    noise: a row for each episode. An episode is a function of its seed and its noise alone: in
    which slot it runs, and what runs beside it, changes nothing (beyond the rounding of batched
    matrix products). keep: the denoising steps to record, by default the stochastic window. watch:
    looks at every single environment step (chunks are then carried out action by action, with the
    same result).
    """
    decided = torch.zeros(len(seeds), dtype=torch.long)
    plans = Plans(policy)
    waiting = list(range(len(seeds)))[::-1]
    slots = list(range(min(environments.count, len(seeds))))
    playing = [waiting.pop() for _ in slots]
    context = environments.reset(slots, [seeds[e] for e in playing])
    while playing:
        episode = torch.tensor(playing)
        rows = noise[episode].at(decided[episode])
        trajectory = plans.sample(playing, policy.model.encode(context), rows, keep=keep)
        actions = policy.actions(trajectory.x0).float().cpu()
        if watch is None:
            step = environments.step(slots, actions)
        else:
            step = singly(environments, slots, playing, context, actions, watch)
        if step.actions is not None:  # a person may have acted
            actions = step.actions
        yield Decision(slots, episode, decided[episode], context, trajectory, actions, step)
        decided[episode] += 1
        slots, playing, context = _go_on(environments, slots, playing, step, waiting, seeds)


def _go_on(
    environments: Environments,
    slots: list[int],
    playing: list[int],
    step: TaskStep,
    waiting: list[int],
    seeds: Sequence[int],
) -> tuple[list[int], list[int], Context]:
    """Ended episodes make room for waiting ones at once, so that nobody acts on a final
    observation.
    """
    ended = (step.terminated | step.truncated).tolist()
    going = [row for row, over in enumerate(ended) if not over]
    free = [slot for slot, over in zip(slots, ended, strict=True) if over][: len(waiting)]
    begun = [waiting.pop() for _ in free]
    contexts = [step.context[torch.tensor(going, dtype=torch.long)]]
    if begun:
        contexts.append(environments.reset(free, [seeds[e] for e in begun]))
    return (
        [slots[row] for row in going] + free,
        [playing[row] for row in going] + begun,
        Context.cat(contexts),
    )


def singly(
    environments: Environments,
    slots: Sequence[int],
    playing: Sequence[int],
    context: Context,
    actions: Tensor,
    watch: Watch,
) -> TaskStep:
    """Carries out the chunk action by action: the same as in one step, with somebody watching."""
    n, length = actions.shape[:2]
    rewards, executed = torch.zeros(n, length), torch.zeros(n, dtype=torch.long)
    terminated, truncated, success = (torch.zeros(n, dtype=torch.bool) for _ in range(3))
    seen = list(range(n))  # the rows whose episode goes on
    views = [context[row : row + 1] for row in range(n)]
    for j in range(length):
        if not seen:
            break
        rows = torch.tensor(seen)
        before = Context.cat([views[row] for row in seen])
        asked = [slots[row] for row in seen]
        step = environments.step(asked, actions[rows, j : j + 1])
        watch(asked, [playing[row] for row in seen], before, actions[rows, j : j + 1], step)
        rewards[rows, j], executed[rows] = step.rewards[:, 0], j + 1
        terminated[rows], truncated[rows], success[rows] = (
            step.terminated,
            step.truncated,
            step.success,
        )
        for place, row in enumerate(seen):
            views[row] = step.context[place : place + 1]
        over = (step.terminated | step.truncated).tolist()
        seen = [row for row, ended in zip(seen, over, strict=True) if not ended]
    return TaskStep(Context.cat(views), rewards, executed, terminated, truncated, success)

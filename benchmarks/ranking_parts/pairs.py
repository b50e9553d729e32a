"""Pairs of chunks at moments of a policy's episodes, and what rollouts say of them."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.ranking_parts.moments import Moment, World, gained
from genpolicy.contracts.task import Context
from genpolicy.policy.policy import ChainPolicy
from genpolicy.training.draws import Draws


def states(
    policy: ChainPolicy, world: World, starts: Sequence[int], draws: Draws
) -> tuple[list[Moment], Context]:
    """A moment of each start's episode, before one of its decisions, and what is seen there."""
    count = len(starts)
    noise = draws.noise("episodes", 0, torch.arange(count), 0)
    begun = [Moment(seed) for seed in starts]
    now, found = list(begun), [list[tuple[Moment, Context]]() for _ in starts]
    for decision in world.decisions(policy, begun, noise):
        for row, episode in enumerate(decision.episode.tolist()):
            found[episode].append((now[episode], decision.context[row : row + 1]))
            taken = decision.actions[row, : int(decision.step.executed[row])]
            now[episode] = now[episode].after(taken)
    generator = draws.generator("which decision", 0, 0)
    chosen = [there[generator.integers(len(there))] for there in found]
    return [moment for moment, _ in chosen], Context.cat([context for _, context in chosen])


def two_chunks(policy: ChainPolicy, context: Context, draws: Draws) -> Tensor:
    """Two samples of the policy at each of P states, of which nobody chooses: [P,2,*E]."""
    plain, pair = replace(policy, best_of=1, refiner=None), torch.arange(len(context))
    every = pair.repeat_interleave(2)
    noise = replace(draws.noise("chunks", 0, every, 0), member=torch.arange(2).repeat(len(pair)))
    with torch.no_grad():
        drawn = plain.sample(plain.model.encode(context[every]), noise, keep=(0, 0))
    return drawn.x0.unflatten(0, (-1, 2))


def truths(
    policy: ChainPolicy,
    world: World,
    moments: Sequence[Moment],
    chunks: Tensor,
    rollouts: int,
    gamma: float,
    draws: Draws,
) -> tuple[Tensor, Tensor]:
    """Success and discounted return of rollouts that begin with the chunks [P,2,*E] and go on with
    the policy, both [P,2,R] fp64.
    """
    # each chunk once: simulations draw nothing
    pair = torch.arange(len(moments)).repeat_interleave(2)
    actions = policy.actions(chunks.flatten(0, 1)).float().cpu()
    step = world.carry_out([moments[p] for p in pair.tolist()], actions)
    own = gained(step, gamma)
    success = step.success.double()[:, None].repeat(1, rollouts)
    returns = own[:, None].repeat(1, rollouts)

    # what follows, where the episode goes on
    going = (~(step.terminated | step.truncated)).nonzero().flatten()
    taken = step.executed.tolist()
    after = [moments[int(pair[c])].after(actions[c, : taken[c]]) for c in going.tolist()]
    noise = draws.noise("rollouts", 0, pair[going].repeat_interleave(rollouts), 0)
    noise = replace(noise, member=torch.arange(rollouts).repeat(len(going)))
    several = [moment for moment in after for _ in range(rollouts)]
    if several:
        reached, followed = world.play(policy, several, noise, gamma)
        success[going] = reached.view(-1, rollouts)
        later = gamma ** step.executed[going].double()[:, None]
        returns[going] += later * followed.view(-1, rollouts)
    return success.unflatten(0, (-1, 2)), returns.unflatten(0, (-1, 2))

"""Part a: one decision of 40 environments by a small network, beside DPPO's arithmetic."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.speed_parts.timing import (
    STATE,
    Comparison,
    Statistics,
    compare,
    require_close,
    weights,
)
from benchmarks.speed_parts.two_network_sampler import Actor, Tables, TwoNetworkSampler
from genpolicy.chain import DDIM, Chain, FloorStd, Noise
from genpolicy.models.mlp import MLP
from genpolicy.policy.parts.base import Base
from genpolicy.policy.policy import ChainPolicy

ENVIRONMENTS, SEEN, CHUNK, ACTION = 40, 39, 4, 4
STEPS, TRAINED = 20, 10
FLOOR = 0.1


def small_policy(hidden: int, blocks: int) -> ChainPolicy:
    """A fresh MLP whose last steps are trained and whose first ones belong to a frozen base."""
    model = MLP(hidden=hidden, blocks=blocks, chunk=CHUNK)
    model.initialise(Statistics({STATE: (SEEN,), "action": (ACTION,)}))
    grid = model.grid(STEPS)
    base = {name: p.detach() + 0.01 * torch.randn_like(p) for name, p in model.trainable().items()}
    kernel, window = FloorStd(DDIM(1.0), FLOOR), (STEPS - TRAINED, STEPS)
    chain = Chain(model.schedule, grid, kernel, window)
    return ChainPolicy(model, chain).attach("base", Base(base, float(grid[window[0]])))


def dppo(policy: ChainPolicy, hidden: int, blocks: int) -> TwoNetworkSampler:
    """DPPO's sampler on the same two networks and the same noise levels."""
    size = CHUNK * ACTION, SEEN, hidden, blocks
    frozen, tuned = Actor(*size), Actor(*size)
    base = policy.parts["base"]
    assert isinstance(base, Base)
    for actor, values in (
        (frozen, list(base.weights.values())),
        (tuned, list(policy.model.trainable().values())),
    ):
        for parameter, value in zip(actor.parameters(), values, strict=True):
            parameter.data.copy_(value)
    times = policy.chain.grid.flip(0)
    position = (100 * times[1:]).round() - 1  # of the hundred levels that the model knows
    tables = Tables.of(policy.model.schedule.alpha(times) ** 2, position)
    return TwoNetworkSampler(frozen, tuned, tables, TRAINED, FLOOR)


@torch.no_grad()
def require_same_steps(
    policy: ChainPolicy, sampler: TwoNetworkSampler, condition: Tensor, noise: Noise
) -> None:
    """The published form of the floor, step by step: the same mean and std from the same state."""
    kernel = FloorStd(DDIM(1.0), FLOOR, consistent=False)
    published = replace(policy, chain=replace(policy.chain, kernel=kernel))
    chains = published.sample(condition, noise)
    for k in chains.steps:
        level = torch.full((len(condition),), STEPS - 1 - k)
        mean, std = sampler.transition(chains.before(k), level, condition)
        acted = chains.acted(k)
        require_close(f"a, mean of step {k}", acted.mean, mean, 1e-4)
        require_close(f"a, std of step {k}", acted.std, std, 1e-6)


def sampling(repeats: int) -> Iterator[Comparison]:
    """Times the way from the normalised observation to the chunk and the kept steps. Both sides
    draw their noise: ours row by row from a counter, DPPO's from torch's stream.
    """
    for hidden, blocks in ((512, 1), (256, 2)):
        policy = small_policy(hidden, blocks)
        sampler = dppo(policy, hidden, blocks)
        condition = torch.randn(ENVIRONMENTS, SEEN)
        noise = Noise.rows(0, 0, torch.arange(ENVIRONMENTS), 1)
        require_same_steps(policy, sampler, condition, noise)
        counted = [0, 0]
        before = policy.model.evaluations
        policy.sample(condition, noise)
        counted[0] = round((policy.model.evaluations - before) / ENVIRONMENTS)
        handles = [
            actor.register_forward_hook(lambda *_, c=counted: c.__setitem__(1, c[1] + 1))
            for actor in (sampler.frozen, sampler.tuned)
        ]
        sampler.sample(condition, policy.model.event_shape)
        for handle in handles:
            handle.remove()
        size = f"K {STEPS}, K' {TRAINED}, {weights(sampler.tuned) / 1e6:.2f} M weights"
        evaluations = f"evaluations {counted[0]} against {counted[1]}"
        yield compare(
            f"a: sampling, {ENVIRONMENTS} environments, {size}; {evaluations}",
            lambda p=policy, c=condition, n=noise: p.sample(c, n),
            lambda p=policy, c=condition, s=sampler: s.sample(c, p.model.event_shape),
            repeats,
        )

"""The base of the noisier steps: each row gets the network of its own time."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from genpolicy.chain import DDIM, Chain, Noise, Prediction, Trajectory
from genpolicy.contracts.task import Context
from genpolicy.models.toy import Toy
from genpolicy.policy.parts.base import Base
from genpolicy.policy.policy import ChainPolicy

K, ROWS = 6, 8
FIRST = 3
"""The first step of the network that learns."""
BOTH_SIDES = torch.tensor([0, 3, 5, 1, 4, 2, 3, 0])


@dataclass(frozen=True)
class Drawn:
    """A policy whose base and network differ, the two alone, and chains that it has drawn."""

    both: ChainPolicy
    base: ChainPolicy
    network: ChainPolicy
    chains: Trajectory


@pytest.fixture
def drawn() -> Drawn:
    old: Any = Toy()
    model: Any = Toy()
    chain = Chain(model.schedule, model.grid(K), DDIM(1.0), (0, K - 1))
    base, network = ChainPolicy(old, chain, 2.0), ChainPolicy(model, chain, 2.0)
    above = float(chain.grid[FIRST])
    both = network.attach("base", Base(dict(old.trainable()), above))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.trainable().values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    condition = model.encode(Context(["bright", "dark"] * (ROWS // 2)))
    chains = both.sample(condition, Noise.rows(0, 0, torch.arange(ROWS), 1), keep=(0, K))
    return Drawn(both, base, network, chains)


def predicted(policy: ChainPolicy, chains: Trajectory, k: torch.Tensor) -> torch.Tensor:
    """x0 that a policy predicts for each row at its own step, [B,*E]."""
    return policy.denoiser(chains.before(k), policy.chain.grid[k], chains.condition).x0


def test_each_row_gets_the_network_of_its_own_time(drawn: Drawn):
    found = predicted(drawn.both, drawn.chains, BOTH_SIDES)
    base, network = (predicted(p, drawn.chains, BOTH_SIDES) for p in (drawn.base, drawn.network))
    for row, k in enumerate(BOTH_SIDES.tolist()):
        own, other = (base, network) if k < FIRST else (network, base)
        assert torch.allclose(found[row], own[row], atol=1e-6)
        assert not torch.allclose(found[row], other[row], atol=1e-3), "control"


def test_rows_on_both_sides_are_scored_as_row_by_row(drawn: Drawn):
    k = BOTH_SIDES.clamp(max=K - 2)
    together = drawn.both.transition(drawn.chains, k)
    for row, step in enumerate(k.tolist()):
        alone = drawn.both.transition(drawn.chains[row : row + 1], step)
        assert torch.allclose(together.mean[row], alone.mean[0], atol=1e-6)
        assert torch.allclose(together.mean[row], drawn.chains.mean[row, step], atol=1e-6)


def test_only_rows_of_the_network_that_learns_have_a_gradient(drawn: Drawn):
    with torch.enable_grad():
        x0 = predicted(drawn.both, drawn.chains, BOTH_SIDES)
    parameters = list(drawn.network.model.trainable().values())
    learned = BOTH_SIDES >= FIRST
    for rows, moves in ((learned, True), (~learned, False)):
        found = torch.autograd.grad(x0[rows].sum(), parameters, retain_graph=True)
        assert any(float(g.abs().max()) > 0 for g in found) is moves
    alone = predicted(drawn.network, drawn.chains, BOTH_SIDES)[learned].sum()
    expected = torch.autograd.grad(alone, parameters)
    found = torch.autograd.grad(x0.sum(), parameters)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected, strict=True))


def test_both_sides_cost_no_more_evaluations_than_rows(drawn: Drawn):
    model = drawn.network.model
    plain = replace(drawn.both, guidance=1.0)
    for k in (BOTH_SIDES, torch.zeros(ROWS, dtype=torch.long), torch.full((ROWS,), K - 1)):
        counted = model.evaluations
        with torch.no_grad():
            predicted(plain, drawn.chains, k)
        assert model.evaluations == counted + ROWS


@pytest.mark.parametrize("step", [0, FIRST - 1, FIRST, K - 1])
def test_rows_on_one_side_are_evaluated_together_to_the_bit(drawn: Drawn, step: int):
    k = torch.full((ROWS,), step)
    own = drawn.base if step < FIRST else drawn.network
    assert torch.equal(predicted(drawn.both, drawn.chains, k), predicted(own, drawn.chains, k))


def test_a_row_whose_tokens_lie_on_both_sides_is_the_bases(drawn: Drawn):
    """...and no row at all is no error."""
    seen = []

    def denoise(x, t, condition):
        seen.append((torch.is_grad_enabled(), t))
        return Prediction(x, x)

    handed = drawn.both.base
    assert handed is not None
    t = torch.tensor([[0.0, 1.0], [0.0, 0.1], [1.0, 1.0]], dtype=torch.float64)
    x = torch.arange(3.0)[:, None].expand(3, 2).contiguous()
    found = handed(denoise)(x, t, torch.zeros(3, 1))
    assert torch.equal(found.x0, x)
    assert [(grad, len(times)) for grad, times in seen] == [(False, 2), (True, 1)]
    none = handed(denoise)(x[:0], t[:0], torch.zeros(0, 1))
    assert len(none.x0) == 0

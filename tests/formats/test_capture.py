"""What is written down of a policy is what acts, to the bit."""

import pytest
import torch
from torch import Tensor

from genpolicy.chain import Noise
from genpolicy.chain.noise import PRIOR
from genpolicy.formats._capture import Draws, acting, captured, decide, doubled, noise_shape
from genpolicy.formats._parity import observations
from genpolicy.policy.policy import ChainPolicy
from tests.formats.policies import DRAWS, ODE, POLICIES, mlp, policy

ROWS = 5
ROUNDED = {"the best two of four refined"}
"""Policies whose graph takes its gradients of other rows' memory: equal but for the last bit."""


def given(acts: ChainPolicy, rows: int = ROWS) -> tuple[Tensor, ...]:
    """Observations and noise of so many rows."""
    generator = torch.Generator().manual_seed(3)
    seen = observations(acts.model, None, generator)["random"]  # type: ignore[arg-type]
    noise = torch.randn(rows, *noise_shape(acts), generator=generator)
    return *(value[:rows] for value in seen.values()), noise


@pytest.mark.parametrize("name", POLICIES)
def test_the_graph_is_the_policy_to_the_bit(name: str) -> None:
    acts = POLICIES[name]()
    assert noise_shape(acts) == (DRAWS.get(name, 1), *acts.model.event_shape)
    shown = given(acts)
    with torch.no_grad():
        graph = captured(acting(acts), *shown)
        other = tuple(value.flip(0) for value in shown)
        for inputs in (shown, other):
            said, does = graph(*inputs), acting(acts)(*inputs)
            if name in ROUNDED:
                torch.testing.assert_close(said, does, rtol=1e-6, atol=0)
            else:
                assert torch.equal(said, does)
        # the control: the graph does depend on every one of its inputs
        for place in range(len(shown)):
            moved = [value + (number == place) for number, value in enumerate(shown)]
            assert not torch.equal(graph(*moved), graph(*shown))


def test_the_noise_handed_in_is_the_noise_of_the_chain() -> None:
    """Draws in the order of the steps, of best-of-N those of one sample together."""
    for name in ("noisy steps", "best of 4"):
        acts = POLICIES[name]()
        *seen, _ = given(acts)
        observation = dict(zip(acts.model.shapes, seen, strict=True))  # type: ignore[attr-defined]
        names = Noise(5, 0, torch.arange(ROWS), torch.zeros(ROWS, dtype=torch.long))
        shape = acts.model.event_shape
        steps = [PRIOR, *(k for k in acts.chain.stochastic if acts.chain.acting[k].noisy)]
        every = names.fan(acts.best_of) if acts.best_of > 1 else names
        draws = torch.stack([every(k, shape) for k in steps], 1).reshape(ROWS, -1, *shape)
        with torch.no_grad():
            assert torch.equal(
                decide(acts, observation, Draws(draws))[0], decide(acts, observation, names)[0]
            )
            assert not torch.equal(
                decide(acts, observation, Draws(draws.flip(1)))[0],
                decide(acts, observation, names)[0],
            )


def test_a_weight_is_one_constant_however_many_steps_use_it() -> None:
    sizes = []
    for steps in (2, 10):
        acts = policy(mlp(), steps=steps, kernel=ODE)
        graph = captured(acting(acts), *given(acts, 1))
        sizes.append(sum(value.numel() for value in graph.buffers() if value.numel() > 100))
    assert sizes[0] == sizes[1] > 1000


def test_the_graph_in_fp64_is_the_same_function_more_exactly() -> None:
    acts = POLICIES["two steps"]()
    shown = given(acts)
    with torch.no_grad():
        single = acting(acts)(*shown)
        double = doubled(captured(acting(acts), *shown))(*(value.double() for value in shown))
    assert double.dtype == torch.float64
    assert 0 < float((single - double).abs().max()) < 0.05

"""The policy of tokens: its loss is the likelihood of what it draws, and it draws by noise alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genpolicy.chain import DDIM, Chain, Noise
from genpolicy.config.errors import ConfigError
from genpolicy.config.schema import ChainConfig
from genpolicy.contracts.model import TokenModel
from genpolicy.models._token_networks import TOP, drawn
from genpolicy.models.mlp import MLP
from genpolicy.models.tokens import Tokens
from genpolicy.policy.policy import ChainPolicy
from genpolicy.policy.sampler import make_policy
from tests.models.test_mlp import Recorded

ODE = {"name": "ddim", "eta": 0.0}


def made(**settings: Any) -> Tokens:
    torch.manual_seed(0)
    model = Tokens(**{"hidden": 16, "blocks": 1, "chunk": 2, "bins": 8, **settings})
    model.initialise(Recorded())
    return model


def policy(model: Any) -> ChainPolicy:
    return ChainPolicy(model, Chain(model.schedule, model.grid(1), DDIM(0.0)))


def seen(model: Any, count: int) -> Tensor:
    context, _, _ = Recorded().rows(torch.arange(count), model.history, model.horizon)
    return model.encode(context)


def events(model: Any, count: int) -> Tensor:
    return torch.rand(count, *model.event_shape) * 2 - 1


def test_tokens_are_a_token_model_and_an_mlp_is_none() -> None:
    assert isinstance(made(), TokenModel)
    other = MLP(hidden=8)
    other.initialise(Recorded())
    assert not isinstance(other, TokenModel)


def test_the_loss_is_the_mean_negative_log_likelihood_counted_by_hand() -> None:
    model = made()
    condition, event = seen(model, 5), events(model, 5)
    t, noise = torch.ones(5).double(), torch.randn_like(event)
    loss = policy(model).supervised_loss(condition, event, t, noise)
    weights, blocks = dict(model._network.named_parameters()), model._network.blocks
    for row in range(5):
        said = ((event[row].flatten() + 1) / 2 * 8).long()
        total = torch.zeros(())
        for dim in range(8):
            hidden = weights["enter.weight"] @ condition[row] + weights["enter.bias"]
            hidden = hidden + weights["place"][dim]
            for before in range(dim):
                hidden = hidden + model._network.table[said[before]] @ weights["said"][before]
            for block in blocks:
                hidden = hidden + block(hidden)
            logits = torch.nn.functional.silu(hidden) @ weights["leave.weight"].T
            logits = logits + weights["leave.bias"]
            total = total - logits.log_softmax(-1)[said[dim]]
        assert loss[row].item() == pytest.approx(total.item() / 8, rel=1e-5)
    # neither noise nor time is in it, and what a mask leaves out does not count
    again = policy(model).supervised_loss(condition, event, t / 2, -noise)
    assert torch.equal(loss, again)
    first = torch.arange(2)[:, None].expand(2, 4) == 0
    masked = policy(model).supervised_loss(condition, event, t, noise, first)
    assert torch.equal(masked, model.token_losses(condition, event)[:, 0].mean(1))


def changed_logits(network: Any, tokens: Tensor, condition: Tensor) -> list[list[bool]]:
    """[j][d]: the logits of dim d change with the token of dim j."""
    before = network(tokens, condition)
    found = []
    for j in range(tokens.shape[1]):
        other = tokens.clone()
        other[:, j] = (other[:, j] + 3) % 8
        after = network(other, condition)
        found.append([not torch.equal(before[:, d], after[:, d]) for d in range(len(before[0]))])
    return found


def test_a_tokens_logits_depend_on_those_before_it_alone() -> None:
    model = made()
    condition, tokens = seen(model, 3), model.tokens(events(model, 3))
    wanted = [[d > j for d in range(8)] for j in range(8)]
    assert changed_logits(model._network, tokens, condition) == wanted


def test_a_network_that_sees_its_own_token_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the prefix of a dim with the dim itself in it."""
    model = made()
    condition, tokens = seen(model, 3), model.tokens(events(model, 3))
    network = model._network

    def leaky(said: Tensor, seen: Tensor) -> Tensor:
        summed = torch.einsum("bdf,dfh->bdh", network.table[said[:, :-1]], network.said).cumsum(1)
        summed = torch.cat([summed, summed[:, -1:]], 1)
        return network._read(network.enter(seen)[:, None] + summed + network.place)

    wanted = [[d > j for d in range(8)] for j in range(8)]
    assert changed_logits(leaky, tokens, condition) != wanted


def test_the_drawing_and_the_loss_have_the_same_logits() -> None:
    """The generation's own likelihood, from its uniform numbers, is the loss of what it says."""
    model = made(bins=4, chunk=1)
    condition = seen(model, 1).expand(200_000, -1)
    x0 = policy(model).sample(condition, Noise.rows(0, 0, torch.arange(200_000), 1)).x0
    tokens = model.tokens(x0)
    # every pair of the first two tokens, against p(a) p(b | a): chi-square with 15 degrees
    grid = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    said = torch.cat([grid, torch.zeros(16, 2, dtype=torch.long)], 1)
    logs = model._network(said, condition[:16]).log_softmax(-1)
    rows = torch.arange(16)
    expected = (
        (logs.detach()[rows, 0, grid[:, 0]] + logs.detach()[rows, 1, grid[:, 1]]).exp().double()
    )
    counts = torch.bincount(tokens[:, 0] * 4 + tokens[:, 1], minlength=16).double()
    assert expected.sum() == pytest.approx(1, abs=1e-5)

    def chi_square(probability: Tensor) -> float:
        wanted = 200_000 * probability
        return float(((counts - wanted) ** 2 / wanted).sum())

    assert chi_square(expected) < 37.7  # its .999 quantile
    # the negative control: tokens that did not hear those before them
    marginal = expected.view(4, 4)
    independent = marginal.sum(1)[:, None] * marginal.sum(0)
    assert chi_square(independent.flatten()) > 37.7
    # inside a bin the draws are spread evenly
    within = (x0.flatten(1) + 1) * 2 % 1
    assert within.mean() == pytest.approx(0.5, abs=0.002)
    assert within.std() == pytest.approx(12**-0.5, abs=0.002)


def test_no_token_without_probability_is_drawn() -> None:
    logits = torch.zeros(4, 128)
    logits[:, -3:] = -200.0
    logits[:, 0] = -200.0
    token, within = drawn(logits, torch.tensor([0.0, TOP, 1.0, 0.5]))
    assert token.tolist() == [1, 124, 124, 63]
    assert bool(((within > 0) & (within < 1)).all())


def test_a_sample_is_a_function_of_noise_and_of_what_is_seen_alone() -> None:
    model = made()
    condition, noise = seen(model, 6), Noise.rows(3, 1, torch.arange(6), 1)
    first = policy(model).sample(condition, noise)
    torch.manual_seed(9)
    assert torch.equal(first.x0, policy(model).sample(condition, noise).x0)
    assert first.start is not None
    assert torch.equal(first.x0, model.denoise(first.start, torch.ones(6), condition).x0)
    assert model.evaluations == 6 + 6 + 6 * 2  # the last with a graph
    # rows know nothing of one another, and both noise and condition matter
    alone = policy(model).sample(condition[2:3], noise[torch.tensor([2])]).x0
    assert (alone - first.x0[2:3]).abs().max() < 1e-5
    other = policy(model).sample(condition, Noise.rows(4, 1, torch.arange(6), 1)).x0
    assert not torch.equal(first.x0, other)
    assert not torch.equal(first.x0, policy(model).sample(condition.flip(0), noise).x0)
    # no gradient is promised through tokens, and the range of the data is kept
    assert first.x0.abs().max() < 1


def test_what_is_said_is_read_as_the_tokens_that_said_it() -> None:
    model = made(bins=128)
    condition = seen(model, 200)
    x = torch.randn(200, *model.event_shape)
    uniform = (1 + torch.erf(x.flatten(1) * 0.5**0.5)) / 2
    places = model._network.generate(uniform, condition)
    x0 = model.denoise(x, torch.ones(200), condition).x0
    assert torch.equal(model.tokens(x0), places.floor().long())
    outside = torch.full((1, *model.event_shape), 7.0)
    assert model.tokens(outside).unique().tolist() == [127]
    assert model.tokens(-outside).unique().tolist() == [0]


def test_a_saved_one_is_restored_bit_for_bit(tmp_path: Path) -> None:
    model = made(history=2, inputs=["observation.state"], bins=16)
    model.save(tmp_path)
    again = Tokens(pretrained=str(tmp_path))
    assert (again.history, again.bins, again.hidden) == (2, 16, 16)
    assert (again.shapes, again.event_shape) == (model.shapes, model.event_shape)
    context, actions, _ = Recorded().rows(torch.arange(6), 2, model.horizon)
    condition, event = model.encode(context), model.event(actions)
    x = torch.randn_like(event)
    assert torch.equal(again.encode(context), condition)
    assert torch.equal(
        again.denoise(x, torch.ones(6), condition).x0, model.denoise(x, torch.ones(6), condition).x0
    )
    assert torch.equal(again.token_losses(condition, event), model.token_losses(condition, event))
    assert torch.equal(again.decode(x), model.decode(x))
    with pytest.raises(FileNotFoundError, match="is no saved tokens"):
        Tokens(pretrained=str(tmp_path / "nowhere"))


def test_every_parameter_learns_and_the_condition_is_seen() -> None:
    model = made(history=2)
    condition = seen(model, 64).requires_grad_(True)
    model.token_losses(condition, events(model, 64)).sum().backward()
    assert all(
        p.grad is not None and bool(p.grad.abs().max() > 0) for p in model.trainable().values()
    )
    assert condition.grad is not None
    assert bool((condition.grad.abs().amax(0) > 0).all())


@pytest.mark.parametrize(
    ("sampler", "said"),
    [
        ({"steps": 2}, "in one step from pure noise, and steps is 2"),
        ({"steps": 1, "start": 0.5}, "start 0.5"),
        ({"steps": 1, "window": (0, 1)}, "leave window out"),
        ({"steps": 1, "warm": {"name": "sdedit", "steps": 1}}, "leave warm out"),
    ],
)
def test_a_chain_that_a_policy_of_tokens_can_not_walk_is_refused(
    sampler: dict[str, Any], said: str
) -> None:
    make_policy(made(), ChainConfig(steps=1, kernel=ODE))
    with pytest.raises(ConfigError, match=said):
        make_policy(made(), ChainConfig(**{"kernel": ODE, **sampler}))


def test_settings_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="bins"):
        Tokens(bins=1)


def test_there_is_no_output_error() -> None:
    model = made()
    event = events(model, 2)
    with pytest.raises(ValueError, match="no output at a noisy x_t"):
        policy(model).output_error(seen(model, 2), event, torch.ones(2), event)


def fitted(model: Any, target: Tensor, updates: int) -> Tensor:
    """What a policy says, [4000], after cloning the actions of a bandit without states."""
    acts = policy(model)
    optimizer = torch.optim.Adam(model.trainable().values(), lr=1e-2)
    condition = torch.zeros(len(target), 8)
    for _ in range(updates):
        t = torch.ones(len(target)).double()
        loss = acts.supervised_loss(condition, target, t, torch.randn_like(target)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noise = Noise.rows(0, 0, torch.arange(4000), 1)
    return acts.sample(torch.zeros(4000, 8), noise).x0.mean((1, 2))


def test_both_modes_of_a_bandit_are_kept_where_a_regression_takes_their_mean() -> None:
    """Two chunks, all dims at -.5 or all at .5: the dims must agree, and each half is a mode."""
    target = torch.where(torch.arange(64)[:, None, None] % 2 == 0, 0.5, -0.5).expand(64, 2, 4)
    said = fitted(made(bins=32, hidden=32), target, 150)
    assert (said > 0).float().mean() == pytest.approx(0.5, abs=0.03)
    assert ((said.abs() - 0.5).abs() < 0.06).float().mean() > 0.98
    # the negative control: the mean of the two is what nobody did
    torch.manual_seed(0)
    regression = MLP(family="gaussian", hidden=32, blocks=1, chunk=2)
    regression.initialise(Recorded())
    assert fitted(regression, target, 150).abs().max() < 0.1


def test_a_critic_picks_among_its_samples_as_among_any_others() -> None:
    model = made()
    condition, noise = seen(model, 6), Noise.rows(3, 1, torch.arange(6), 1)

    def value(_: Tensor, event: Tensor) -> Tensor:
        return event.flatten(1).sum(1)

    acts = policy(model)
    best = replace(acts, best_of=4, judge=value).sample(condition, noise).x0
    every = acts.sample(condition[torch.arange(6).repeat_interleave(4)], noise.fan(4)).x0
    worth = value(condition, every).view(6, 4)
    assert torch.allclose(value(condition, best), worth.amax(1))
    assert (worth.amax(1) > worth[:, 0]).any()
    assert len(worth.unique()) == 24  # no two samples are the same chunk

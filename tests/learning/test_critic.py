"""The state value: the network, what it says of a rollout, and how it learns from one."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from genpolicy.config import parse
from genpolicy.config.schema import OptimizerConfig
from genpolicy.learning.critic import STILL, Critic, StateValue, Support, pessimistic, subset_min
from genpolicy.methods.parts.baseline import DecisionValue
from genpolicy.training.experiment import train
from tests.peers import peers, together
from tests.toy_control import STATE, experiment, prepared

METHOD = {"name": "dppo", "episodes": 6, "warm_up": 0}
GAMMA, LAM = 0.9, 0.8


# -- the network -----------------------------------------------------------------------------------


def test_a_number_for_every_row():
    value = StateValue(5, hidden=16)
    features = torch.randn(7, 5)
    assert value(features).shape == (7,)
    assert torch.allclose(value(features)[3:4], value(features[3:4]), atol=1e-6)
    assert all(
        float(g.abs().max()) > 0
        for g in torch.autograd.grad(value(features).sum(), list(value.parameters()))
    )


def test_it_learns_what_a_line_can_not():
    """|x| is a function of x that no linear value knows."""

    def error(value):
        optimiser = torch.optim.Adam(value.parameters(), 1e-2)
        for _ in range(200):
            x = torch.randn(256, 2)
            loss = ((value(x).flatten() - x.abs().sum(1)) ** 2).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return float(loss.detach())

    assert error(StateValue(2, hidden=32)) < 0.05
    assert error(nn.Linear(2, 1)) > 0.5  # control


def test_features_are_standardised_and_an_event_is_not():
    critic, features, event = (
        Critic(3, event=2, members=2, hidden=8),
        5 + 0.3 * torch.randn(50, 3),
        torch.randn(50, 2),
    )
    features[:, 2] = 7.0  # it never moved
    before = critic(features, event)
    critic.scale.fit(features)
    row = critic.scale(torch.cat([features, event], 1))
    assert torch.allclose(row[:, :2].mean(0), torch.zeros(2), atol=1e-4)
    assert torch.allclose(row[:, :2].std(0, correction=0), torch.ones(2), atol=1e-4)
    assert torch.equal(row[:, 2], torch.zeros(50))
    assert torch.equal(row[:, 3:], event)
    assert critic.scale.spread[2] == STILL
    assert not torch.allclose(critic(features, event), before)


# -- the ensemble ----------------------------------------------------------------------------------


def member_by_hand(critic, member, features, event):
    """One member as an ordinary MLP of torch's own layers."""
    x = torch.cat([features, event.flatten(1)], 1)
    for layer, (weight, bias) in enumerate(zip(critic.weights, critic.biases, strict=True)):
        linear = nn.Linear(weight.shape[1], weight.shape[2])
        linear.weight.data, linear.bias.data = weight[member].T, bias[member, 0]
        x = linear(x)
        if layer < len(critic.weights) - 1:
            x = nn.SiLU()(nn.LayerNorm(x.shape[1], elementwise_affine=False)(x))
    return x


def test_an_ensemble_is_so_many_networks():
    critic = Critic(5, event=6, members=3, hidden=16, layers=2)
    features, event = torch.randn(7, 5), torch.randn(7, 2, 3)
    together_ = critic(features, event)
    assert together_.shape == (3, 7)
    alone = torch.stack([member_by_hand(critic, m, features, event).squeeze(1) for m in range(3)])
    assert torch.allclose(together_, alone, atol=1e-6)
    assert not torch.allclose(together_, alone.roll(1, 0), atol=1e-3)  # control: whose is whose


def test_members_start_apart_near_zero_and_learn_alone():
    critic = Critic(5, event=6, members=3, hidden=64)
    features, event = torch.randn(99, 5), torch.randn(99, 6)
    values = critic(features, event)
    assert float(values.detach().std(0).min()) > 1e-4, "members must start apart"
    assert float(values.detach().abs().max()) < 0.3, "near zero"
    for gradient in torch.autograd.grad(
        critic(features, event)[1].sum(), list(critic.parameters())
    ):
        assert float(gradient[1].abs().max()) > 0
        assert not gradient[[0, 2]].any(), "one member's loss teaches no other"


def test_a_state_critic_sees_no_event_and_an_event_has_a_gradient():
    critic = Critic(5, members=2, hidden=16, layers=1)
    assert critic(torch.randn(7, 5)).shape == (2, 7)
    critic, event = Critic(5, event=6, hidden=16), torch.randn(7, 2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(critic(torch.randn(7, 5), event).sum(), event)
    assert float(gradient.abs().max()) > 0


@pytest.mark.parametrize("support", [None, Support(-1, 3)])
def test_loss_per_member_and_row_and_nothing_flows_into_the_target(support):
    critic = Critic(5, event=6, members=3, hidden=16, support=support)
    features, event, target = (
        torch.randn(7, 5),
        torch.randn(7, 6),
        torch.randn(3, 7, requires_grad=True),
    )
    loss = critic.loss(features, event, target)
    assert loss.shape == (3, 7)
    assert torch.autograd.grad(loss.sum(), target, allow_unused=True, retain_graph=True) == (None,)
    assert torch.equal(critic.loss(features, event, target[1])[1], loss[1])
    if support is None:
        assert torch.allclose(loss, (critic(features, event) - target) ** 2)
    else:
        logits = critic.outputs(features, event)
        cross = nn.functional.cross_entropy(
            logits.movedim(-1, 1), support.encode(target).movedim(-1, 1).detach(), reduction="none"
        )
        assert torch.allclose(loss, cross, atol=1e-5)


@pytest.mark.parametrize("support", [None, Support(-0.5, 2.5)])
def test_an_ensemble_learns_a_function_of_both(support):
    torch.manual_seed(0)
    critic = Critic(2, event=2, members=2, hidden=32, support=support)
    optimiser = torch.optim.Adam(critic.parameters(), 1e-2)
    for _ in range(250):
        features, event = torch.rand(256, 2), torch.rand(256, 1, 2)
        truth = 2 * features[:, 0] * event[:, 0, 1]
        optimiser.zero_grad()
        critic.loss(features, event, truth).mean().backward()
        optimiser.step()
    with torch.no_grad():
        assert (
            float(((critic(features, event) - truth) ** 2).mean(1).max())
            < 0.01
            < 0.1
            < float(truth.var())
        )


# -- values as histograms --------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-100.0, 0.0)])
def test_a_histogram_says_its_value_up_to_the_ends(low, high):
    """Within 1e-4 of a bin and 1e-3 of anything;
    with no margin (a cut Gaussian) the ends are .7 of a bin inside.
    """
    values = torch.linspace(low, high, 1001, dtype=torch.float64)

    def error(support):
        histograms = support.encode(values)
        assert torch.allclose(histograms.sum(-1), torch.ones_like(values))
        return (support.decode(histograms) - values) / support.width

    support = Support(low, high)
    assert float(error(support).abs().max()) < 1.5e-4
    assert float(error(support).abs().max()) * support.width < 1e-3
    cut = error(Support(low, high, margin=0))
    assert float(cut[0]) == pytest.approx(0.69, abs=0.01) == -float(cut[-1])
    assert float(cut[300:700].abs().max()) < 1.5e-4, "far from the ends a margin changes nothing"


def test_a_histogram_is_as_wide_as_it_should_be():
    """The std of the histogram is that of N(y, s^2) and of a bin;
    with sqrt(2) s, as in public code, it is another.
    """
    support = Support(-100, 0, bins=128)
    centres = support.edges(torch.zeros(1, dtype=torch.float64))[:-1] + support.width / 2
    histogram = support.encode(torch.tensor(-50.0, dtype=torch.float64))
    std = float((histogram @ centres**2 - (histogram @ centres) ** 2).sqrt()) / support.width
    assert std == pytest.approx((0.75**2 + 1 / 12) ** 0.5, abs=1e-3)
    assert std != pytest.approx((2 * 0.75**2 + 1 / 12) ** 0.5, abs=0.1)


def test_what_a_support_can_not_say_is_its_nearer_end():
    support = Support(0, 1)
    assert torch.equal(
        support.encode(torch.tensor([-5.0, 7.0])), support.encode(torch.tensor([0.0, 1.0]))
    )


@pytest.mark.parametrize(
    "wrong", [{"low": 1, "high": 1}, {"bins": 7}, {"sigma": 0}, {"margin": -1}]
)
def test_a_support_that_is_none(wrong):
    with pytest.raises(ValueError, match="support"):
        Support(**{"low": 0, "high": 1, **wrong})


# -- how an ensemble is read -----------------------------------------------------------------------


def test_the_least_of_a_subset():
    values = torch.randn(5, 64)
    draws = torch.Generator().manual_seed(1)
    for size in range(1, 6):
        least = subset_min(values, size, draws)
        assert least.shape == (64,)
        assert (least >= values.amin(0)).all()
        assert (least <= values.amax(0)).all()
    assert torch.equal(subset_min(values, 5, draws), values.amin(0))
    again = [subset_min(values, 2, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*again)
    assert torch.equal(
        subset_min(values, 2, torch.tensor([0.9, 0.1, 0.5, 0.2, 0.7])), values[[1, 3]].amin(0)
    )
    for size in (0, 6):
        with pytest.raises(ValueError, match="valid are 1 to 5"):
            subset_min(values, size, draws)


def test_the_least_of_a_subset_on_average():
    """Two of the members 1, 2, 4, without replacement: (1 + 1 + 2) / 3;
    with it, (5 * 1 + 3 * 2 + 4) / 9.
    """
    values, draws = torch.tensor([[4.0], [1.0], [2.0]]), torch.Generator().manual_seed(0)
    found = float(torch.stack([subset_min(values, 2, draws) for _ in range(3000)]).mean())
    assert found == pytest.approx(4 / 3, abs=0.03)
    assert abs(found - 15 / 9) > 0.2


def test_pessimism_is_mean_minus_spread():
    values = torch.tensor([[1.0, 2.0], [3.0, 2.0]], requires_grad=True)
    assert pessimistic(values, 0.5).tolist() == [1.5, 2.0]
    assert torch.equal(pessimistic(values[:1], 0.5), values[0])
    (gradient,) = torch.autograd.grad(pessimistic(values, 0.5).sum(), values)
    assert torch.isfinite(gradient).all(), "also where all agree"


def trained(actions, worth):
    """Ten members that saw ``actions(rows)`` [rows,A] worth ``worth(actions)``."""
    critic = Critic(1, event=actions(1).shape[1], members=10, hidden=32)
    optimiser = torch.optim.Adam(critic.parameters(), 1e-2)
    for _ in range(300):
        seen = actions(64)
        optimiser.zero_grad()
        critic.loss(torch.ones(64, 1), seen, worth(seen)).mean().backward()
        optimiser.step()
    return lambda asked: critic(torch.ones(len(asked), 1), asked).detach()


@pytest.mark.parametrize("seed", range(3))
def test_pessimism_prefers_what_was_tried(seed):
    """The data moves one of two joints.
    Among moves of the other, the mean wants one that nobody tried.
    """
    torch.manual_seed(seed)
    values = trained(lambda rows: torch.rand(rows, 2) * torch.tensor([1.0, 0.0]), lambda a: a[:, 0])
    other = torch.linspace(-1, 1, 41)
    asked = values(torch.stack([torch.full_like(other, 0.7), other], 1))
    spread = asked.std(0, correction=0)
    assert float(spread[20]) < 0.2 * float(spread[[0, 10, 30, 40]].min())
    assert abs(float(other[pessimistic(asked, 2.0).argmax()])) <= 0.05
    assert abs(float(other[pessimistic(asked, 0.0).argmax()])) > 0.1  # control


def test_members_disagree_in_a_gap_of_the_data():
    torch.manual_seed(0)
    values = trained(
        lambda rows: (torch.rand(rows, 1) + 0.5) * torch.randn(rows, 1).sign(),
        lambda a: 2 - a[:, 0].abs(),
    )
    inside, below, above = values(torch.tensor([[0.0], [-0.6], [0.6]])).std(0).tolist()
    assert inside > 2 * max(below, above)


# -- advantages of a rollout -----------------------------------------------------------------------


class Known(nn.Module):
    """V is a fixed function of what is seen."""

    def forward(self, features):
        return features.sum(1) - 0.3 * features[:, 0] ** 2


def valued(folder, **sections):
    run, _ = prepared(folder, **{"method": METHOD, **sections})
    value = DecisionValue(run, GAMMA, LAM, 1e-2, 30, 8)
    return run, value, run.collect(6, 1)


def by_hand(run, rollout, mistake=""):
    """Episode by episode, from its last decision to its first."""
    d, model, known = rollout.decisions, run.policy.model, Known()
    seen = known(model.features(model.encode(rollout.context))).double()
    final = known(model.features(model.encode(d.final))).double()
    advantage, following = torch.zeros_like(seen), 0.0
    for row in reversed(range(len(seen))):
        n = int(d.executed[row])
        reward = sum(GAMMA**j * float(d.rewards[row, j]) for j in range(n))
        if bool(d.terminated[row]):
            after = 0.0
        elif bool(d.last[row]):
            after = float(final[int(d.episode[row])])
            if mistake == "the next episode's first observation":
                after = float(seen[(row + 1) % len(seen)])
            if mistake == "a cut is an end":
                after = 0.0
        else:
            after = float(seen[row + 1])
        delta = reward + GAMMA**n * after - float(seen[row])
        following = delta if bool(d.last[row]) else delta + GAMMA**n * LAM * following
        advantage[row] = following
    return advantage, seen


@pytest.mark.parametrize("limit", [6, 10])
def test_advantages_by_hand(tmp_path, limit):
    """Limit 6 with chunks of 4: the last decision of a cut episode takes 2 steps."""
    run, value, rollout = valued(tmp_path, task={"name": "tests.toy_control:Point", "limit": limit})
    value.value = Known()
    advantage, returns = value.advantage(rollout)
    expected, seen = by_hand(run, rollout)
    assert torch.allclose(advantage, expected, atol=1e-5)
    assert torch.allclose(returns, (expected + seen).float(), atol=1e-5)
    d = rollout.decisions
    assert (d.last & ~d.terminated).any(), "an episode must be cut for this to say anything"
    for mistake in ("the next episode's first observation", "a cut is an end"):
        assert not torch.allclose(advantage, by_hand(run, rollout, mistake)[0], atol=1e-2)


def test_episodes_that_end_need_no_final_observation(tmp_path):
    run, value, rollout = valued(tmp_path)
    value.value = Known()
    d = rollout.decisions
    ended = replace(rollout, decisions=replace(d, terminated=d.terminated | d.last))
    ruined = replace(
        d.final, observation={n: v * float("nan") for n, v in d.final.observation.items()}
    )
    advantage, _ = value.advantage(replace(ended, decisions=replace(ended.decisions, final=ruined)))
    assert torch.isfinite(advantage).all()
    assert torch.allclose(advantage, by_hand(run, ended)[0], atol=1e-5)


def test_a_final_observation_is_not_an_observation_to_act_on(tmp_path):
    _, _, rollout = valued(tmp_path)
    final, seen = rollout.decisions.final.observation[STATE], rollout.context.observation[STATE]
    assert not any(torch.equal(f, s) for f in final for s in seen)


def test_how_much_the_value_explains(tmp_path):
    """1 - Var(A) / Var(A + V): 1 where nothing is unexpected,
    0 or less where the value says nothing.
    """
    run, value, rollout = valued(tmp_path)
    advantage, returns = value.advantage(rollout)
    expected = 1 - float(advantage.var(correction=0) / returns.double().var(correction=0))
    assert run.metrics.close()["critic/explained"] == pytest.approx(expected, abs=1e-4)
    for _ in range(10):
        value.learn(rollout, returns)
        advantage, returns = value.advantage(rollout)
    learned = run.metrics.numbers["critic/explained"]
    assert learned[-1] > max(learned[0], 0.5)


# -- learning --------------------------------------------------------------------------------------


def test_it_regresses_on_the_returns(tmp_path):
    run, value, rollout = valued(tmp_path)
    returns = torch.randn(len(rollout.trajectory))
    features = run.policy.model.features(rollout.trajectory.condition)

    def error():
        return float(((value.value(features) - returns) ** 2).mean().detach())

    start, policy = error(), run.weights()
    for _ in range(5):
        value.learn(rollout, returns)
    assert error() < 0.3 * start
    assert all(torch.equal(a, b) for a, b in zip(policy.values, run.trainable, strict=True)), (
        "the policy is left alone"
    )


def test_one_update_is_the_gradient_of_the_mean_square(tmp_path):
    run, value, rollout = valued(tmp_path)
    value.epochs, value.minibatch = 1, 10**6
    returns = torch.randn(len(rollout.trajectory))
    features = run.policy.model.features(rollout.trajectory.condition)
    loss = ((value.value(features) - returns) ** 2).mean()
    expected = torch.autograd.grad(loss, list(value.value.parameters()))
    norm = float(torch.stack([g.norm() for g in expected]).norm())
    value.learn(rollout, returns)
    for parameter, gradient in zip(value.value.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient / max(1.0, norm), rtol=1e-3, atol=1e-6)
    metrics = run.metrics.close()
    assert metrics["critic/loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert metrics["critic/grad_norm"] == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("minibatch", [1000, 8])
def test_two_processes_learn_as_one(tmp_path, minibatch):
    found = []
    for count in (1, 2):
        built, accelerators = [], peers(count)
        for index, accelerator in enumerate(accelerators):
            folder = tmp_path / f"{count}-{index}"
            folder.mkdir()
            run, _ = prepared(folder, accelerator, method=METHOD)
            torch.manual_seed(0)
            value = DecisionValue(run, GAMMA, LAM, 1e-2, 3, minibatch)
            # Adam's own eps makes steps of rounding errors, where a gradient is nearly none
            settings = OptimizerConfig(lr=1e-2, weight_decay=0.0, eps=1e-3)
            value.optimizer = run.new_optimizer(value.value.parameters(), settings)
            built.append((run, value))

        def learn(run, value):
            rollout = run.collect(6, 1)
            advantage, returns = value.advantage(rollout)
            value.learn(rollout, returns)
            return (
                [p.detach().clone() for p in value.value.parameters()],
                advantage,
                rollout.decisions.place,
            )

        found.append(together([partial(learn, *pair) for pair in built], accelerators))
    (one, advantage, _), *_ = found[0]
    for weights, own, place in found[1]:
        assert max(float((a - b).abs().max()) for a, b in zip(one, weights, strict=True)) < 1e-5
        assert torch.allclose(own, advantage[place], atol=1e-4)


def test_value_and_optimiser_are_saved_with_the_run(tmp_path):
    raw = experiment(tmp_path, method=METHOD, budget={"iterations": 2})
    state = torch.load(train(parse.parse(raw)).folder / "checkpoints/2/state.pt", weights_only=True)
    own = {"spent", "replay_check", "deployment"}
    assert set(state["kept"]) == own | {"value", "value_optimizer"}
    assert state["kept"]["value_optimizer"]["updates"] > 0
    run, _ = prepared(tmp_path, method=METHOD, output=str(tmp_path / "other"))
    value = DecisionValue(run, GAMMA, LAM, 1e-2, 1, 8)
    before = [p.detach().clone() for p in value.value.parameters()]
    run.state.registered["value"].load_state_dict(state["kept"]["value"])
    assert any(not torch.equal(a, b) for a, b in zip(before, value.value.parameters(), strict=True))

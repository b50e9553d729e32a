"""The state value: the network, what it says of a rollout, and how it learns from one."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from genpolicy import config
from genpolicy.decision_value import DecisionValue
from genpolicy.experiment import train
from genpolicy.learning.critic import StateValue
from tests.peers import peers, together
from tests.toy_control import STATE, experiment, prepared

METHOD = {"name": "dppo", "episodes": 6, "warm_up": 0}
GAMMA, LAM = 0.9, 0.8


# -- the network --------------------------------------------------------------------------------------------------


def test_a_number_for_every_row():
    value = StateValue(5, hidden=16)
    features = torch.randn(7, 5)
    assert value(features).shape == (7,)
    assert torch.allclose(value(features)[3:4], value(features[3:4]), atol=1e-6)
    assert all(float(g.abs().max()) > 0 for g in torch.autograd.grad(value(features).sum(), list(value.parameters())))


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


# -- advantages of a rollout ----------------------------------------------------------------------------------------


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
    ruined = replace(d.final, observation={n: v * float("nan") for n, v in d.final.observation.items()})
    advantage, _ = value.advantage(replace(ended, decisions=replace(ended.decisions, final=ruined)))
    assert torch.isfinite(advantage).all()
    assert torch.allclose(advantage, by_hand(run, ended)[0], atol=1e-5)


def test_a_final_observation_is_not_an_observation_to_act_on(tmp_path):
    _, _, rollout = valued(tmp_path)
    final, seen = rollout.decisions.final.observation[STATE], rollout.context.observation[STATE]
    assert not any(torch.equal(f, s) for f in final for s in seen)


def test_how_much_the_value_explains(tmp_path):
    """1 - Var(A) / Var(A + V): 1 where nothing is unexpected, 0 or less where the value says nothing."""
    run, value, rollout = valued(tmp_path)
    advantage, returns = value.advantage(rollout)
    expected = 1 - float(advantage.var(correction=0) / returns.double().var(correction=0))
    assert run.journal.close()["critic/explained"] == pytest.approx(expected, abs=1e-4)
    for _ in range(10):
        value.learn(rollout, returns)
        advantage, returns = value.advantage(rollout)
    learned = run.journal.numbers["critic/explained"]
    assert learned[-1] > max(learned[0], 0.5)


# -- learning ---------------------------------------------------------------------------------------------------------


def test_it_regresses_on_the_returns(tmp_path):
    run, value, rollout = valued(tmp_path)
    returns = torch.randn(len(rollout.trajectory))
    features = run.policy.model.features(rollout.trajectory.condition)

    def error():
        return float(((value.value(features) - returns) ** 2).mean().detach())

    start, policy = error(), run.snapshot()
    for _ in range(5):
        value.learn(rollout, returns)
    assert error() < 0.3 * start
    assert all(torch.equal(a, b) for a, b in zip(policy, run.trainable, strict=True)), "the policy is left alone"


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
    metrics = run.journal.close()
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
            built.append((run, DecisionValue(run, GAMMA, LAM, 1e-2, 3, minibatch)))

        def learn(run, value):
            rollout = run.collect(6, 1)
            advantage, returns = value.advantage(rollout)
            value.learn(rollout, returns)
            return [p.detach().clone() for p in value.value.parameters()], advantage, rollout.decisions.place

        found.append(together([partial(learn, *pair) for pair in built], accelerators))
    (one, advantage, _), *_ = found[0]
    for weights, own, place in found[1]:
        assert max(float((a - b).abs().max()) for a, b in zip(one, weights, strict=True)) < 1e-4
        assert torch.allclose(own, advantage[place], atol=1e-4)


def test_value_and_optimiser_are_saved_with_the_run(tmp_path):
    raw = experiment(tmp_path, method=METHOD, budget={"iterations": 2})
    state = torch.load(train(config.parse(raw)).folder / "checkpoints/2/state.pt", weights_only=True)
    assert set(state["registered"]) == {"value", "value_optimizer"}
    assert state["registered"]["value_optimizer"]["updates"] > 0
    run, _ = prepared(tmp_path, method=METHOD, output=str(tmp_path / "other"))
    value = DecisionValue(run, GAMMA, LAM, 1e-2, 1, 8)
    before = [p.detach().clone() for p in value.value.parameters()]
    run.registered["value"].load_state_dict(state["registered"]["value"])
    assert any(not torch.equal(a, b) for a, b in zip(before, value.value.parameters(), strict=True))

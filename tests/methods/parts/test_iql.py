"""Values of actions: the formulas of one update by hand,
and what they converge to on a walk whose values are known.
"""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from genpolicy.contracts.task import Context
from genpolicy.methods.parts import iql
from genpolicy.methods.parts.iql import ActionValue
from genpolicy.rollout.replay import ROWS, Replay
from genpolicy.training.processes import Processes
from tests.toy_control import prepared

GAMMA, LENGTH = 0.9, 10
HONEST = iql.Critic, iql.StateValue


def built(tmp_path, chunk=4, **options):
    """A run on the toy with chunks of so many actions, and its values."""
    run, _ = prepared(
        tmp_path,
        policy={"name": "mlp", "hidden": 16, "blocks": 1, "chunk": chunk},
        method={"name": "bc"},
    )
    return run, ActionValue(run, GAMMA, **options)


def some(rows, chunk=4, terminated=False):
    """A replay of random numbers, and features of its views."""
    draw = torch.Generator().manual_seed(1)
    random = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    executed = torch.randint(1, chunk + 1, (rows,), generator=draw)
    rewards = random(rows, chunk).double() * (torch.arange(chunk) < executed[:, None])
    end = torch.full((rows,), terminated) if isinstance(terminated, bool) else terminated
    truth, number = torch.ones(rows, dtype=torch.bool), torch.arange(rows)
    event, human = random(rows, chunk, 2), torch.zeros(rows, chunk, dtype=torch.bool)
    values = (
        number,
        number + rows,
        event,
        event,
        rewards,
        executed,
        human,
        end,
        truth,
        number,
        truth,
    )
    return Replay(Context([""] * 2 * rows), **dict(zip(ROWS, values, strict=True))), random(
        2 * rows, 4
    )


def told(run, monkeypatch):
    """Records the arguments of `learn`'s calls of `Run.descend`: (losses of all its rows, rows,
    name, optimiser), before anything has changed.
    """
    found, honest = [], run.descend

    def descend(losses, rows, name, optimizer=None):
        found.append((losses(slice(0, rows)).detach().clone(), rows, name, optimizer))
        return honest(losses, rows, name, optimizer)

    monkeypatch.setattr(run, "descend", descend)
    return found


def rows_drawn(replay, features, monkeypatch):
    """Records which rows are asked for."""
    seen, honest = [], iql.bellman_target
    number = {float(v): i for i, v in enumerate(replay.rewards.sum(1))}

    def target(rewards, *rest):
        seen.append([number[float(v)] for v in rewards.double().sum(1)])
        return honest(rewards, *rest)

    monkeypatch.setattr(iql, "bellman_target", target)
    return seen


@pytest.mark.parametrize(("pessimism", "monte_carlo"), [(0.0, 0.0), (1.0, 0.0), (1.0, 0.3)])
def test_one_update_is_the_formulas(tmp_path, monkeypatch, pessimism, monte_carlo):
    settings = {"members": 2, "pessimism": pessimism, "monte_carlo": monte_carlo, "expectile": 0.8}
    run, value = built(tmp_path, polyak=0.02, batch=1, lr=1e-3, **settings)
    for module in (value.q, value.target, value.v):
        monkeypatch.setattr(module.scale, "fit", lambda _: None)
    for module in (value.q, value.v):  # away from the start, and from the target
        for p in module.parameters():
            p.data += 0.1 * torch.randn_like(p)
    found = told(run, monkeypatch)
    for end in (False, True):
        replay, features = some(1, terminated=end)
        now, after, event = features[:1], features[1:], replay.event.float()
        with torch.no_grad():
            members = value.target(now, event)
            least = members.min() if pessimism else members.mean()
            u = least - value.v(now)[0]
            weight = 0.8 if u > 0 else 0.2
            n = int(replay.executed)
            y = sum(GAMMA**j * float(replay.rewards[0, j]) for j in range(n))
            own = y
            y += 0.0 if end else GAMMA**n * float(value.v(after))
            y = (
                0.7 * y + 0.3 * own if monte_carlo and end else y
            )  # what came of the other is not recorded
            expected = weight * u**2 + ((y - value.q(now, event)[:, 0]) ** 2).sum()
            chunked = y if end else y + (GAMMA**4 - GAMMA**n) * float(value.v(after))
            wrong = weight * u**2 + ((chunked - value.q(now, event)[:, 0]) ** 2).sum()
        before = [p.detach().clone() for p in value.target.parameters()]
        value.learn(replay, features, 1)
        losses, rows, name, optimizer = found[-1]
        assert (rows, name) == (1, "critic")
        assert optimizer is value.optimizer
        assert float(losses) == pytest.approx(float(expected), rel=1e-4)
        if not end and n < 4:
            assert float(losses) != pytest.approx(float(wrong), rel=1e-3)
        for old, new, online in zip(
            before, value.target.parameters(), value.q.parameters(), strict=True
        ):
            assert torch.allclose(new, old + 0.02 * (online - old), atol=1e-7)
            assert not new.requires_grad
    assert run.metrics.collected == 0, (
        "its stage counts what was learned from, where nothing was played"
    )


def test_two_members_and_pessimism_one_are_read_as_their_minimum(tmp_path):
    _, value = built(tmp_path, members=2, pessimism=1.0)
    features, event = torch.randn(50, 4), torch.randn(50, 4, 2)
    least = value.q(features, event).amin(0)
    assert torch.allclose(value.lower(value.q, features, event), least, atol=1e-6)
    found = value.advantage(features, event)
    assert torch.allclose(found, least - value.v(features), atol=1e-6)
    assert not found.requires_grad
    _, hopeful = built(tmp_path, members=2, pessimism=0.0)
    assert (hopeful.lower(value.q, features, event) - least > 1e-4).any(), "control"


def one_of(count, index):
    """One of so many processes, which meets no other."""
    return Processes(SimpleNamespace(num_processes=count, process_index=index))


def test_rows_are_drawn_alike_anew_and_the_same_by_any_number_of_processes(tmp_path, monkeypatch):
    run, value = built(tmp_path, batch=30)
    replay, features = some(40)
    seen = rows_drawn(replay, features, monkeypatch)
    run.descend = lambda *_: None
    value.learn(replay, features, 3)
    whole = list(seen)
    assert len({tuple(rows) for rows in whole}) == 3
    assert len({row for rows in whole for row in rows}) > 30
    for index in range(3):
        seen.clear()
        run.processes = one_of(3, index)
        value.learn(replay, features, 3)
        assert seen == [rows[index::3] for rows in whole]
    run.processes, run.spent.iteration = one_of(1, 0), 2
    seen.clear()
    value.learn(replay, features, 3)
    assert seen != whole


def test_everything_is_resumed(tmp_path):
    run, value = built(tmp_path)
    replay, features = some(40)
    own = {"spent", "replay_check", "deployment"}  # the run's
    assert set(run.state.registered) == own | {"q", "q_target", "v", "q_optimizer"}
    value.learn(replay, features, 3)
    (tmp_path / "other").mkdir()
    resumed, other = built(tmp_path / "other")
    for name, part in run.state.registered.items():
        resumed.state.registered[name].load_state_dict(deepcopy(part.state_dict()))
    resumed.spent.iteration = run.spent.iteration = 2
    (tmp_path / "third").mkdir()
    third_run, third = built(tmp_path / "third")  # control: networks without the optimiser's state
    for name in ("q", "q_target", "v"):
        third_run.state.registered[name].load_state_dict(
            deepcopy(run.state.registered[name].state_dict())
        )
    third_run.spent.iteration = 2
    for each in (value, other, third):
        each.learn(replay, features, 2)
    event = torch.randn(9, 4, 2)
    assert torch.equal(value.advantage(features[:9], event), other.advantage(features[:9], event))
    assert not torch.equal(
        value.advantage(features[:9], event), third.advantage(features[:9], event)
    )


def walk(chunk):
    """Chunks onward from every place of a walk of `LENGTH` steps, with reward 1 at the last step;
    features of places; the true V.
    """
    place = torch.arange(LENGTH)
    executed = (LENGTH - place).clamp_max(chunk)
    rewards = torch.zeros(LENGTH, chunk).double()
    ends = place + chunk >= LENGTH
    rewards[ends, executed[ends] - 1] = 1
    truth = torch.ones(LENGTH, dtype=torch.bool)
    event = torch.full((LENGTH, chunk, 2), 0.5)
    number = torch.zeros(LENGTH, dtype=torch.long)
    values = (
        place,
        (place + chunk).clamp_max(LENGTH),
        event,
        event,
        rewards,
        executed,
        torch.zeros(LENGTH, chunk, dtype=torch.bool),
        ends,
        truth,
        number,
        place == 0,
    )
    angle = torch.arange(LENGTH + 1) * torch.pi / LENGTH
    features = torch.stack([angle.cos(), angle.sin(), (2 * angle).cos(), (2 * angle).sin()], 1)
    replay = Replay(Context([""] * (LENGTH + 1)), **dict(zip(ROWS, values, strict=True)))
    return replay, features, GAMMA ** (LENGTH - 1 - place.double())


def walked(tmp_path, monkeypatch, chunk, **options):
    """Values that have learned the walk, and the walk."""
    monkeypatch.setattr(iql, "Critic", lambda *a, **k: HONEST[0](*a, **k, hidden=48))
    monkeypatch.setattr(iql, "StateValue", lambda features: HONEST[1](features, 48))
    run, value = built(tmp_path, chunk, batch=20, lr=4e-3, **options)
    run.log = lambda *_: None
    replay, features, truth = walk(chunk)
    value.learn(replay, features, 350)
    return value, replay, features, truth


def test_values_do_not_depend_on_the_features_units(tmp_path, monkeypatch):
    """The same draws of a learner that is shown .2 f + 3 for f; and the control:
    without standardising they matter.
    """

    def learned(name, shown, honest=True):
        run, value = built(tmp_path / name)
        for module in (value.q, value.target, value.v):
            generator = torch.Generator().manual_seed(0)
            for p in module.parameters():
                p.data = torch.randn(p.shape, generator=generator) / 3
            if not honest:
                monkeypatch.setattr(module.scale, "fit", lambda _: None)
        run.log = lambda *_: None
        replay, features, _ = walk(4)
        features = shown(features)
        value.learn(replay, features, 20)
        with torch.no_grad():
            return value.advantage(features[:LENGTH], replay.event)

    plain, other = learned("plain", lambda f: f), learned("other", lambda f: 0.2 * f + 3)
    assert torch.allclose(plain, other, atol=1e-4)
    assert not torch.allclose(
        learned("a", lambda f: f, False), learned("b", lambda f: 0.2 * f + 3, False), atol=1e-2
    )


@pytest.mark.parametrize(("polyak", "reached"), [(0.1, True), (0.005, False)])
def test_a_success_reaches_the_beginning_unless_the_target_is_too_slow(
    tmp_path, monkeypatch, polyak, reached
):
    """350 updates are 35 decisions at .1 and not two at .005 (the control):
    there nobody knows what the beginning is worth.
    """
    value, _, features, truth = walked(tmp_path, monkeypatch, 1, polyak=polyak)
    with torch.no_grad():
        first = float(value.v(features[:1]))
    assert (abs(first - float(truth[0])) < 0.05) == reached


@pytest.mark.parametrize("chunk", [4, 1])
def test_values_are_the_discounted_success(tmp_path, monkeypatch, chunk):
    """V(s) = Q(s, what is done) = gamma^(steps before the one that succeeds),
    in chunks or step by step.
    """
    value, replay, features, truth = walked(tmp_path, monkeypatch, chunk, polyak=0.1)
    with torch.no_grad():
        v = value.v(features[:LENGTH]).double()
        q = value.q(features[:LENGTH], replay.event).double()
    assert F.l1_loss(v, truth) < 0.03
    assert F.l1_loss(q, truth.expand(2, -1)) < 0.03
    assert value.advantage(features[:LENGTH], replay.event).abs().mean() < 0.04
    if chunk == 1:  # control: the public code discounted a single step by gamma^chunk
        wrong = GAMMA ** (4 * (LENGTH - 1 - torch.arange(LENGTH)).double())
        assert F.l1_loss(v, wrong) > 0.3
    assert float(q.max()) < 1.1, "nothing comes after the end"

"""ALOE's weights: by hand, as a person's and as the robot's, and that they rank two chunks rightly
where the returns of a bad policy do not.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from genpolicy.contracts.task import Context
from genpolicy.methods.aloe import ALOE, _Weighing
from genpolicy.methods.parts.chunk_critic import Valuing
from genpolicy.methods.parts.imitation import Imitation
from genpolicy.rollout.replay import ROWS, Replay
from tests.methods.parts.test_chunk_critic import SMALL
from tests.methods.parts.test_iql import GAMMA
from tests.toy_control import prepared

RAW = torch.tensor([0.0, 4.0, 6.0])
"""Q - V of three actions."""


def in_raw_units(most: float, beta: float = 1.0) -> ALOE:
    """Settings whose beta, a number of stds of `RAW`, is ``beta`` itself."""
    return ALOE(beta=beta / float(RAW.std(correction=0)), most=most)


# -- by hand ---------------------------------------------------------------------------------------


def test_the_clip_makes_two_good_actions_alike():
    """The weighted likelihood of uniform data is largest at the normalised weights."""
    weights = in_raw_units(math.e).weights(RAW)
    found = (weights / weights.sum()).tolist()
    assert found == pytest.approx([0.1554, 0.4223, 0.4223], abs=5e-5)


def test_without_a_clip_the_optimum_is_the_softmax_of_q():
    for beta in (1.0, 2.5):
        weights = in_raw_units(1e9, beta).weights(RAW)
        assert torch.allclose(weights / weights.sum(), (RAW / beta).softmax(0), atol=1e-6)
    clipped = in_raw_units(math.e).weights(RAW)
    assert not torch.allclose(clipped / clipped.sum(), RAW.softmax(0), atol=0.1), "control"


def test_weights_have_no_unit_and_equal_advantages_weigh_one():
    settings = ALOE(beta=0.7, most=1e9)
    assert torch.allclose(settings.weights(RAW), settings.weights(1000 * RAW), rtol=1e-5)
    assert torch.equal(settings.weights(torch.zeros(5)), torch.ones(5))


# -- in a replay -----------------------------------------------------------------------------------


def recorded(rows):
    """A replay of decisions (episode, its state, the chunk's value, reward, a person's, whether the
    episode ends there), each with a view of its own, and features of the views: state and no more.
    """
    event, now, states, views = [], [], [], 0
    for number, (_, state, done, _, _, over) in enumerate(rows):
        event.append(torch.full((2, 2), done))
        now.append(views)
        states.append(state)
        views += 1
        following = rows[number + 1 : number + 2]
        if over or not following or following[0][0] != rows[number][0]:
            states.append(3)  # what is seen at the end
            views += 1
    episode, _, _, paid, person, over = map(torch.tensor, zip(*rows, strict=True))
    now, count = torch.tensor(now), len(rows)
    rewards = torch.zeros(count, 2).double()
    rewards[:, 1] = paid
    first = torch.ones(count, dtype=torch.bool)
    first[1:] = episode[1:] != episode[:-1]
    values = (
        now,
        now + 1,
        torch.stack(event),
        torch.stack(event),
        rewards,
        torch.full((count,), 2),
        person.bool()[:, None].expand(-1, 2),
        over.bool(),
        torch.ones(count, dtype=torch.bool),
        episode,
        first,
    )
    replay = Replay(Context([""] * views), **dict(zip(ROWS, values, strict=True)))
    return replay, torch.eye(4)[torch.tensor(states)]


def weighing(folder, replay, features, samples, **settings):
    """ALOE's loop over a replay, with cached samples [F,N,*E] given by hand."""
    run, _ = prepared(
        folder,
        policy={"name": "mlp", "hidden": 16, "blocks": 1, "chunk": 2},
        method={"name": "bc"},
    )
    run.log = lambda *_: None
    read = settings.get("weigh", "critic") in ("critic", "returns")
    usual = {"gamma": GAMMA, "most": 1e3} if read else {}
    made = _Weighing(ALOE(**{**usual, **settings}), run)
    world = made.world
    world.experience = SimpleNamespace(
        replay=replay,
        features=features,
        seen=lambda rows: features[replay.now[rows]],
        learned=[replay],
    )
    world.samples = SimpleNamespace(at=lambda views: samples[views])
    world.episodes = SimpleNamespace(before=len(replay))
    if hasattr(made, "value"):
        made.value.world = world
    return made


def valued(made):
    """Makes Q the first number of a chunk."""
    made.world.critic.q.forward = lambda features, event: event.flatten(1)[:, 0].expand(2, -1)
    return made


# (episode, state, chunk, reward, a person's, over)
MIXED = [
    *[(0, 0, -0.5, 0.0, False, False), (0, 0, 0.9, 0.0, False, False)],
    *[(0, 0, 0.8, 0.0, False, False), (0, 0, -0.9, 0.0, True, False)],
    *[(0, 0, 0.9, 0.0, True, False), (0, 0, 0.2, 0.0, False, True)],
    *[(1, 0, 0.7, 0.0, False, False), (1, 0, -0.7, 0.0, False, True)],
    *[(2, 0, -0.8, 0.0, True, False), (2, 0, 0.4, 0.0, False, True)],
]
HUMAN, DOUBTED = [3, 4, 8], [1, 2]


def test_the_bootstrap_takes_each_of_a_views_samples_in_its_turn(tmp_path):
    replay, features = recorded(MIXED)
    samples = torch.arange(3.0).view(1, 3, 1, 1).expand(len(features), 3, 2, 2)
    made = weighing(tmp_path, replay, features, samples)
    views = torch.arange(len(features))
    asked = [made._following(views, features)[:, 0, 0] for _ in range(3)]
    assert torch.equal(
        torch.stack(asked).sort(0).values, torch.arange(3.0)[:, None].expand(3, len(views))
    )


def test_the_weight_is_of_q_minus_the_mean_over_the_policys_samples(tmp_path):
    replay, features = recorded(MIXED)
    draw = torch.Generator().manual_seed(0)
    samples = torch.rand(len(features), 3, 2, 2, generator=draw)
    made = valued(weighing(tmp_path, replay, features, samples, doubted=0))
    advantage = torch.tensor([row[2] for row in MIXED]) - samples[replay.now, :, 0, 0].mean(1)
    expected = (advantage / advantage.std(correction=0)).exp()
    expected[HUMAN] = expected[HUMAN].clamp_min(1)
    assert torch.allclose(made._weights(), expected, rtol=1e-4)
    assert not torch.allclose(
        made._weights(), (advantage / advantage.std(correction=0)).exp(), rtol=1e-2
    ), "control: a person's weigh 1 at least"


@pytest.mark.parametrize("rule", ["critic", "returns"])
def test_a_persons_weigh_one_at_least_and_doubted_ones_nothing(tmp_path, rule):
    replay, features = recorded(MIXED)
    samples = torch.zeros(len(features), 2, 2, 2)
    made = valued(weighing(tmp_path, replay, features, samples, weigh=rule, doubted=2))
    weights = made._weights()
    assert (weights[HUMAN] >= 1).all()
    assert (weights == 0).nonzero().flatten().tolist() == DOUBTED, "the next episode's are not"
    if rule == "critic":
        assert weights[0] < 1, "control: what is doubted by its value alone still counts"
        assert weights[6] > 1


def test_the_rules_it_is_held_against(tmp_path):
    replay, features = recorded(MIXED)
    replay = replace(replay, success=replay.episode == 1)
    samples = torch.zeros(len(features), 2, 2, 2)

    def weights(rule):
        return weighing(tmp_path / rule, replay, features, samples, weigh=rule)._weights().tolist()

    assert weights("alike") == [1] * len(MIXED)
    assert weights("success") == [0] * 6 + [1] * 2 + [0] * 2
    made = weighing(tmp_path / "person", replay, features, samples, weigh="person")
    made.run.data = None
    assert made._weights().tolist() == [float(i in HUMAN) for i in range(len(MIXED))]


@pytest.mark.parametrize("succeeded", [False, True])
def test_nothing_to_imitate_moves_nothing(tmp_path, succeeded):
    """Weight decay would, and so it does where there is something."""
    replay, features = recorded(MIXED)
    replay = replace(replay, success=torch.full((len(MIXED),), succeeded))
    samples = torch.zeros(len(features), 2, 2, 2)
    made = weighing(tmp_path, replay, features, samples, weigh="success", every=1, batch=4)
    called = []
    made.run.descend = lambda *_: called.append("descend")
    made.run.spent.iteration = 1
    made.world.experience.done = lambda rows: (Context([""] * len(rows)), replay.event[rows], None)
    made.world.changed = lambda: called.append("changed")
    made._improve()
    assert bool(called) == succeeded


def test_imitation_weighs_each_rows_loss(tmp_path):
    run, _ = prepared(tmp_path, method={"name": "bc"})
    replay, _ = recorded(MIXED)
    found = {}
    run.log = lambda *_: None
    run.descend = lambda losses, rows, name: found.update(now=losses(slice(0, rows)).detach())
    chunks = torch.rand(len(replay), *run.policy.model.event_shape)
    views = run.data.rows(torch.arange(len(replay)), 1, range(1))[0]

    def source(rows):
        return views[rows], chunks[rows], None

    weights = torch.arange(float(len(replay)))
    plain = Imitation(run, source, len(replay), 16)
    plain(1)
    alike = found["now"]
    Imitation(run, source, len(replay), 16, weights)(1)
    assert torch.allclose(found["now"], weights[plain.draw(0)[0]] * alike)


# -- a good chunk with a bad policy behind it ------------------------------------------------------

GOOD, BAD = 0.5, -0.5
SAFE = 0.3
"""The reward of the other chunk, at once."""


def two_branches():
    """Ten episodes begin with the good chunk, behind which the recorded policy always does the bad
    thing (0); ten take the other chunk and `SAFE`; five begin where the good chunk leads, and do
    the right thing there (1).
    """
    rows = []
    for number in range(10):
        rows.append((number, 0, GOOD, 0.0, False, False))
        rows.append((number, 1, BAD, 0.0, False, True))
    rows += [(number, 0, BAD, SAFE, False, True) for number in range(10, 20)]
    rows += [(number, 1, GOOD, 1.0, False, True) for number in range(20, 25)]
    return recorded(rows)


def ranked(folder, rule, after=None):
    """The weights of the two chunks at the beginning, as learned by a rule; after: what the policy
    whose values they are does everywhere.
    """
    replay, features = two_branches()
    both = torch.stack([torch.full((2, 2), v) for v in (GOOD, BAD)])
    samples = both.expand(len(features), -1, -1, -1)
    read = SMALL if rule == "critic" else {"hidden": SMALL["hidden"], "lr": SMALL["lr"]}
    critic = Valuing(**{**read, "batch": 64})
    made = weighing(folder, replay, features, samples, weigh=rule, critic=critic)
    made.world.updates = 300
    if rule == "returns":
        made.learn()
    else:
        made.world.critic.learn(
            replay, features, len(replay), 300, lambda views, _: samples[views, after], None
        )
    weights, start = made._weights(), features[replay.now, 0] == 1
    good = replay.event[:, 0, 0] == GOOD
    return float(weights[start & good].mean()), float(weights[start & ~good].mean())


def test_chunk_td_ranks_two_chunks_rightly_where_returns_do_not(tmp_path):
    """A policy that does the right thing gets GAMMA^3 by the good chunk and GAMMA SAFE by the
    other; the recorded one got nothing by the good one.
    """
    right, wrong = ranked(tmp_path / "td", "critic", after=0)
    assert right > 1 > wrong
    right, wrong = ranked(tmp_path / "returns", "returns")
    assert right < 1 < wrong, "returns are the recorded policy's"
    right, wrong = ranked(tmp_path / "old", "critic", after=1)
    assert right < wrong, "control: with the recorded policy's own bootstrap"

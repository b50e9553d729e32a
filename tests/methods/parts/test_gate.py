"""Offline evaluation: candidate and policy in force meet the same starts and the same luck,
in a world learned from data.
"""

from collections import Counter
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

from genpolicy.chain import Noise
from genpolicy.config.errors import ConfigError
from genpolicy.learning.acceptance import compare
from genpolicy.learning.critic import pessimistic
from genpolicy.learning.dynamics import imagined
from genpolicy.methods.parts import gate
from genpolicy.methods.parts.gate import OfflineEvaluation
from genpolicy.methods.parts.iql import ActionValue
from genpolicy.policy.weights import Weights
from genpolicy.rollout.replay import ROWS, Replay
from tests.rl100_toy import experiment
from tests.toy_control import Recorded, prepared

STARTS, HORIZON = 24, 3


def toy(folder, **sections):
    """A run on the toy with RL-100's kernel."""
    raw = experiment(folder, **sections)
    return prepared(
        folder,
        **{name: raw[name] for name in ("policy", "chain", "data", "optimizer", "environments")},
    )[0]


class Stage:
    """A run, what it has lived, its critics and its evaluation."""

    def __init__(self, folder, **options):
        torch.manual_seed(0)
        self.run = toy(folder)
        self.run.collect(20, 1, keep=True)
        episodes = self.run.collector.store.episodes(1)
        self.replay = Replay.of_episodes(episodes, model=self.run.policy.model)
        self.features = self.run.policy.model.features(self.replay.encoded(self.run.policy.model))
        self.value = ActionValue(self.run, 0.99)
        self.gate = OfflineEvaluation(
            self.run,
            self.value,
            **{"horizon": HORIZON, "starts": STARTS, "caution": 0.0, "batch": 60, **options},
        )

    def score(self):
        return self.gate(self.replay, self.features)


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


def changed(run, by=0.02):
    """Other weights, for as long as this lasts."""
    draw = torch.Generator().manual_seed(3)
    moved = [p.detach() + by * torch.randn(p.shape, generator=draw) for p in run.trainable]
    return Weights(run.trainable, moved).using()


# -- the score -------------------------------------------------------------------------------------


def test_the_same_weights_score_the_same_to_the_bit(stage):
    """Whatever generator was used in between:
    the difference of a policy from itself is exactly 0.
    """
    one = stage.score()
    assert one.shape == (STARTS,)
    assert not one.requires_grad
    torch.manual_seed(99)
    with stage.run.weights().using():
        other = stage.score()
    found = compare(other, one)
    assert (found.difference, found.error) == (0.0, 0.0)
    assert torch.equal(one, other)
    assert len(one.unique()) > 1
    with changed(stage.run):
        assert not torch.equal(stage.score(), one), "control: another policy is another score"
    stage.run.spent.iteration = 2
    assert compare(stage.score(), one).error > 0, (
        "control: another iteration has other starts and luck"
    )


def test_the_same_luck_tells_small_differences_apart(stage):
    """A policy against one that hardly differs:
    on the same luck the error is a small part of what it is on others.
    """
    one = stage.score()
    with changed(stage.run, 1e-3):
        paired = compare(stage.score(), one).error
        stage.run.spent.iteration = 2
        apart = compare(stage.score(), one).error
    assert 0 < paired < 0.2 * apart


def test_starts_are_what_decisions_saw(stage, monkeypatch):
    """Drawn from the recorded decisions' views, never from what was seen after the last one."""
    asked = []

    def listen(actor, score, model, starts, horizon, noise, ends, ended):
        asked.append((starts, noise))
        return imagined(actor, score, model, starts, horizon, noise, ends, ended)

    monkeypatch.setattr(gate, "imagined", listen)
    stage.score(), stage.score()
    stage.run.spent.iteration = 2
    stage.score()
    (one, luck), (same, again), (other, fresh) = asked
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    seen = {tuple(row) for row in stage.features[stage.replay.now].tolist()}
    finals = {tuple(row) for row in stage.features.tolist()} - seen
    assert {tuple(row) for row in one.tolist()} <= seen
    assert finals
    assert len({tuple(row) for row in one.tolist()}) > STARTS // 2
    assert torch.equal(luck(0, (3,)), again(0, (3,)))
    assert not torch.equal(luck(0, (3,)), fresh(0, (3,)))
    rollout = Noise.rows(0, 1, torch.arange(STARTS), 1).at(torch.zeros(STARTS, dtype=torch.long))
    assert not torch.equal(
        luck.at(torch.zeros(STARTS, dtype=torch.long))(0, (3,)), rollout(0, (3,))
    )
    assert (luck.seed, luck.iteration) != (rollout.seed, rollout.iteration)


def test_one_decision_is_q_of_the_deployed_samplers_action(tmp_path):
    """The score is, by hand, mean - std of the members' values of the sample that is deployed."""
    stage = Stage(tmp_path, horizon=1)
    run = stage.run
    found = stage.score()
    with torch.no_grad():
        starts, names = [], torch.arange(STARTS)
        noise = run.noise("imagination", names).at(torch.zeros_like(names))

        def q(policy):
            return pessimistic(
                stage.value.q(starts, policy.sample(starts, noise, keep=(0, 0)).x0), 1.0
            )

        generator = run.generator("imagined starts")
        starts = stage.features[
            stage.replay.now[torch.from_numpy(generator.integers(len(stage.replay), size=STARTS))]
        ]
        assert torch.allclose(found, q(run.deployed), atol=1e-6)
        assert not torch.allclose(found, q(run.policy), atol=1e-4), (
            "control: the sampler that explores"
        )


def test_the_score_reads_like_a_value_at_any_horizon(tmp_path):
    """Every decision is worth the same where nothing moves, with a Q of the features alone."""
    scores = []
    for horizon in (1, 4):
        (tmp_path / str(horizon)).mkdir()
        stage = Stage(tmp_path / str(horizon), horizon=horizon)
        stage.gate.model.step = lambda features, event, uniform, noise: features
        stage.value.lower = lambda critic, features, event: features.sum(1)
        stage.gate.end.forward = lambda features, event: torch.full(
            (1, len(features)), -torch.inf
        )  # it never ends
        scores.append(stage.score())
    assert torch.allclose(*scores, atol=1e-6)


def test_who_has_succeeded_is_paid_and_not_asked_again(tmp_path):
    """An episode that ends at once is worth its first decision and, from then on,
    what success pays.
    """
    stage = Stage(tmp_path, horizon=4)
    stage.gate.model.step = lambda features, event, uniform, noise: features
    stage.value.lower = lambda critic, features, event: features.sum(1)
    first = []
    for logit in (torch.inf, -torch.inf):
        stage.gate.end.forward = lambda features, event, logit=logit: torch.full(
            (1, len(features)), logit
        )
        first.append(stage.score())
    over = stage.replay.terminated & stage.replay.success
    pays = float(stage.replay.rewards[over].sum(1).mean())
    assert torch.allclose(first[0], (first[1] + 3 * pays) / 4, atol=1e-5)
    assert not torch.allclose(first[0], first[1], atol=1e-2)


def test_caution_takes_off_what_the_models_disagree(tmp_path):
    (tmp_path / "plain").mkdir(), (tmp_path / "careful").mkdir(), (tmp_path / "twice").mkdir()
    plain, careful, twice = (
        Stage(tmp_path / name, horizon=1, caution=caution).score()
        for name, caution in (("plain", 0.0), ("careful", 0.5), ("twice", 1.0))
    )
    assert (careful < plain).all()
    assert torch.allclose(plain - twice, 2 * (plain - careful), atol=1e-5)
    assert len((plain - careful).unique()) > STARTS // 2, "here more, there less"


# -- the world -------------------------------------------------------------------------------------


def test_the_world_is_learned_and_said_how_well(tmp_path):
    """Better than the mean change over the data, which is an error of 1,
    on episodes that it never learned from.
    """
    stage = Stage(tmp_path)
    stage.gate.learn(stage.replay, stage.features, 150)
    error = stage.run.metrics.numbers["world/held_out"][0]
    assert error < 0.5
    rows = (stage.replay.episode % 10 == 0).nonzero().flatten()
    now, after = stage.features[stage.replay.now[rows]], stage.features[stage.replay.after[rows]]
    errors = stage.gate.model.hold_out(now, stage.replay.event[rows], after)
    assert error == pytest.approx(float(errors.min()), rel=1e-4)
    assert sorted(stage.gate.model.elites.tolist()) == sorted(errors.argsort()[:5].tolist())
    mixed = stage.gate.model.hold_out(now, stage.replay.event[rows].roll(1, 0), after)
    assert float(mixed.min()) > 1.5 * error, "control: what was done matters"


def test_elites_are_chosen_on_episodes_that_nobody_learned_from(stage, monkeypatch):
    learned, tested = set(), []
    honest = stage.gate.model.loss

    def key(features, after):
        return [tuple(row) for row in torch.cat([features, after], 1).tolist()]

    def loss(features, event, after):
        learned.update(key(features, after))
        return honest(features, event, after)

    def hold_out(features, event, after):
        tested.extend(key(features, after))
        return torch.tensor([0.3, 0.9, 0.1, 0.8, 0.2, 0.5, 0.4])

    monkeypatch.setattr(stage.gate.model, "loss", loss)
    monkeypatch.setattr(stage.gate.model, "hold_out", hold_out)
    stage.gate.learn(stage.replay, stage.features, 40)
    assert not learned & set(tested)
    known = ~stage.replay.terminated  # what a whole chunk leads to was not seen at an end
    held = stage.replay.episode[known].unique(return_inverse=True)[1] % 10 == 0
    both = torch.cat([stage.features[stage.replay.now], stage.features[stage.replay.after]], 1)[
        known
    ]
    assert {tuple(row) for row in both[held].tolist()} == set(tested)
    assert learned == {tuple(row) for row in both[~held].tolist()}
    assert sorted(stage.gate.model.elites.tolist()) == [0, 2, 4, 5, 6]
    assert stage.run.metrics.numbers["world/held_out"] == [pytest.approx(0.1)]


def test_what_comes_after_an_end_is_not_learned(stage, monkeypatch):
    """A data set's last frame is followed by nothing:
    no row may say that it is followed by itself.
    """
    alone = stage.replay.terminated.clone()
    assert alone.any()
    after = torch.where(alone, stage.replay.now, stage.replay.after)
    replay = Replay(
        stage.replay.views,
        **{**{n: getattr(stage.replay, n) for n in ROWS}, "after": after},
    )
    seen = []
    honest = stage.gate.model.loss
    monkeypatch.setattr(
        stage.gate.model,
        "loss",
        lambda f, e, a: seen.append((f - a).abs().sum(1).min()) or honest(f, e, a),
    )
    stage.gate.learn(replay, stage.features, 10)
    assert min(map(float, seen)) > 0


def likely_ends(stage, replay):
    """The mean chance of an end that the gate gives to held-out decisions: to those that were ends
    by success, and to all others.
    """
    held = torch.isin(replay.episode, replay.episode[~replay.terminated].unique()[::10])
    over = replay.terminated & replay.success
    with torch.no_grad():
        event = stage.run.policy.model.scored(replay.event)
        chance = stage.gate.end(stage.features[replay.now], event)[0].sigmoid()
    return float(chance[held & over].mean()), float(chance[held & ~over].mean())


def test_the_end_of_an_episode_is_learned_from_the_decisions_that_ended_one(tmp_path):
    """On episodes that it has not learned from, by its own forward.

    Control: the rows of the world model, none of which is an end.
    """
    data = Recorded(episodes=200, noise=0.0, skill=0.3, limit=30)
    found = {}
    for name, updates in (("all", 400), ("cut", 100)):
        (tmp_path / name).mkdir()
        stage = Stage(tmp_path / name, batch=256)
        model = stage.run.policy.model
        replay = Replay.of_dataset(data, model)
        stage.features = model.features(replay.encoded(model))
        cut = replay[(~replay.terminated).nonzero().flatten()]
        stage.gate.learn(replay if name == "all" else cut, stage.features, updates)
        found[name] = likely_ends(stage, replay)
    assert found["all"][0] > 0.9
    assert found["all"][1] < 0.1
    assert found["cut"][0] < 0.1


def test_every_member_is_shown_its_own_resampling(stage, monkeypatch):
    """Poisson weights: the members' losses of a row count differently, one on average."""
    members, ones = stage.gate.model.members, []
    monkeypatch.setattr(
        stage.gate.model,
        "loss",
        lambda f, e, a: torch.ones(members, len(f)) * (10.0 ** torch.arange(members))[:, None],
    )
    stage.run.descend = lambda losses, rows, name, optimizer: ones.append(losses(slice(0, rows)))
    stage.gate.learn(stage.replay, stage.features, 4)
    digits = torch.stack([(torch.cat(ones) // 10**m % 10) for m in range(members)])
    counted = Counter(digits.flatten().tolist())
    assert counted[0] / digits.numel() == pytest.approx(0.368, abs=0.03)
    assert float(digits.mean()) == pytest.approx(1.0, abs=0.05)
    assert torch.corrcoef(digits.float()).fill_diagonal_(0).abs().max() < 0.2


def test_processes_share_what_is_drawn(stage):
    drawn = {}
    stage.gate.model.loss = lambda f, e, a: (
        torch.cat([f, a], 1).sum(1).expand(stage.gate.model.members, -1)
    )
    for count in (1, 3):
        for index in range(count):
            stage.run.processes = SimpleNamespace(index=index, count=count, agreed=list)
            drawn[count, index] = made = []
            stage.run.descend = lambda losses, rows, name, optimizer, made=made: made.append(
                losses(slice(0, rows))
            )
            stage.gate.learn(stage.replay, stage.features, 3)
    for update in range(3):
        for index in range(3):
            assert torch.allclose(drawn[1, 0][update][index::3], drawn[3, index][update], atol=1e-3)


def test_one_episode_is_too_few(stage):
    only = stage.replay[(stage.replay.episode == 0).nonzero().flatten()]
    with pytest.raises(ConfigError, match="at least two episodes"):
        stage.gate.learn(only, stage.features, 1)


def test_it_is_resumed(stage, tmp_path):
    assert {"world", "world_optimizer"} <= set(stage.run.state.registered)
    stage.gate.learn(stage.replay, stage.features, 5)
    (tmp_path / "other").mkdir()
    other = Stage(tmp_path / "other")
    before = other.score()
    for name, part in stage.run.state.registered.items():
        other.run.state.registered[name].load_state_dict(deepcopy(part.state_dict()))
    assert torch.equal(other.score(), stage.score())
    assert not torch.equal(before, stage.score()), "control"
    for each in (stage, other):
        each.run.spent.iteration = 2
        each.gate.learn(each.replay, each.features, 3)
    assert torch.equal(other.score(), stage.score())

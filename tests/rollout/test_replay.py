"""Replay: recorded decisions by hand, row by row; what a rollout knows;
several recordings as one.
"""

from types import SimpleNamespace

import pytest
import torch

from genpolicy.rollout import replay as module
from genpolicy.rollout.replay import ROWS, Replay
from tests.rl100_toy import Frames, Outcomes
from tests.toy_control import prepared

STATE = "observation.state"
LENGTHS = [5, 1, 9, 2, 4, 3, 7]
SUCCEEDED = [True, False, False, True, True, False, True]


def equal(one, other):
    """Equality of a field of two replays; what was never drawn is nan in both."""
    return torch.equal(one.nan_to_num(), other.nan_to_num())


def model(executed, history=1, begin=0, horizon=None):
    """The part of a control model that a replay needs: its event is a tenth of the actions."""
    offsets = range(begin, begin + (horizon or executed))
    return SimpleNamespace(
        executed=executed, history=history, horizon=offsets, event=lambda actions: actions / 10
    )


def outcomes():
    """Success at the last frame of episodes that succeed, and some reward everywhere."""
    success = torch.zeros(sum(LENGTHS), dtype=torch.bool)
    success[torch.tensor(LENGTHS).cumsum(0)[torch.tensor(SUCCEEDED)] - 1] = True
    return success, torch.arange(1.0, 1 + len(success))


def by_hand(T, success, rewards):
    """The rows of `LENGTHS` in plain Python:
    (now, after, rewards, executed, terminated, success, episode, first).
    """
    rows, begin = [], 0
    for number, (length, good) in enumerate(zip(LENGTHS, SUCCEEDED, strict=True)):
        for i in range(length):
            executed = min(T, length - i)
            reaches = i + T >= length
            if reaches and not good:
                continue
            got = [float(rewards[begin + i + j]) if j < executed else 0.0 for j in range(T)]
            after = begin + min(i + T, length - 1)
            rows.append((begin + i, after, got, executed, reaches and good, good, number, i == 0))
        begin += length
    return rows


@pytest.mark.parametrize("T", [1, 2, 4, 12])
@pytest.mark.parametrize("cut_fails", [False, True])
def test_returns_are_what_came_of_it(T, cut_fails):
    """Discounted to the episode's end whatever the chunk;
    nothing is known of one that was cut, unless that is its end.
    """
    gamma = 0.9
    success, rewards = outcomes()
    replay = Replay.of_dataset(Frames(LENGTHS, success, rewards), model(T), cut_fails)
    found, begin = dict(zip(replay.now.tolist(), replay.returns(gamma).tolist(), strict=True)), 0
    for length, good in zip(LENGTHS, SUCCEEDED, strict=True):
        for frame in range(begin, begin + length):
            if frame in found:
                left = rewards[frame : begin + length].double()
                known = float((left * gamma ** torch.arange(len(left))).sum())
                assert found[frame] == pytest.approx(
                    known if good or cut_fails else float("nan"), nan_ok=True
                )
        begin += length
    twice = Replay.cat([replay, replay]).returns(gamma)
    assert torch.equal(twice.nan_to_num(-1), replay.returns(gamma).repeat(2).nan_to_num(-1))


@pytest.mark.parametrize("T", [1, 2, 4, 12])
def test_every_frame_is_the_decision_that_it_could_have_been(T):
    success, rewards = outcomes()
    found = Replay.of_dataset(Frames(LENGTHS, success, rewards), model(T))
    expected = by_hand(T, success, rewards)
    assert len(found) == len(expected)
    for name, values in zip(
        [n for n in ROWS if n not in ("event", "start", "human")],
        zip(*expected, strict=True),
        strict=True,
    ):
        assert torch.equal(getattr(found, name).double(), torch.tensor(values).double()), name
    assert found.rewards.dtype == torch.float64
    assert bool(found.start.isnan().all())
    assert not bool(found.human.any())
    for row, (now, _, _, executed, *_) in enumerate(expected):
        assert torch.allclose(
            found.event[row, :executed, 0] * 10, now + torch.arange(executed).float()
        )
    unmasked = torch.stack(
        [rewards[(int(n) + torch.arange(T)).clamp(max=len(rewards) - 1)] for n in found.now]
    )
    assert (T == 1) == torch.equal(unmasked.double(), found.rewards), (
        "control: rewards of the episode that comes next"
    )


def test_only_chunks_of_cut_episodes_that_run_past_their_end_are_left_out():
    success, rewards = outcomes()
    found = Replay.of_dataset(Frames(LENGTHS, success, rewards), model(3))
    kept = found.episode.bincount(minlength=7).tolist()
    assert kept == [
        n if good else max(n - 3, 0) for n, good in zip(LENGTHS, SUCCEEDED, strict=True)
    ]
    cut = ~found.success
    assert not found.terminated[cut].any()
    assert (found.executed[cut] == 3).all()
    assert (found.after[cut] == found.now[cut] + 3).all(), (
        "what is seen T frames later was recorded"
    )
    assert not found.success[found.terminated].logical_not().any()
    everything = torch.ones_like(success)  # control: where everybody succeeds nothing is left out
    assert len(Replay.of_dataset(Frames(LENGTHS, everything, rewards), model(3))) == sum(LENGTHS)


@pytest.mark.parametrize("T", [1, 3])
def test_demonstrations_are_rewarded_at_their_last_frame(T):
    data = Frames(LENGTHS)
    found = Replay.of_dataset(data, model(T))
    assert len(found) == len(data)
    assert found.success.all()
    last = data.end - 1
    for row in range(len(found)):
        steps = int(last[row]) - int(found.now[row])
        expected = torch.zeros(T).double()
        if steps < T:
            expected[steps] = 1
        assert torch.equal(found.rewards[row], expected)
        assert bool(found.terminated[row]) == (steps < T)


def test_what_was_recorded_wins_over_what_is_assumed():
    """Nothing is made up where there is next.reward,
    and a success in the middle makes the episode one that ended by itself.
    """
    rewards = torch.zeros(8)
    success = torch.tensor([0, 1, 0, 0, 0, 0, 0, 0])
    found = Replay.of_dataset(Frames([4, 4], success, rewards), model(2))
    assert (found.rewards == 0).all()
    assert found.success.tolist() == [True] * 4 + [False] * 2
    assert found.terminated.tolist() == [False, False, True, True] + [False] * 2


def test_the_models_own_view_of_a_chunk():
    """Two frames of history, an event that begins before now and is longer
    than what is executed.
    """
    success, rewards = outcomes()
    found = Replay.of_dataset(
        Frames(LENGTHS, success, rewards), model(3, history=2, begin=-1, horizon=6)
    )
    assert found.event.shape == (len(found), 6, 1)
    assert found.rewards.shape == (len(found), 3)
    seen = found.views.observation[STATE][found.now, :, 0]
    inner = ~found.first
    assert torch.equal(seen[:, 1], found.now.float())
    assert torch.equal(seen[inner, 0], found.now[inner].float() - 1)
    assert torch.equal(seen[found.first, 0], found.now[found.first].float()), (
        "the first frame is repeated"
    )
    assert torch.allclose(found.event[inner, 0, 0] * 10, found.now[inner].float() - 1)


def belongs(replay, episodes):
    """True where every row's now, after and event lie in one episode: frames show their number."""
    spans = {}
    begin = 0
    for number, length in enumerate(episodes):
        spans[number] = (begin, begin + length - 1)
        begin += length
    for row in range(len(replay)):
        low, high = spans[int(replay.episode[row])]
        done = (replay.event[row, :, 0] * 10).round()
        seen = [
            float(replay.views.observation[STATE][view[row], 0, 0])
            for view in (replay.now, replay.after)
        ]
        if not all(low <= value <= high for value in [*seen, *done.tolist()]):
            return False
    return True


def test_two_episodes_never_share_a_transition():
    success, rewards = outcomes()
    found = Replay.of_dataset(Frames(LENGTHS, success, rewards), model(4))
    assert belongs(found, LENGTHS)
    joined = [sum(LENGTHS)]  # control: the same frames as one episode are not these
    whole = Replay.of_dataset(Frames(joined, success, rewards), model(4))
    assert not belongs(
        Replay(
            whole.views,
            **{n: getattr(whole, n)[: len(whole)] for n in ROWS[:-2]}
            | {
                "episode": torch.repeat_interleave(torch.arange(7), torch.tensor(LENGTHS)),
                "first": whole.first,
            },
        ),
        LENGTHS,
    )


def test_recordings_side_by_side_keep_their_rows_apart():
    success, rewards = outcomes()
    one = Replay.of_dataset(Frames(LENGTHS, success, rewards), model(4))
    other = Replay.of_dataset(
        Frames([6, 3], numbers=[0, 1]), model(4)
    )  # numbers that the first has too
    both = Replay.cat([one, other, one])
    assert len(both) == 2 * len(one) + len(other)
    parts = [
        slice(0, len(one)),
        slice(len(one), len(one) + len(other)),
        slice(len(one) + len(other), None),
    ]
    for part, source in zip(parts, (one, other, one), strict=True):
        for name in ROWS:
            if name not in ("now", "after", "episode"):
                assert equal(getattr(both, name)[part], getattr(source, name)), name
        for name in ("now", "after"):
            seen = both.views.observation[STATE][getattr(both, name)[part]]
            assert torch.equal(seen, source.views.observation[STATE][getattr(source, name)])
        assert torch.equal(
            both.episode[part].unique(return_inverse=True)[1],
            source.episode.unique(return_inverse=True)[1],
        )
    numbers = [set(both.episode[part].tolist()) for part in parts]
    assert sum(map(len, numbers)) == len(set().union(*numbers)), "no number is anybody else's"
    assert bool((both.now[parts[1]] >= len(one.views)).all())
    assert float(both.views.observation[STATE][other.now[-1], 0, 0]) == float(other.now[-1]), (
        "control: unshifted"
    )


def test_a_recording_without_a_decision_adds_none():
    """A cut episode that is shorter than a chunk has no decision that could be learned from."""
    short = Replay.of_dataset(Frames([2], torch.zeros(2), torch.zeros(2)), model(4))
    other = Replay.of_dataset(Frames([6, 3]), model(4))
    assert len(short) == 0
    both = Replay.cat([short, other])
    assert len(both) == len(other)
    assert torch.equal(
        both.views.observation[STATE][both.now], other.views.observation[STATE][other.now]
    )


def test_some_of_the_decisions_are_over_the_same_views():
    success, rewards = outcomes()
    found = Replay.of_dataset(Frames(LENGTHS, success, rewards), model(2))
    rows = torch.tensor([7, 0, 3])
    some = found[rows]
    assert some.views is found.views
    for name in ROWS:
        assert equal(getattr(some, name), getattr(found, name)[rows])


# -- what was lived --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lived(tmp_path_factory):
    """A run, its rollout of 30 kept episodes, and the replay of what was kept."""
    torch.manual_seed(0)
    run, _ = prepared(tmp_path_factory.mktemp("lived"), method={"name": "bc"}, environments=7)
    rollout = run.collect(15, 2, keep=True)
    return run, rollout, Replay.of_episodes(run.collector.store.episodes(1), model=run.policy.model)


def test_episodes_that_were_lived_are_the_rollouts_decisions(lived):
    _, rollout, found = lived
    d = rollout.decisions
    assert d.terminated.any()
    assert (d.last & ~d.terminated).any(), "both must happen for this to say anything"
    assert len(found) == len(rollout.trajectory)
    for name in ("rewards", "executed", "terminated", "episode"):
        assert torch.equal(getattr(found, name), getattr(d, name)), name
    assert torch.equal(found.event, rollout.trajectory.x0)
    assert torch.equal(found.success, d.terminated[d.last][d.episode])
    assert torch.equal(found.first, torch.cat([torch.tensor([True]), d.last[:-1]]))


def test_what_was_seen_next_is_the_next_decisions_view_or_the_final_one(lived):
    _, rollout, found = lived
    d = rollout.decisions
    for name in rollout.context.observation:
        seen, views = rollout.context.observation[name], found.views.observation[name]
        assert torch.equal(views[found.now], seen)
        going = (~d.last).nonzero().flatten()
        assert torch.equal(views[found.after][going], seen[going + 1])
        assert torch.equal(views[found.after][d.last], d.final.observation[name])
    ends = d.last.nonzero().flatten()[:-1]
    beyond = rollout.context.observation[STATE][
        ends + 1
    ]  # control: the next row is another episode's beginning
    assert not torch.equal(found.views.observation[STATE][found.after][ends], beyond)


def test_views_are_encoded_in_slices_as_at_once(lived, monkeypatch):
    run, _, found = lived
    encode = run.policy.model.encode
    with torch.no_grad():
        whole = encode(found.views)
    sizes = []
    monkeypatch.setattr(
        run.policy.model, "encode", lambda context: sizes.append(len(context)) or encode(context)
    )
    monkeypatch.setattr(module, "AT_ONCE", 17)
    parts = found.encoded(run.policy.model)
    assert not parts.requires_grad
    assert torch.allclose(parts, whole, atol=1e-6)
    assert sum(sizes) == len(found.views)
    assert set(sizes[:-1]) == {17}
    assert 0 < sizes[-1] <= 17


def test_recorded_and_lived_together(lived):
    """The same space: events of a data set and of a rollout, in one replay,
    and every view can be encoded.
    """
    run, _, found = lived
    data = Outcomes(episodes=12, skill=0.15)
    assert len(set(data.succeeded)) == 2
    recorded = Replay.of_dataset(data, run.policy.model)
    both = Replay.cat([recorded, found])
    assert both.event.shape[1:] == run.policy.model.event_shape
    assert len(both.encoded(run.policy.model)) == len(both.views) == len(data) + len(found) + 30
    assert torch.allclose(
        run.policy.model.decode(recorded.event[:1])[0, 0], data.values["action"][0], atol=1e-5
    )

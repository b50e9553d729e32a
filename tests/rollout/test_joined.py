"""Decisions joined with those that follow them, against a loop over single steps, on random
episodes with take-overs.
"""

from types import SimpleNamespace

import pytest
import torch

from genpolicy.rollout.columns import DONE, INTERVENTION, TRUNCATED
from genpolicy.rollout.replay import Replay
from tests.rl100_toy import Frames
from tests.rollout.test_replay import STATE, model
from tests.rollout.test_takeovers import episode

SEEDS = range(6)
T = 3


def lived(seed: int, cut_fails: bool = False) -> Replay:
    """Random episodes, some cut, in which decisions are the robot's, a person's, or both."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(6):
        count = int(torch.randint(1, 7, (1,), generator=generator))
        executed = torch.randint(1, T + 1, (count,), generator=generator).tolist()
        human = torch.rand(sum(executed), generator=generator) < 0.3
        one = episode(executed, human.tolist())
        paid = torch.rand(one["rewards"].shape, generator=generator)
        one["rewards"] = paid * (one["rewards"] > -1)  # behind the executed ones too
        one["x0"] = torch.rand(one["x0"].shape, generator=generator)
        one["start"] = torch.rand(one["start"].shape, generator=generator)
        cut = bool(torch.rand(1, generator=generator) < 0.5)
        one["terminated"], one["truncated"] = one["terminated"] & (not cut), one["success"] & cut
        made.append(one)
    return Replay.of_episodes(made, cut_fails, model(T))


def recorded(seed: int) -> Replay:
    """A random data set with take-overs, of which some episodes were cut."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (6,), generator=generator).tolist()
    frames = sum(lengths)
    runs = torch.randint(1, 6, (frames,), generator=generator)
    last = torch.zeros(frames)
    last[torch.tensor(lengths).cumsum(0) - 1] = 1
    cut = (torch.rand(6, generator=generator) < 0.5).repeat_interleave(torch.tensor(lengths))
    data = Frames(lengths, torch.zeros(frames), torch.rand(frames, generator=generator))
    human = (torch.arange(frames) % 2 == 1).repeat_interleave(runs)[:frames]
    data.columns[INTERVENTION] = human.float()[:, None]
    data.columns |= {DONE: last[:, None], TRUNCATED: (last * cut)[:, None]}
    return Replay.of_dataset(data, model(T))


def by_hand(replay: Replay, row: int, length: int) -> SimpleNamespace:
    """What `Replay.joined` says of a row, step by step: the next decision is the one that begins
    where this one led to.
    """
    begins = {int(view): place for place, view in enumerate(replay.now)}
    rows = [row]
    while len(rows) < length:
        now = rows[-1]
        following = begins.get(int(replay.after[now]))
        if bool(replay.terminated[now]) or following is None:
            break
        rows.append(following)
    rewards, human = [], []
    for each in rows:
        for step in range(int(replay.executed[each])):
            rewards.append(float(replay.rewards[each, step]))
            human.append(bool(replay.human[each, step]))
    behind = length * T - len(rewards)
    return SimpleNamespace(
        rows=rows + rows[-1:] * (length - len(rows)),
        distinct=rows,
        rewards=rewards + [0.0] * behind,
        human=human + [False] * behind,
        executed=len(rewards),
        after=int(replay.after[rows[-1]]),
        terminated=bool(replay.terminated[rows[-1]]),
    )


SOURCES = {
    "lived": lived,
    "lived, a cut is an end": lambda seed: lived(seed, True),
    "recorded": recorded,
    "both": lambda seed: Replay.cat([recorded(seed), lived(seed + 100)]),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("length", [1, 2, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_joined_decisions_are_those_of_a_loop_over_steps(seed, length, source):
    replay = SOURCES[source](seed)
    found = replay.joined(length)
    assert len(found) == len(replay)
    assert found.event.shape[:2] == found.start.shape[:2] == (len(replay), length)
    for row in range(len(replay)):
        want = by_hand(replay, row, length)
        assert torch.equal(found.event[row], replay.event[want.rows])
        start, kept = found.start[row], replay.start[want.rows]
        assert torch.equal(start.isnan(), kept.isnan())
        assert torch.equal(start.nan_to_num(), kept.nan_to_num())
        assert found.rewards[row].tolist() == pytest.approx(want.rewards)
        assert found.human[row].tolist() == want.human
        assert int(found.executed[row]) == want.executed
        assert int(found.after[row]) == want.after
        assert bool(found.terminated[row]) == want.terminated
        assert len(replay.episode[want.rows].unique()) == 1, "never another episode's"
    for name in ("now", "success", "episode", "first"):
        assert torch.equal(getattr(found, name), getattr(replay, name))


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_of_joined_decisions_conserve_every_step(seed):
    """From the first decision of each episode in strides of so many: the executed steps, the
    rewards and the person's steps are those of the episodes.
    """
    replay, length = lived(seed), 3
    found = replay.joined(length)
    place = torch.arange(len(replay))
    within = place - torch.cummax(torch.where(replay.first, place, 0), 0).values
    blocks = within % length == 0
    inside = torch.arange(T) < replay.executed[:, None]
    assert int(found.executed[blocks].sum()) == int(replay.executed.sum())
    assert int(found.human[blocks].sum()) == int(replay.human.sum())
    paid = float((replay.rewards * inside).sum())
    assert float(found.rewards[blocks].sum()) == pytest.approx(paid)
    wrong = place % length == 0  # control: strides that know of no episode
    assert int(found.executed[wrong].sum()) != int(replay.executed.sum())


@pytest.mark.parametrize("seed", SEEDS)
def test_steps_seen_later_are_as_many_as_were_executed(seed):
    """In one episode observation i is what is seen after i steps."""
    replay = lived(seed)
    seen = replay.views.observation[STATE][:, -1, 0]
    found = replay.joined(4)
    assert torch.equal(seen[found.after] - seen[found.now], found.executed.float())


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_and_chunk_are_both_there_where_the_robot_decided(seed):
    replay = lived(seed)
    person = replay.human.any(1)
    assert not replay.event.isnan().any()
    assert replay.start[person].isnan().all()
    assert replay.start.shape == replay.event.shape
    known = ~replay.start.isnan().flatten(1).any(1)
    assert known.any()
    assert not (known & person).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_joining_changes_no_return(seed):
    """What was got in a joined chunk and, from where it led to, later, is what was got."""
    gamma = 0.9
    replay = lived(seed, True)
    found, returns = replay.joined(2), replay.returns(gamma)
    begins = {int(view): row for row, view in enumerate(replay.now)}
    for row in range(len(replay)):
        own = sum(gamma**j * float(r) for j, r in enumerate(found.rewards[row]))
        if not found.terminated[row]:
            rest = returns[begins[int(found.after[row])]]
            own += gamma ** int(found.executed[row]) * float(rest)
        assert float(returns[row]) == pytest.approx(own)

"""A person takes over and hands back: chunks are cut there, and no episode ends there."""

import math

import pytest
import torch

from genpolicy.config.errors import ConfigError
from genpolicy.rollout.columns import DECISION, DONE, EXECUTED, INTERVENTION, START, TRUNCATED
from genpolicy.rollout.recorder import FRAMES
from genpolicy.rollout.replay import Replay
from genpolicy.rollout.takeovers import last_own
from tests.rl100_toy import Frames
from tests.rollout.test_replay import STATE, model

SEEDS = range(8)
GAMMA = 0.9


def drawn(seed):
    """Random lengths [N] with which of them succeeded, and for every frame its reward and whether a
    person acted: in runs of 1 to 5 frames.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 15, (6,), generator=generator).tolist()
    count = sum(lengths)
    runs = torch.randint(1, 6, (count,), generator=generator)
    human = (torch.arange(count) % 2 == 1).repeat_interleave(runs)[:count]
    rewards = torch.rand(count, generator=generator)
    return lengths, torch.rand(6, generator=generator) < 0.5, rewards, human


def recorded(seed, human=None):
    """A data set of `drawn`, tagged as LeRobot tags; ``human``: another tag."""
    lengths, succeeded, rewards, tag = drawn(seed)
    success = torch.zeros(sum(lengths))
    success[torch.tensor(lengths).cumsum(0)[succeeded] - 1] = 1
    data = Frames(lengths, success, rewards)
    data.columns[INTERVENTION] = (tag if human is None else human).float()[:, None]
    return data


def mixed(replay, data, human):
    """True where a row has a step of another episode, or of another actor, than its first."""
    found = False
    for now, executed in zip(replay.now.tolist(), replay.executed.tolist(), strict=True):
        steps = slice(now, now + executed)
        found |= len(data.episode[steps].unique()) > 1 or len(human[steps].unique()) > 1
    return found


# -- data sets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("T", [1, 3, 4])
def test_a_chunk_crosses_neither_an_episode_nor_a_takeover(seed, T):
    data, human = recorded(seed), drawn(seed)[3]
    found = Replay.of_dataset(data, model(T), cut_fails=True)
    assert len(found) == len(data)
    assert not mixed(found, data, human)
    inside = torch.arange(T) < found.executed[:, None]
    assert torch.equal(found.human, inside & human[found.now][:, None])
    acted = (found.event[..., 0] * 10).round().long()
    assert torch.equal(acted[inside], (found.now[:, None] + torch.arange(T))[inside])
    own = last_own(data.episode, human)
    assert bool((acted <= own[:, None]).all()), "an event never shows what another actor did"
    blind = Replay.of_dataset(recorded(seed, torch.zeros_like(human)), model(T), cut_fails=True)
    assert mixed(blind, data, human) is (T > 1), "control: without the tag chunks are mixed"


@pytest.mark.parametrize("seed", SEEDS)
def test_the_view_at_a_takeover_comes_after_the_chunk_that_it_cuts(seed):
    data, (lengths, succeeded, _, human) = recorded(seed), drawn(seed)
    found = Replay.of_dataset(data, model(4))
    last = torch.tensor(lengths).cumsum(0)[found.episode] - 1
    reaches = found.now + found.executed > last
    assert torch.equal(found.terminated, reaches & succeeded[found.episode]), "no false terminal"
    assert torch.equal(found.success, succeeded[found.episode]), "a rescue is the whole episode's"
    cut = ~reaches
    seen = found.views.observation[STATE][:, 0, 0]
    assert torch.equal(seen[found.after[cut]], (found.now + found.executed)[cut].float())
    short = cut & (found.executed < 4)
    assert bool(short.any())
    assert torch.equal(human[found.after[short]], ~human[found.now[short]]), "the other goes on"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("T", [2, 4])
def test_chunks_that_tile_the_episodes_execute_every_frame_once(seed, T):
    data, (lengths, _, rewards, _) = recorded(seed), drawn(seed)
    found = Replay.of_dataset(data, model(T), cut_fails=True)

    def tiled(step):
        """From the first frame of each episode from chunk to chunk: the frames, the reward."""
        frames, paid, row = 0, 0.0, 0
        while row < len(found):
            frames += int(found.executed[row])
            paid += float(found.rewards[row].sum())
            row += step(row)
        return frames, paid

    frames, paid = tiled(lambda row: int(found.executed[row]))
    assert frames == sum(lengths)
    assert paid == pytest.approx(float(rewards.double().sum()))
    wrong, _ = tiled(lambda row: T)
    assert wrong != sum(lengths), "control: in strides of whole chunks frames are lost"


@pytest.mark.parametrize("seed", SEEDS)
def test_returns_go_on_through_a_takeover(seed):
    data, (lengths, _, rewards, _) = recorded(seed), drawn(seed)
    found = Replay.of_dataset(data, model(3), cut_fails=True)
    whole, begin = torch.zeros(sum(lengths), dtype=torch.float64), 0
    for length in lengths:
        rest = 0.0
        for frame in reversed(range(begin, begin + length)):
            rest = float(rewards[frame]) + GAMMA * rest
            whole[frame] = rest
        begin += length
    assert torch.allclose(found.returns(GAMMA), whole[found.now])


def test_a_model_that_looks_back_begins_its_event_with_what_was_done_before():
    """The past is the past, whoever acted; what follows the chunk is never another's."""
    data = Frames([6], torch.zeros(6), torch.zeros(6))
    data.columns[INTERVENTION] = torch.tensor([0.0, 0, 1, 1, 0, 0])[:, None]
    found = Replay.of_dataset(data, model(2, history=2, begin=-1, horizon=5), cut_fails=True)
    events = (found.event[..., 0] * 10).round().long().tolist()
    assert events[2] == [1, 2, 3, 3, 3]
    assert events[3] == [2, 3, 3, 3, 3]
    assert events[0] == [0, 0, 1, 1, 1]


def test_a_data_set_that_says_how_episodes_ended_is_believed():
    """One fell over, one was cut, both without success."""
    data = Frames([4, 4], torch.zeros(8), torch.zeros(8))
    silent = Replay.of_dataset(data, model(2))
    assert not silent.terminated.any()
    last = torch.tensor([0.0, 0, 0, 1, 0, 0, 0, 1])[:, None]
    data.columns |= {DONE: last, TRUNCATED: last * (torch.arange(8) > 3)[:, None]}
    found = Replay.of_dataset(data, model(2))
    assert found.terminated.tolist() == [False, False, True, True] + [False] * 2
    del data.columns[TRUNCATED]
    alone = Replay.of_dataset(data, model(2))
    assert torch.equal(alone.terminated, silent.terminated), "next.done alone may mean either"


def test_interventions_without_an_outcome_are_no_demonstrations():
    data = Frames([4, 4])
    assert Replay.of_dataset(data, model(2)).success.all(), "control: demonstrations"
    data.columns[INTERVENTION] = torch.zeros(8, 1)
    with pytest.raises(ConfigError, match=r"neither next.success nor next.reward"):
        Replay.of_dataset(data, model(2))


def test_the_noise_of_a_decision_is_known_where_it_began_and_for_a_whole_chunk():
    data = Frames([6], torch.zeros(6), torch.zeros(6))
    data.columns |= {
        DECISION: torch.tensor([0.0, 0, 1, 2, 2, 3])[:, None],
        EXECUTED: torch.tensor([2.0, 2, 1, 2, 2, 1])[:, None],
        INTERVENTION: torch.tensor([0.0, 0, 0, 1, 1, 0])[:, None],
        START: torch.arange(12.0).view(6, 2),
    }
    found = Replay.of_dataset(data, model(2), cut_fails=True)
    known = (~found.start.isnan().flatten(1)).all(1).tolist()
    # the third was cut to one step by a person who takes two, and its chunk is as long as it was
    assert known == [True, False, True, False, False, True]
    assert found.start[0].flatten().tolist() == [0, 1]
    del data.columns[START]
    assert Replay.of_dataset(data, model(2), cut_fails=True).start.isnan().all(), "control"


# -- what was lived --------------------------------------------------------------------------------


def episode(executed, human, frames=True):
    """An episode of decisions of up to 3 steps, of which step i shows i and does i; ``human``: of
    its L steps.
    """
    H, T = len(executed), 3
    count = torch.tensor(executed)
    begin = count.cumsum(0) - count
    place = (begin[:, None] + torch.arange(T)).clamp_max(int(count.sum()) - 1).float()
    taken = torch.arange(T) < count[:, None]
    person = torch.zeros(H, T, dtype=torch.bool)
    person[taken] = torch.tensor(human).bool()
    last = torch.arange(H) == H - 1
    made = {
        "x0": torch.full((H, T, 1), -1.0),  # planned
        "start": torch.arange(float(H))[:, None, None].expand(-1, T, 1),
        "rewards": place * taken,
        "executed": count,
        "terminated": last,
        "truncated": torch.zeros(H, dtype=torch.bool),
        "success": last,
        "actions": place[..., None],
        "observation": {STATE: begin.float()[:, None, None]},
        "prompts": ["walk"] * H,
        "final": {STATE: torch.full((1, 1, 1), float(count.sum()))},
        "human": person,
    }
    return made | ({FRAMES: {STATE: torch.arange(float(count.sum()))[:, None]}} if frames else {})


def shown(replay):
    """(what was seen, what was seen next, executed, a person's, terminated) of every row."""
    seen = replay.views.observation[STATE][:, -1, 0]
    return [
        (int(seen[now]), int(seen[after]), int(executed), bool(human[0]), bool(over))
        for now, after, executed, human, over in zip(
            replay.now, replay.after, replay.executed, replay.human, replay.terminated, strict=True
        )
    ]


def test_a_decision_that_a_person_took_is_what_was_done_and_not_what_was_planned():
    """The policy's first decision was cut by the take-over, and the second one is the person's."""
    made = episode([2, 3, 3], [0, 0, 1, 1, 1, 0, 0, 0], frames=False)
    found = Replay.of_episodes([made], model=model(3))
    assert shown(found) == [
        (0, 2, 2, False, False),
        (2, 5, 3, True, False),
        (5, 8, 3, False, True),
    ]
    assert (found.event[1].flatten() * 10).tolist() == [2, 3, 4]
    assert (found.event[[0, 2]] == -1).all()
    assert found.start[1].isnan().all()
    assert found.start[2].flatten().tolist() == [2] * 3
    assert found.success.all()
    alone = {name: value for name, value in made.items() if name != "human"}
    plain = Replay.of_episodes([alone])
    assert not plain.human.any()
    assert (plain.event == -1).all(), "control: an episode without a person"
    with pytest.raises(ValueError, match="name the model"):
        Replay.of_episodes([made])


def test_a_decision_of_both_is_cut_where_the_other_begins():
    made = episode([3, 3, 3, 1], [0, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    found = Replay.of_episodes([made, made], model=model(3))
    once = [
        (0, 1, 1, False, False),
        (1, 3, 2, True, False),
        (3, 4, 1, True, False),
        (4, 6, 2, False, False),
        (6, 9, 3, False, False),
        (9, 10, 1, False, True),
    ]
    assert shown(found) == once * 2
    assert found.executed.sum() == 20
    assert found.rewards.sum() == 2 * sum(range(10))
    assert (found.event[1].flatten() * 10).round().tolist() == [1, 2, 3], "the person's go on"
    assert (found.event[2].flatten() * 10).round().tolist() == [3, 3, 3]
    assert (
        found.start.isnan().flatten(1).all(1).tolist()[:6]
        == [False, True, True, True] + [False] * 2
    )
    returns = found.returns(GAMMA)[:6]
    whole = [sum(i * GAMMA ** (i - row[0]) for i in range(row[0], 10)) for row in once]
    assert returns.tolist() == pytest.approx(whole)
    with pytest.raises(ConfigError, match=r"record: true"):
        Replay.of_episodes([{n: v for n, v in made.items() if n != FRAMES}], model=model(3))


@pytest.mark.parametrize("seed", SEEDS)
def test_random_takeovers_in_lived_episodes_conserve_every_step(seed):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(4):
        executed = torch.randint(1, 4, (6,), generator=generator).tolist()
        human = torch.rand(sum(executed), generator=generator) < 0.4
        made.append(episode(executed, human.tolist()))
    found = Replay.of_episodes(made, model=model(3))
    assert int(found.executed.sum()) == sum(int(e["executed"].sum()) for e in made)
    assert int(found.human.sum()) == sum(int(e["human"].sum()) for e in made)
    inside = torch.arange(3) < found.executed[:, None]
    both = found.human.any(1) & (inside & ~found.human).any(1)
    assert not both.any()
    assert int(found.terminated.sum()) == 4
    seen = found.views.observation[STATE][:, -1, 0]
    assert torch.equal(seen[found.after] - seen[found.now], found.executed.float())
    whole = sum(float(e["rewards"].sum()) for e in made)
    assert math.isclose(float(found.rewards.sum()), whole)
    mixes = [
        e["human"].any(1) & ((torch.arange(3) < e["executed"][:, None]) & ~e["human"]).any(1)
        for e in made
    ]
    assert any(m.any() for m in mixes), "control: the decisions themselves were of both"


def test_the_last_own_frame_by_hand():
    number, human = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 1, 1, 0, 0]).bool()
    assert last_own(number, human).tolist() == [0, 2, 2, 3, 5, 5]

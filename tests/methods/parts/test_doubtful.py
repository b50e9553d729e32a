"""The decisions that ALOE doubts: the robot's last ones before a person takes over."""

import pytest
import torch

from genpolicy.methods.aloe import doubtful
from genpolicy.rollout.columns import INTERVENTION
from genpolicy.rollout.replay import Replay
from tests.rl100_toy import Frames
from tests.rollout.test_replay import model
from tests.rollout.test_takeovers import episode


def lived(seed: int) -> Replay:
    """Random episodes of decisions that are the robot's or a person's."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(8):
        executed = torch.randint(1, 4, (7,), generator=generator)
        human = (torch.rand(7, generator=generator) < 0.3).repeat_interleave(executed)
        made.append(episode(executed.tolist(), human.tolist()))
    return Replay.of_episodes(made, model=model(3))


def by_hand(replay: Replay, count: int) -> list[bool]:
    """Decision by decision, looking forward in the episode."""
    person = replay.human.any(1).tolist()
    number = replay.episode.tolist()
    found = []
    for row in range(len(person)):
        ahead = [r for r in range(row + 1, len(person)) if number[r] == number[row]]
        soon = next((place for place, r in enumerate(ahead, 1) if person[r]), None)
        found.append(not person[row] and soon is not None and soon <= count)
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_the_last_decisions_before_a_take_over_are_doubted_and_no_others(seed, count):
    replay = lived(seed)
    assert doubtful(replay, count).tolist() == by_hand(replay, count)
    assert doubtful(replay, count).any() == (count > 0)


def test_an_episode_that_a_person_begins_casts_no_doubt_on_the_one_before():
    robot, person = episode([3, 3], [0] * 6), episode([3, 3], [1] * 3 + [0] * 3)
    replay = Replay.of_episodes([robot, person, robot, person], model=model(3))
    assert not doubtful(replay, 2).any()
    replay = Replay.of_episodes([robot, episode([3, 3], [0] * 3 + [1] * 3)], model=model(3))
    assert doubtful(replay, 2).tolist() == [False, False, True, False], "control"


def test_hand_back_and_the_robots_decisions_after_it_are_not_doubted():
    made = episode([3] * 4, [1] * 3 + [0] * 9)
    assert not doubtful(Replay.of_episodes([made], model=model(3)), 2).any()


@pytest.mark.parametrize("chunk", [1, 3])
def test_in_a_data_set_the_same_steps_are_doubted(chunk):
    """There every frame is a decision: doubted are those from which a person is reached within so
    many chunks, and not only the last two frames.
    """
    lengths, human = [12, 5], torch.zeros(17)
    human[9:11] = 1
    data = Frames(lengths, torch.zeros(17), torch.zeros(17))
    data.columns[INTERVENTION] = human[:, None]
    replay = Replay.of_dataset(data, model(chunk), cut_fails=True)
    doubted = doubtful(replay, 2)
    assert replay.now[doubted].tolist() == list(range(9 - 2 * chunk, 9))

"""The outcomes of recorded episodes: decided data set by data set, told, and valued by one reward."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.contracts.dataset import Merged
from genpolicy.evaluation import metrics_file
from genpolicy.methods.parts.offline_data import Experience
from genpolicy.rollout.replay import ROWS, Replay, outcome
from genpolicy.tasks._environments import Environments
from genpolicy.training.experiment import train
from tests.rl100_toy import Frames, Outcomes, experiment
from tests.rollout.test_replay import equal, model
from tests.toy_control import Point, Recorded, Walk, prepared

REWARD, SUCCESS = "next.reward", "next.success"


@dataclass
class Silent(Outcomes):
    """Episodes without some columns: ``data: {name: .., lacks: [next.success]}``."""

    lacks: tuple[str, ...] = (SUCCESS,)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.columns = {n: v for n, v in self.columns.items() if n not in self.lacks}


class PaidOnce(Walk):
    """A walk in which success alone is rewarded."""

    def step(self, action):
        frame, _, ended, cut, info = super().step(action)
        return frame, float(info["success"]), ended, cut, info


@dataclass
class Sparse(Point):
    """``task: {name: "tests.methods.parts.test_outcomes:Sparse"}``."""

    def environments(self, count, history):
        make = partial(PaidOnce, self.ends)
        return Environments(make, count, history, self.limit, self.instruction)


HERE = "tests.methods.parts.test_outcomes"
JUDGED = {"name": "tests.rl100_toy:Outcomes", "episodes": 6, "skill": 0.12}
"""Episodes of which some succeed within the limit, with their rewards."""
UNJUDGED = {"name": f"{HERE}:Silent", "episodes": 3}
BARE = {**UNJUDGED, "lacks": [SUCCESS, REWARD]}


def prepared_on(folder, data, **sections):
    """A run on data sets, what it says, and its experience."""
    raw = experiment(folder, data=data, **sections)
    names = ("policy", "chain", "data", "optimizer", "environments", "eval", "budget", "task")
    run = prepared(folder, **{name: raw[name] for name in names})[0]
    said = []
    run.display.say = said.append
    return run, said, Experience(run, True)


# Decided


def test_an_episode_that_failed_has_failed_beside_a_data_set_that_does_not_say():
    """Three episodes of four frames, of which one succeeded, and two that record nothing."""
    success = torch.zeros(12)
    success[7] = 1
    judged = Frames([4, 4, 4], success, success)
    silent = Frames([4, 4])
    both = Replay.of_dataset(Merged([judged, silent], ["judged", "silent"]), model(2))
    alone = Replay.of_dataset(judged, model(2))
    won = {int(episode) for episode in both.episode[both.success]}
    assert won == {1, 3, 4}
    for name in set(ROWS) - {"now", "after", "episode"}:
        assert equal(getattr(both, name)[: len(alone)], getattr(alone, name))
    assert REWARD not in Merged([judged, silent], ["judged", "silent"]).columns
    whole = outcome(Merged([judged, silent], ["judged", "silent"]))[1]
    assert whole.all(), "control: by the columns that both have, every failure is a success"


def test_several_data_sets_that_say_it_are_what_they_were_together():
    one = Frames([3, 2], torch.tensor([0, 0, 1, 0, 0.0]), torch.ones(5))
    two = Frames([2, 4], torch.tensor([0, 1, 0, 0, 0, 0.0]), torch.zeros(6))
    both = Replay.of_dataset(Merged([one, two], ["one", "two"]), model(2), cut_fails=True)
    parts = Replay.cat([Replay.of_dataset(part, model(2), cut_fails=True) for part in (one, two)])
    for name in ROWS:
        assert equal(getattr(both, name), getattr(parts, name))
    views = both.views.observation["observation.state"]
    assert torch.equal(views, parts.views.observation["observation.state"])
    assert both.episode.unique().tolist() == [0, 1, 2, 3]


# Told


def test_what_came_of_the_episodes_is_told_once(tmp_path):
    run, said, experience = prepared_on(tmp_path, [JUDGED, UNJUDGED])
    won = sum(Outcomes(episodes=6, skill=0.12).succeeded)
    assert 0 < won < 6
    experience.replay  # noqa: B018
    experience._everything = None
    assert int(experience.replay.success[experience.replay.first].sum()) == won + 3
    assert said == [
        f"data: {won + 3} of 9 episodes succeeded; {HERE}:Silent has no next.success: an episode"
        " counts as one where it was rewarded"
    ]
    run.evaluator.close()


def test_a_data_set_without_any_outcome_is_named(tmp_path):
    sparse = {"name": f"{HERE}:Sparse"}
    run, said, experience = prepared_on(tmp_path, BARE, task=sparse)
    assert experience.replay.success.all()
    assert said == [
        f"data: 3 of 3 episodes succeeded; {HERE}:Silent records no outcome: its 3 count as"
        " successes"
    ]
    run.evaluator.close()


# Valued


OFFLINE = {"stage": "offline", "offline": {"candidates": 1}}


def test_data_without_rewards_beside_a_reward_of_the_environments_own_are_refused(tmp_path):
    """Before anything is learned: the first evaluation shows what the environment pays."""
    for number, method in enumerate(({}, OFFLINE)):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(ConfigError, match=r"has no column next\.reward") as told:
            train(parse.parse(experiment(folder, data=BARE, method=method)))
        assert "\n" not in str(told.value)
        assert f"{HERE}:Silent" in str(told.value)
        assert {line["iteration"] for line in metrics_file.read(folder / "run")} == {0}


def test_data_without_rewards_beside_data_with_their_own_are_refused(tmp_path):
    run, _, experience = prepared_on(tmp_path, [JUDGED, BARE], task={"name": f"{HERE}:Sparse"})
    with pytest.raises(ConfigError, match="beside rewards of another kind"):
        experience.require_one_reward()
    run.evaluator.close()


def test_collected_episodes_show_a_reward_of_their_own_too(tmp_path):
    """A first policy that earned nothing at all says nothing of what is paid."""
    run, _, experience = prepared_on(tmp_path, BARE)
    run.deployment.before = {"return": 0.0, "success_rate": 0.0}
    experience.require_one_reward()
    run.collect(4, 1, keep=True)
    experience.add(1)
    with pytest.raises(ConfigError, match=r"has no column next\.reward"):
        experience.replay  # noqa: B018
    run.evaluator.close()


@pytest.mark.parametrize("case", ["sparse", "own", "cloned", "rewarded"])
def test_where_nothing_is_valued_twice_they_are_taken(tmp_path, case):
    """With success alone paid; where critics learn from the run's own episodes; to be cloned; and
    with the column.
    """
    sections = {"data": BARE, "method": OFFLINE, "budget": {"iterations": 4}}
    if case == "sparse":
        sections["task"] = {"name": f"{HERE}:Sparse"}
    elif case == "own":
        sections["method"] = {**OFFLINE, "offline": {"candidates": 1, "demonstrations": False}}
    elif case == "cloned":
        sections["method"] = {"stage": "imitation"}
    else:
        sections["data"] = UNJUDGED
    assert train(parse.parse(experiment(tmp_path, **sections))).folder.exists()


def test_control_the_toy_of_the_others_has_no_rewards_either():
    assert not {REWARD, SUCCESS} & set(Recorded(episodes=1).columns)
    assert isinstance(Silent(episodes=1).columns, Mapping)

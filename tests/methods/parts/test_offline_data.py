"""The data of a run: starts that failed come again, the floor under what is collected holds."""

import math
from functools import partial

import pytest
import torch

from genpolicy.learning.acceptance import safe_share
from genpolicy.methods.parts.anchor import Anchor
from genpolicy.methods.parts.online import Failures, Floor, Online, OnPolicy
from genpolicy.training.processes import Processes
from tests.peers import peers, together
from tests.toy_control import prepared

CLONING = {"method": {"name": "bc"}, "environments": 4}


@pytest.fixture
def run(tmp_path):
    return prepared(tmp_path, **CLONING)[0]


# -- failures --------------------------------------------------------------------------------------


def test_a_start_stays_until_it_succeeds(run):
    failures = Failures(run)
    failures.note([7, 8, 9], torch.tensor([[0.0], [1.0], [0.0]]))
    assert failures.seeds == [7, 9]
    failures.note([9, 7, 8], torch.tensor([[1.0], [0.0], [0.0]]))
    assert sorted(failures.seeds) == [7, 8], "8 had succeeded before, and 7 is there once"
    failures.note([7], None)
    assert 7 in failures.seeds, "nobody has judged it"
    failures.note([8, 7], torch.tensor([[0.5, 1.0], [1.0, 1.0]]))
    assert failures.seeds == [8], "every member of a group must succeed"


def test_failures_take_their_share_of_the_starts_and_no_more(run):
    failures, fresh = Failures(run), list(range(100, 120))
    assert failures.mixed(fresh, 0.25) == fresh
    failures.seeds = [1, 2]
    assert failures.mixed(fresh, 0.25)[:18] == fresh[:18]
    assert sorted(failures.mixed(fresh, 0.25)[18:]) == [1, 2]
    failures.seeds = list(range(50))
    mixed = failures.mixed(fresh, 0.25)
    assert mixed[:15] == fresh[:15]
    assert len(set(mixed[15:])) == 5
    assert set(mixed[15:]) <= set(range(50))
    assert failures.mixed(fresh, 0.25) == mixed, "a function of the iteration"
    run.spent.iteration = 2
    assert failures.mixed(fresh, 0.25) != mixed, "control: and of another one another"
    assert failures.mixed(fresh, 0.0) == fresh


# -- the floor -------------------------------------------------------------------------------------


def floored(run, share, rate, monkeypatch):
    """A floor whose baseline comes to ``rate``, and the episodes that were played for it."""
    played = []

    def try_out(episodes, name):
        played.append((episodes, name))
        return rate

    monkeypatch.setattr(run, "try_out", try_out)
    return Floor(run, share, Anchor(run)), played


def test_the_floor_holds_in_expectation(run, monkeypatch):
    floor, played = floored(run, 0.8, 0.5, monkeypatch)
    assert floor.episodes(40) == 40, "the new policy is still the baseline"
    assert played == [(40, floor.anchor.iteration)], "whose rate is measured once"
    floor.note(torch.zeros(40, 1))  # it has failed altogether; Wilson: at least 0
    mine = floor.episodes(40)
    assert floor.lower <= 1e-9
    assert mine == 8, "a fifth"
    assert played[1:] == [(40 - mine, run.iteration)], "the baseline plays the others"
    assert mine * floor.lower + (40 - mine) * 0.5 >= 0.8 * 0.5 * 40 - 1e-6
    assert (mine + 1) * floor.lower + (39 - mine) * 0.5 < 0.8 * 0.5 * 40, (
        "control: one more would be too many"
    )
    floor.note(torch.ones(40, 1))
    assert floor.episodes(40) == 40


def test_the_floor_goes_by_a_lower_bound(run, monkeypatch):
    floor, _ = floored(run, 0.95, 0.5, monkeypatch)
    floor.note(
        torch.arange(40).remainder(2).double()[:, None]
    )  # .5, as good as the baseline: but of 40 only
    assert 0.3 < floor.lower < 0.5
    assert floor.episodes(40) == math.floor(safe_share(0.95, 0.5, floor.lower) * 40) < 40


def test_a_hopeless_policy_plays_one_episode_in_each_process(tmp_path, monkeypatch):
    accelerators = peers(2)
    for share, expected in ((1.0, 2), (0.8, 6)):  # .2 of 33 are 6.6: six, three to each
        runs = [prepared(tmp_path, each, **CLONING)[0] for each in accelerators]
        floors = [floored(each, share, 0.5, monkeypatch)[0] for each in runs]
        for floor in floors:
            floor.lower = 0.0
        played = together([partial(floor.episodes, 33) for floor in floors], accelerators)
        assert played == [expected, expected]
    starts = runs[0].starts(6)
    rollouts = together([partial(each.collect, 6, 1, starts=starts) for each in runs], accelerators)
    assert [len(rollout.local) for rollout in rollouts] == [3, 3]


def test_processes_whose_bounds_differ_play_as_many_as_the_main_one_says(tmp_path, monkeypatch):
    accelerators = peers(2)
    runs = [prepared(tmp_path, each, **CLONING)[0] for each in accelerators]
    floors = [floored(each, 0.8, 0.5, monkeypatch)[0] for each in runs]
    floors[0].lower, floors[1].lower = 0.0, 0.3

    def episodes():
        return together([partial(floor.episodes, 32) for floor in floors], accelerators)

    assert episodes() == [6, 6]
    monkeypatch.setattr(Processes, "agreed", lambda self, values: list(values))
    assert episodes() == [6, 16], "control: each by its own number"


# -- on the policy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cut_fails", [True, False])
def test_what_comes_after_a_cut(run, cut_fails):
    """The last observation's value has no part in the advantage where the limit ends the task."""
    on_policy = OnPolicy(run, Online(episodes=6, retry=0.0), 0.9, cut_fails, Anchor(run))
    exact = lambda new, old, x: torch.zeros(len(x))  # noqa: E731
    rollout, advantage, returns = on_policy.rollout(exact)
    d = rollout.decisions
    cut = d.last
    assert bool(d.terminated[d.last].all()) is cut_fails
    value = (
        on_policy.critic.value(run.policy.model.features(rollout.trajectory.condition))
        .detach()
        .double()
    )
    paid = (d.rewards * 0.9 ** torch.arange(d.rewards.shape[1])).sum(1)
    alone = torch.allclose(advantage[cut].double(), paid[cut].double() - value[cut], atol=1e-6)
    assert alone is cut_fails
    assert torch.allclose(returns.double(), advantage.double() + value, atol=1e-6)


def test_what_failed_comes_again(run):
    on_policy = OnPolicy(run, Online(episodes=6, retry=0.5), 0.9, True, Anchor(run))
    rollout = on_policy.rollout(lambda new, old, x: torch.zeros(len(x)))[0]
    failed = [
        seed
        for seed, good in zip(run.starts(6), rollout.success.mean(1).tolist(), strict=True)
        if good < 1
    ]
    assert on_policy.failures.seeds == failed
    assert len(failed) >= 3
    run.spent.iteration = 2
    again = on_policy.rollout(lambda new, old, x: torch.zeros(len(x)))[0]
    begun = [int(prompt.removeprefix("start ")) for prompt in again.prompts]
    assert begun[:3] == run.starts(6)[:3]
    assert set(begun[3:]) <= set(failed)
    assert math.isinf(on_policy.floor.lower) is False

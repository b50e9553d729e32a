"""The data of a run: starts that failed come again, the floor under what is collected holds."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from genpolicy.config.errors import ConfigError
from genpolicy.learning.acceptance import safe_share
from genpolicy.methods.parts.anchor import Anchor
from genpolicy.methods.parts.failures import Failures
from genpolicy.methods.parts.online import Floor, Online, OnPolicy
from genpolicy.training import resume
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


def floored(run, share, outcomes, monkeypatch):
    """A floor whose baseline has the ``outcomes`` again and again, and the episodes that were
    played for it.
    """
    played = []

    def again(episodes, name):
        played.append((episodes, name))
        told = torch.tensor(outcomes, dtype=torch.float64)
        return told.repeat(math.ceil(episodes / len(told)))[:episodes]

    monkeypatch.setattr(run, "outcomes", again)
    return Floor(run, share, Anchor(run)), played


def played(returns, success=None):
    """A rollout of episodes with these returns, and their success where the task judges."""
    told = [None if v is None else torch.tensor(v).double()[:, None] for v in (returns, success)]
    return SimpleNamespace(rewards=told[0], success=told[1])


HALF = [1.0, 0.0]
"""A baseline that succeeds in half of its episodes."""
ALL, NONE = [1.0] * 40, [0.0] * 40


def test_the_floor_holds_in_expectation(run, monkeypatch):
    floor, ran = floored(run, 0.8, HALF, monkeypatch)
    assert floor.episodes(40) == 8, "of what it does with its noise nothing is known yet"
    assert ran[0] == (40, floor.anchor.iteration), "the baseline is measured first"
    assert ran[1:] == [(32, run.iteration)], "and plays the others"
    floor.note(played(NONE, NONE))  # it has failed altogether; Wilson: at least 0
    mine = floor.episodes(40)
    assert floor.lower <= 1e-9
    assert mine == 8, "a fifth"
    assert mine * floor.lower + (40 - mine) * 0.5 >= 0.8 * 0.5 * 40 - 1e-6
    assert (mine + 1) * floor.lower + (39 - mine) * 0.5 < 0.8 * 0.5 * 40, (
        "control: one more would be too many"
    )
    floor.note(played(NONE, ALL))
    assert floor.episodes(40) == 40


def test_the_floor_goes_by_a_lower_bound(run, monkeypatch):
    floor, _ = floored(run, 0.95, HALF, monkeypatch)
    half = HALF * 20
    floor.note(played(half, half))  # .5, as good as the baseline: but of 40 only
    assert 0.3 < floor.lower < 0.5
    assert floor.episodes(40) == math.floor(safe_share(0.95, 0.5, floor.lower) * 40) < 40


def test_a_policy_that_always_fails_is_held_whatever_its_returns_are(run, monkeypatch):
    """The toy pays about 50 for coming near; the baseline succeeds in half of its episodes."""
    floor, _ = floored(run, 0.9, HALF, monkeypatch)
    floor.note(played([50.0, 51.0] * 10, [0.0] * 20))
    assert floor.episodes(20) == 2
    assert safe_share(0.9, 0.5, 50.0) == 1.0, "control: returns beside a success rate"


def test_where_nobody_judges_returns_are_compared_with_returns(tmp_path, monkeypatch):
    task = {"name": "tests.toy_control:Point", "judged": False}
    run = prepared(tmp_path, task=task, **CLONING)[0]
    rollout = run.collect(4, 1)
    assert rollout.success is None
    floor, _ = floored(run, 0.9, [20.0, 30.0], monkeypatch)
    assert floor.lower == -math.inf
    assert floor.episodes(20) == 2, "as few as can be learned from"
    floor.note(played([24.0, 25.0, 26.0, 25.0] * 5))
    assert floor.episodes(20) == 20
    floor.note(rollout)
    assert floor.lower < float(rollout.rewards.mean()) < 20
    assert floor.episodes(20) == 2


def test_a_baseline_of_negative_returns_may_lose_as_much_as_a_positive_one(tmp_path, monkeypatch):
    task = {"name": "tests.toy_control:Point", "judged": False}
    run = prepared(tmp_path, task=task, **CLONING)[0]
    floor, _ = floored(run, 0.8, [-9.0, -11.0], monkeypatch)
    floor.note(played([-9.5, -10.5] * 10))  # as good; its bound is within the two that may be lost
    assert -12 < floor.lower < -10
    assert floor.episodes(20) == 20
    floor.note(played([-29.0, -31.0] * 10))
    mine = floor.episodes(40)
    assert mine == 3
    assert mine * floor.lower + (40 - mine) * -10 >= -12 * 40
    assert (mine + 1) * floor.lower + (39 - mine) * -10 < -12 * 40, "control: it is used up"


@pytest.mark.parametrize("judged", [True, False])
def test_one_lucky_episode_is_no_lower_bound(tmp_path, monkeypatch, judged):
    task = {"name": "tests.toy_control:Point", "judged": judged}
    run = prepared(tmp_path, task=task, **CLONING)[0]
    floor, _ = floored(run, 0.9, HALF, monkeypatch)
    floor.note(played([1.0], [1.0] if judged else None))
    assert floor.lower == (0.0 if judged else -math.inf)
    with pytest.raises(ConfigError, match="nothing can be claimed of a single episode"):
        Online(episodes=1, floor=0.9)


def test_the_baseline_is_measured_with_the_sampler_that_plays_it(tmp_path, monkeypatch):
    """The policy that is deployed, of the weights that the stage began with, both times."""
    run = prepared(tmp_path, **CLONING)[0]
    floor = Floor(run, 0.9, Anchor(run))
    begun = [parameter.detach().clone() for parameter in run.trainable]
    for parameter in run.trainable:
        parameter.data += 1.0
    seen = []
    honest = run.evaluator.try_out

    def watched(policy, *rest):
        same = all(torch.equal(p, b) for p, b in zip(run.trainable, begun, strict=True))
        seen.append((policy is run.deployed, same))
        return honest(policy, *rest)

    monkeypatch.setattr(type(run.evaluator), "try_out", staticmethod(watched))
    mine = floor.episodes(12)
    assert seen == [(True, True)] * 2
    assert len(floor.baseline) == 12 + 12 - mine, "what it plays is known of it from then on"
    saved = Floor.__new__(Floor)
    saved.load_state_dict(floor.state_dict())
    assert torch.equal(saved.baseline, floor.baseline)
    assert (saved.lower, saved.worst) == (floor.lower, floor.worst)


def test_a_floor_of_an_older_version_is_refused_in_a_sentence(tmp_path, monkeypatch):
    """It kept a lower bound of another meaning, and nothing of its baseline."""
    run = prepared(tmp_path, **CLONING)[0]
    Floor(run, 0.9, Anchor(run))
    with monkeypatch.context() as then:
        then.setattr(Floor, "state_dict", lambda self: {"lower": 0.3})
        resume.save(run)
    again = prepared(tmp_path, **CLONING)[0]
    Floor(again, 0.9, Anchor(again))
    with pytest.raises(ConfigError, match=r"does not fit this experiment .* 'baseline'"):
        resume.resume(again)
    resume.save(run)
    resume.resume(again)  # control


def test_a_hopeless_policy_plays_two_episodes_in_all_and_equally_many_in_each_process(
    tmp_path, monkeypatch
):
    accelerators = peers(2)
    for share, expected in ((1.0, 2), (0.8, 6)):  # .2 of 33 are 6.6: six, three to each
        runs = [prepared(tmp_path, each, **CLONING)[0] for each in accelerators]
        floors = [floored(each, share, HALF, monkeypatch)[0] for each in runs]
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
    floors = [floored(each, 0.8, HALF, monkeypatch)[0] for each in runs]
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
    assert 0 <= on_policy.floor.lower < 0.6

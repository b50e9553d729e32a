"""What off-policy methods learn from: settings that are refused, what counts as offline, and the
shares of a batch.
"""

import math

import pytest
import torch

from genpolicy.config.errors import ConfigError
from genpolicy.methods.aloe import ALOE
from genpolicy.methods.dsrl import DSRL
from genpolicy.methods.parts.chunk_critic import Valuing, mixed_rows
from genpolicy.methods.parts.practice import Episodes, Practice
from genpolicy.methods.q_chunking import QChunking
from genpolicy.rollout.person import Intervention
from tests.methods.parts.test_iql import one_of
from tests.toy_control import prepared

TOTAL, OFFLINE, BATCH = 50, 20, 32


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    return prepared(tmp_path_factory.mktemp("practice"), method={"name": "bc"})[0]


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"members": 2, "subset": 3}, "subset"),
        ({"subset": 0}, "subset"),
        ({"members": 0, "subset": 0}, "members"),
        ({"bins": 5, "low": 0.0, "high": 1.0}, "bins"),
        ({"bins": 51}, "bins need low and high"),
        ({"bins": 51, "low": 0.0}, "bins need low and high"),
        ({"low": 1.0, "high": 0.0}, "low"),
        ({"bins": 51, "low": 1.0, "high": 1.0}, "low"),
        ({"bins": 51, "low": 0.0, "high": math.inf}, "finite"),
        ({"kind": "sac"}, "kind"),
        ({"offline": 1.5}, "offline"),
        ({"expectile": -0.1}, "expectile"),
        ({"polyak": 0.0}, "polyak"),
        ({"lr": 0.0}, "lr"),
        ({"conservative": -1.0}, "conservative"),
        ({"bins": -1}, "bins"),
        ({"batch": 0}, "batch"),
        ({"first": 0}, "first"),
    ],
)
def test_settings_of_a_critic_that_make_no_sense_are_refused_by_name(settings, said):
    with pytest.raises(ConfigError, match=rf"critic.*{said}") as told:
        Valuing(**settings)
    assert "\n" not in str(told.value)


def test_settings_that_make_sense_are_taken():
    assert Valuing(members=3, subset=3).support() is None
    support = Valuing(bins=51, low=-2, high=0).support()
    assert support is not None
    assert (support.low, support.high, support.bins) == (-2, 0, 51)


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        (
            Valuing,
            {"conservative": 0.1},
            "conservative is 0.1, and with kind rlpd nothing reads it",
        ),
        (Valuing, {"kind": "cal_ql", "expectile": 0.9}, "expectile is 0.9, and with kind cal_ql"),
        (QChunking, {"suffix": 0.9}, "suffix is 0.9, and with length 1"),
        (QChunking, {"optimism": 0.9}, "optimism is 0.9, and with length 1"),
        (QChunking, {"length": 2, "bootstrap": "steps", "suffix": 0.9}, "with bootstrap steps"),
        (QChunking, {"length": 2, "critic": Valuing(subset=1)}, "critic: subset is 1, and with"),
        (ALOE, {"critic": Valuing(pessimism=1.0)}, "critic: pessimism is 1.0, and with the least"),
        (ALOE, {"weigh": "returns", "critic": Valuing(members=2)}, "critic: members is 2"),
        (ALOE, {"weigh": "returns", "samples": 8}, "samples is 8, and with weigh returns"),
        (ALOE, {"weigh": "alike", "beta": 0.5}, "beta is 0.5, and with weigh alike"),
        (ALOE, {"weigh": "person", "critic": Valuing(hidden=64)}, "critic: hidden is 64"),
        (DSRL, {"critic": Valuing(pessimism=1.0)}, "critic: pessimism is 1.0"),
        (DSRL, {"form": "sac", "samples": 4}, "samples is 4, and with form sac and kind rlpd"),
    ],
)
def test_settings_that_nothing_would_read_are_refused_by_name(method, settings, said):
    with pytest.raises(ConfigError, match=said) as told:
        method(**settings)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (Valuing, {"kind": "cal_ql", "conservative": 0.1}),
        (Valuing, {"kind": "iql", "expectile": 0.9}),
        (QChunking, {"length": 2, "suffix": 0.9, "optimism": 0.9}),
        (QChunking, {"critic": Valuing(subset=1)}),
        (QChunking, {"suffix": 0.5, "optimism": 0.7}),
        (ALOE, {"weigh": "returns", "beta": 0.5, "critic": Valuing(hidden=64, low=0.0)}),
        (ALOE, {"weigh": "success", "updates": 10, "doubted": 2}),
        (DSRL, {"form": "sac", "samples": 4, "critic": Valuing(kind="cal_ql")}),
    ],
)
def test_control_settings_that_are_read_are_taken(method, settings):
    made = method(**settings)
    assert {name: getattr(made, name) for name in settings} == settings


@pytest.mark.parametrize("settings", [{"first": -1}, {"episodes": -1}, {"retry": 1.5}])
def test_settings_of_practice_that_make_no_sense_are_refused(settings):
    with pytest.raises(ConfigError, match=rf"practice.*{next(iter(settings))}"):
        Practice(**settings)


def test_nothing_to_learn_from_is_refused_in_one_sentence(tmp_path):
    empty, _ = prepared(tmp_path, method={"name": "bc"})
    empty.data = None
    with pytest.raises(ConfigError, match=r"practice\.first") as told:
        Episodes(empty, Practice(first=0), False)
    assert "\n" not in str(told.value)
    Episodes(empty, Practice(first=1), False)  # control


def test_a_person_who_can_not_act_is_told_before_anything_is_played(tmp_path):
    def begun(name, practice, task=None):
        run, _ = prepared(tmp_path / name, method={"name": "bc"})
        run.task = task or run.task
        Episodes(run, practice, False)

    watched = Practice(person=Intervention(patience=2))
    with pytest.raises(ConfigError, match="no expert who can take over"):
        begun("nobody", watched, object())
    begun("an expert", watched)  # control
    begun("nobody watches", Practice())  # control


def test_without_episodes_only_a_budget_that_learning_spends_is_taken(tmp_path):
    run, _ = prepared(tmp_path, method={"name": "bc"}, budget={"env_steps": 100})
    with pytest.raises(ConfigError, match=r"practice\.episodes is 0.*budget\.iterations") as told:
        Episodes(run, Practice(episodes=0), False)
    assert "\n" not in str(told.value)
    Episodes(run, Practice(episodes=1), False)  # control
    for limit in ("iterations", "nfe", "seconds"):
        other, _ = prepared(tmp_path / limit, method={"name": "bc"}, budget={limit: 3})
        Episodes(other, Practice(episodes=0), False)


def test_without_episodes_later_iterations_play_none(tmp_path):
    run, _ = prepared(tmp_path, method={"name": "bc"})
    episodes = Episodes(run, Practice(first=3, episodes=0), True)
    for iteration in (1, 2, 3):
        run.spent.iteration = iteration
        episodes.gather()
    assert episodes.experience.iterations == [1]


# -- starts that failed ----------------------------------------------------------------------------


@pytest.mark.parametrize("retry", [0.0, 0.5, 1.0])
def test_a_share_of_the_later_episodes_begins_where_one_failed(tmp_path, retry):
    run, _ = prepared(tmp_path, method={"name": "bc"})
    episodes = Episodes(run, Practice(first=4, episodes=4, retry=retry), True)
    played = []
    collect = run.collect
    run.collect = lambda *args, starts, **given: (
        played.append(list(starts)) or collect(*args, starts=starts, **given)
    )
    run.spent.iteration = 1
    episodes.gather()
    assert played[0] == run.starts(4)
    episodes.failures.seeds = [101, 102, 103]
    run.spent.iteration = 2
    episodes.gather()
    again = set(played[1]) & {101, 102, 103}
    assert len(again) == {0.0: 0, 0.5: 2, 1.0: 3}[retry]
    assert len(set(played[1])) == 4


# -- what counts as offline ------------------------------------------------------------------------


@pytest.mark.parametrize(("data", "first"), [(True, 0), (True, 3), (False, 3)])
def test_the_data_section_and_the_first_iteration_count_as_offline(tmp_path, data, first):
    sparse = {"name": "tests.rl100_toy:Outcomes", "episodes": 5}
    run, _ = prepared(tmp_path, method={"name": "bc"}, data=sparse)
    if not data:
        run.data = None
    episodes = Episodes(run, Practice(first=first, episodes=2), True)
    lengths = []
    for iteration in (1, 2, 3):
        run.spent.iteration = iteration
        episodes.gather()
        lengths.append(len(episodes.experience.replay))
    assert episodes.experience.iterations == ([1, 2, 3] if first else [2, 3])
    assert episodes.before == lengths[0]
    assert lengths[0] < lengths[1] < lengths[2]
    starts = episodes.experience.replay.first
    assert int(starts[: episodes.before].sum()) == 5 * data + first
    assert int(starts.sum()) == 5 * data + first + 2 * 2


# -- the rows of a batch ---------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_batch_has_its_share_of_both_halves_and_each_inside_its_bounds(run, share):
    seen = list(mixed_rows(run, TOTAL, OFFLINE, share, 100, BATCH, "critic"))
    assert all(len(rows) == BATCH for rows in seen)
    assert {int((rows < OFFLINE).sum()) for rows in seen} == {round(share * BATCH)}
    everything = set(torch.cat(seen).tolist())
    early, late = set(range(OFFLINE)), set(range(OFFLINE, TOTAL))
    assert everything == (early if share > 0 else set()) | (late if share < 1 else set())
    assert len({tuple(rows.tolist()) for rows in seen}) == 100, "each update draws its own"


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_everything_is_offline_where_nothing_is_online(run, share):
    seen = torch.cat(list(mixed_rows(run, OFFLINE, OFFLINE, share, 50, BATCH, "critic")))
    assert len(seen) == 50 * BATCH
    assert set(seen.tolist()) == set(range(OFFLINE))


def test_a_single_online_decision_is_the_whole_online_half(run):
    (rows,) = mixed_rows(run, OFFLINE + 1, OFFLINE, 0.5, 1, BATCH, "critic")
    assert int((rows == OFFLINE).sum()) == BATCH // 2


@pytest.mark.parametrize("count", [2, 3])
def test_the_shares_of_processes_put_together_are_the_batch_of_one(run, count, monkeypatch):
    draw = (TOTAL, OFFLINE, 0.5, 4, BATCH, "critic")
    whole = list(mixed_rows(run, *draw))
    shares = []
    for index in range(count):
        monkeypatch.setattr(run, "processes", one_of(count, index))
        shares.append(list(mixed_rows(run, *draw)))
    for update, rows in enumerate(whole):
        together = torch.cat([share[update] for share in shares])
        assert torch.equal(together.sort().values, rows.sort().values)
        for index in range(count):
            assert torch.equal(shares[index][update], rows[index::count])
    assert not torch.equal(whole[0], whole[1])


def test_another_iteration_draws_other_rows_and_the_same_one_the_same(run, monkeypatch):
    draw = (TOTAL, OFFLINE, 0.5, 1, BATCH, "critic")
    (one,), (again,) = mixed_rows(run, *draw), mixed_rows(run, *draw)
    assert torch.equal(one, again)
    monkeypatch.setattr(run.spent, "iteration", 2)
    (other,) = mixed_rows(run, *draw)
    assert not torch.equal(one, other)

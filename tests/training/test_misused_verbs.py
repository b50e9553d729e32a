"""Verbs that are asked for something they can't do: one sentence, and nothing is written."""

from functools import partial

import pytest

from genpolicy.config.errors import ConfigError
from tests.training.test_verbs import prepared

NOT_PLAIN = ("../outside", "a/b", "..", ".", "", "a b", "policy.old")


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def told(said, work):
    """Require that ``work`` raises one sentence that matches ``said``."""
    with pytest.raises(ConfigError, match=said) as raised:
        work()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", [*NOT_PLAIN, "absolute"])
def test_a_policy_is_kept_in_the_stages_and_nowhere_else(tmp_path, name):
    name = str(tmp_path / "outside") if name == "absolute" else name
    run = prepared(tmp_path)
    before = files(tmp_path)
    for verb in (run.keep, run.milestone):
        told(
            "a stage's name has letters, digits, hyphens and underscores only",
            lambda verb=verb: verb(name),
        )
    assert files(tmp_path) == before
    assert run.deployment.evaluated_at == -1, "control: it was told before the evaluation"


def test_a_policy_is_kept_under_a_plain_name(tmp_path):
    run = prepared(tmp_path)
    run.keep("candidate-1_b")
    assert "run/stages/candidate-1_b/genpolicy.json" in files(tmp_path)


def test_prompts_have_no_episodes_to_try_a_policy_out_in(tmp_path):
    run = prepared(tmp_path)
    told(
        "prompts have no episodes",
        lambda: run.evaluator.try_out(run.deployed, run.processes, run.metrics, 4, 0),
    )


@pytest.mark.parametrize("world", ["prompts", "robots"])
@pytest.mark.parametrize("amount", ["groups", "members", "updates"])
def test_a_rollout_of_nothing_is_not_collected(tmp_path, world, amount):
    run = prepared(tmp_path, world=world)

    def collected(groups=4, members=2, updates=1):
        return run.collect(groups, members, updates=updates)

    for number in (0, -4):
        wrong = {amount: number}
        told(rf"{amount} is {number}; it must be at least 1", partial(collected, **wrong))
    assert len(collected().rewards) == 4, "control"


@pytest.mark.parametrize("starts", [[], [1, 2, 3], [1, 2, 3, 4, 5]])
def test_every_group_has_one_start(tmp_path, starts):
    run = prepared(tmp_path, world="robots")
    told(
        f"there are {len(starts)} starts for 4 groups",
        lambda: run.collect(4, 1, starts=starts),
    )
    assert len(run.collect(4, 1, starts=[1, 2, 3, 4]).rewards) == 4, "control"


def test_prompts_have_no_starts(tmp_path):
    run = prepared(tmp_path)
    told(
        "starts are the reset seeds of environments", lambda: run.collect(4, 2, starts=[1, 2, 3, 4])
    )


def test_episodes_that_were_not_kept_are_not_read(tmp_path):
    run = prepared(tmp_path, world="robots")
    run.collect(4, 1)
    for iteration in (1, 99):
        told(f"no episode of iteration {iteration} was kept", lambda i=iteration: run.kept(i))
    run.collect(4, 1, keep=True)
    assert len(run.kept(1)) == 4, "control"

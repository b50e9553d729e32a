"""Warm starts through the door: levels that are measured, and a policy deployed with one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from genpolicy.chain import RTI, SDEdit
from genpolicy.cli.main import main
from genpolicy.config import parse
from genpolicy.evaluation.episode_scores import evaluate_control
from genpolicy.evaluation.warm_levels import samples, spread
from genpolicy.policy.files import SAMPLER, load, saved
from genpolicy.training.experiment import train
from tests.cli.test_bad_inputs import complaint
from tests.toy_control import Point, cloned, experiment

TASK = ["--task", "tests.toy_control:Point", "--trust", "--gifs", "0", "--episodes", "6"]


@pytest.fixture(autouse=True)
def _few_decisions_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genpolicy.cli.evaluate_episodes.DECISIONS", 5)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone that belongs to no run."""
    folder = tmp_path_factory.mktemp("warm")
    return Path(cloned(folder)).rename(folder / "policy")


def evaluated(policy: Path, out: Path, *arguments: str) -> dict[str, Any]:
    assert main(["evaluate", str(policy), *TASK, "--out", str(out), *arguments]) == 0
    return json.loads((out / "eval.json").read_text())


def test_the_levels_follow_from_the_spread_that_is_measured(policy: Path, tmp_path: Path, capsys):
    found = evaluated(policy, tmp_path, "--samplers", "rti", "rti_mean", "sdedit")
    rti, mean, sdedit = found["samplers"]
    assert "warm" not in found
    assert found["sampler"]["warm"] is None
    drawn = samples(load(policy), Point().environments(4, 1), 1_000_003)
    for entry in (rti, mean, sdedit):
        assert entry["warm"]["spread"] == pytest.approx(spread(drawn))
        assert 0 < entry["warm"]["J"] <= 0.3
        assert entry["sampler"]["execute"] == 1
        assert entry["nfe_per_decision"] == entry["nfe_per_action"]
    levels = rti["sampler"]["warm"]["levels"]
    assert levels == mean["sampler"]["warm"]["levels"] == list(range(len(levels)))[::-1]
    assert rti["sampler"]["kernel"] == {"name": "ddim", "eta": 1.0}
    assert found["nfe_per_action"] < found["nfe_per_decision"] == found["sampler"]["steps"]
    said = capsys.readouterr().out
    assert f"rti: rti on a grid of 4 steps: levels {levels}; J {rti['warm']['J']:.3f}" in said


def test_what_is_deployed_is_loaded_and_evaluated_with_its_warm_start(policy: Path, tmp_path: Path):
    first = evaluated(
        policy, tmp_path / "a", "--samplers", "rti", "--deploy", str(tmp_path / "new")
    )
    again = evaluated(tmp_path / "new", tmp_path / "b", "--samplers", "warm=null", "ode")
    rti = first["samplers"][0]
    assert again["sampler"] == rti["sampler"]
    for name in ("success_rate", "return", "length", "nfe_per_decision"):
        assert again[name] == pytest.approx(rti[name])
    assert again["warm"]["J"] == pytest.approx(rti["warm"]["J"])
    cold, ode = again["samplers"]
    assert cold["nfe_per_decision"] == ode["nfe_per_decision"] == 4 > again["nfe_per_decision"]
    loaded = load(tmp_path / "new")
    assert isinstance(loaded.warm, RTI)
    assert loaded.execute == 1
    played = evaluate_control(loaded, Point().environments(3, 1), episodes=6, seed=1_000_003)
    assert float(played.returns.mean()) == pytest.approx(rti["return"], abs=1e-6)


def test_a_run_deploys_the_warm_start_of_its_evaluation(tmp_path: Path):
    sampler = {"execute": 1, "warm": {"name": "sdedit", "steps": 2}}
    raw = experiment(tmp_path, eval={"every": 0, "episodes": 4, "sampler": sampler})
    run = train(parse.parse(raw)).folder
    assert load(run).warm == SDEdit(2)
    assert yaml.safe_load((run / "config.yaml").read_text())["chain"]["warm"] is None


def test_the_spread_of_samples_is_that_of_one_observation():
    drawn = torch.randn(50, 400, 2, 3, generator=torch.Generator().manual_seed(0))
    drawn = drawn * torch.tensor([0.1, 0.1, 1.0]) + torch.randn(50, 1, 1, 1) * 10
    assert spread(drawn, [2]) == pytest.approx(0.1, rel=0.02)
    assert spread(drawn) == pytest.approx((1.02 / 3) ** 0.5, rel=0.02)


def test_the_section_of_a_saved_policy_is_data(policy: Path, tmp_path: Path):
    """A name in it never imports, not even with trust."""
    description = json.loads((policy / SAMPLER).read_text())
    description.pop("crc32")
    description["chain"]["warm"] = {"name": "tests.marked:Marked", "levels": [0]}
    mine = tmp_path / "mine"
    mine.mkdir()
    for file in policy.iterdir():
        (mine / file.name).write_bytes(file.read_bytes())
    (mine / SAMPLER).write_text(json.dumps(description))
    for trust in (False, True):
        with pytest.raises(ValueError, match="valid are rti, sdedit"):
            saved(mine, trust=trust).load()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sampler", "warm={name: rti}"], "needs the key 'levels'"),
        (["--sampler", "best_of=4", "warm={name: rti, levels: [0]}"], "best_of is 4"),
        (["--samplers", "warm={name: rti, levels: [9, 0]}"], "must fall from at most 3"),
        (["--samplers", "execute=9"], "the policy says 2 actions at a time"),
        (["--deploy", "."], "is there already"),
    ],
)
def test_what_does_not_fit_is_one_sentence(policy: Path, tmp_path: Path, capsys, arguments, said):
    asked = ["evaluate", str(policy), *TASK, "--out", str(tmp_path / "out"), *arguments]
    assert said in complaint(capsys, tmp_path / "out", *asked)


def test_rti_refuses_a_flow_in_one_sentence(tmp_path: Path, capsys):
    folder = cloned(tmp_path, family="flow")
    asked = ["evaluate", folder, *TASK, "--out", str(tmp_path / "out")]
    assert "use sdedit on this policy" in complaint(
        capsys, tmp_path / "out", *asked, "--samplers", "rti"
    )
    found = evaluated(Path(folder), tmp_path / "b", "--samplers", "sdedit")
    assert 1 <= found["samplers"][0]["sampler"]["warm"]["steps"] <= 4

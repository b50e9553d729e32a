"""`genpolicy evaluate EXPORT` plays the exported graphs, through the runtime, in our environments."""

import json
import sys

import numpy as np
import pytest
import torch

from genpolicy.chain import Noise
from genpolicy.cli import evaluate_exported
from genpolicy.cli.evaluate_exported import Exported, runtime
from genpolicy.cli.main import main
from genpolicy.config import shipped
from genpolicy.config.errors import ConfigError
from genpolicy.contracts.task import Context
from tests.tiny_export import STATE, STATEFUL, edit, model, node, value, with_state, written
from tests.toy_control import GOAL

SEED = 7


def noise(episodes: list[int], decisions: list[int]) -> Noise:
    names = torch.tensor(episodes)
    return Noise(SEED, 0, names, torch.zeros_like(names), torch.tensor(decisions))


def context(*rows: list[list[float]]) -> Context:
    return Context([""] * len(rows), {STATE: torch.tensor(rows)})


def test_each_episode_is_what_the_runtime_plays_alone(tmp_path):
    """Frames between decisions, noise and the plan before stay with their episode."""
    library = runtime()
    policy = Exported(library.Policy.load(written(tmp_path, with_state(), state=STATEFUL)))
    one, two, three = [[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]], [[9.0, 8.0], [7.0, 6.0]]
    first = policy.sample(context(one, two), noise([4, 9], [0, 0])).x0.numpy()
    second = policy.sample(context(three, three), noise([9, 4], [1, 0])).x0.numpy()

    def alone(episode, frames):
        acting = library.Policy.load(tmp_path)
        acting.reset(SEED + episode)
        acting.observe({STATE: np.array(frames[0], np.float32)})
        return acting.plan({STATE: np.array(frames[1], np.float32)})

    assert np.array_equal(first[0], alone(4, one))
    assert np.array_equal(first[1], alone(9, two))
    assert np.array_equal(second[0], first[1] + 1)  # episode 9 goes on from its own plan
    assert np.array_equal(second[1], alone(4, three))  # episode 4 has begun again
    # the control: another episode's noise is another
    assert not np.array_equal(first[0], alone(5, one))


def walker(folder, gain: float) -> str:
    """An exported policy that walks to the toy's goal (``gain`` > 0), or away from it."""
    graph = model(
        [
            node("Sub", f"{GOAL} {STATE}", "way"),
            node("Mul", "way gain", "actions"),
        ],
        [value(STATE, 1, 1, 2), value(GOAL, 1, 1, 2)],
        [value("actions", 1, 1, 2)],
        gain=np.float32(gain),
    )
    action = {"dim": 2, "planned": 1, "executed": 1, "low": None, "high": None, "units": "u"}
    seen = {name: {"kind": "vector", "shape": [2]} for name in (STATE, GOAL)}
    noise = {"shape": [0, 1, 2]}
    return str(
        written(folder, {"policy": graph}, observation=seen, history=1, action=action, noise=noise)
    )


@pytest.mark.parametrize(("gain", "rate"), [(2.0, 1.0), (-2.0, 0.0)])
def test_what_the_graph_does_decides_the_score(tmp_path, capsys, gain, rate):
    export = walker(tmp_path / "export", gain)
    asked = ["--task", "tests.toy_control:Point", "--episodes", "6", "--seed", "5"]
    assert main(["evaluate", export, *asked, "--out", str(tmp_path)]) == 0
    said = json.loads((tmp_path / "eval.json").read_text())
    assert said["success_rate"] == rate
    assert said["sampler"] == {"steps": 1}
    assert said["runtime"] == runtime().__version__
    assert said["seeds"] == {"first": 5, "episodes": 6}
    assert "6 episodes through genpolicy-runtime" in capsys.readouterr().out


def test_limits_of_the_task_itself_change_no_score_and_narrower_ones_do(tmp_path):
    """The runtime clips as the task's environments do."""
    scores = {}
    for name, most in (("free", None), ("task", 1), ("narrow", 0.1)):
        export = walker(tmp_path / name, 4.0)
        if most is not None:
            ends = {"low": [-most] * 2, "high": [most] * 2}
            edit(tmp_path / name, lambda found, ends=ends: found["action"].update(ends))
        asked = ["--task", "tests.toy_control:Point", "--episodes", "6", "--seed", "5"]
        assert main(["evaluate", export, *asked, "--out", str(tmp_path / name)]) == 0
        scores[name] = json.loads((tmp_path / name / "eval.json").read_text())["return"]
    assert scores["task"] == scores["free"]
    assert scores["narrow"] < scores["task"]


def test_an_option_that_belongs_to_the_export_is_refused(tmp_path, capsys):
    folder = str(written(tmp_path))
    for options, sentence in (
        (["--steps", "2"], "whose sampler is in its graph: export it with another one"),
        (["--samplers", "ode"], "whose sampler is in its graph"),
        (["--prompts", "x"], "is an export of a policy that acts: judge it with --task"),
        ([], "is an export, which names no task: name its --task"),
        (["--task", "metaworld", "--gifs", "1"], "an export is measured, and not filmed"),
    ):
        assert main(["evaluate", folder, *options]) == 2
        said = capsys.readouterr().err
        assert sentence in said
        assert said.count("\n") == 1
    edit(tmp_path, lambda found: found.update(version=2))
    task = ["--task", "metaworld", "--task.env=reach-v3"]
    assert main(["evaluate", folder, *task]) == 2
    assert "has version 2, and this genpolicy-runtime reads up to 1" in capsys.readouterr().err


def test_without_onnxruntime_there_is_one_sentence(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("genpolicy_runtime")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"can't be imported .*: pip install genpolicy\[deploy\]"):
        evaluate_exported.runtime()


def test_code_of_the_current_folder_is_never_taken_for_ours(tmp_path, monkeypatch):
    fake = tmp_path / "robots" / "genpolicy_runtime" / "src"
    fake.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = shipped.code(evaluate_exported.SOURCE)
    assert found is not None
    assert found != fake.resolve()
    assert (found / "genpolicy_runtime" / "policy.py").is_file()


@pytest.mark.slow
def test_a_real_export_scores_as_the_policy_that_it_came_from(tmp_path):
    """assets/assembly-clone, the same 20 starts; its sampler's mean depends little on noise."""
    export = str(tmp_path / "export")
    assert main(["export", "assets/assembly-clone", "--out", export]) == 0
    task = ["--task", "metaworld", "--task.env=assembly-v3", "--task.limit=150"]
    rates = {}
    for policy in ("assets/assembly-clone", export):
        out = tmp_path / policy.replace("/", "-")
        more = ["--gifs", "0"] if policy != export else []
        asked = ["--episodes", "20", "--seed", "3000000", "--out", str(out), *more]
        assert main(["evaluate", policy, *task, *asked]) == 0
        rates[policy] = json.loads((out / "eval.json").read_text())
    before, after = rates["assets/assembly-clone"], rates[export]
    assert after["runtime"] == runtime().__version__
    assert after["sampler"] == before["sampler"]
    assert after["nfe_per_decision"] == before["nfe_per_decision"] == 10
    assert abs(after["success_rate"] - before["success_rate"]) <= 0.25

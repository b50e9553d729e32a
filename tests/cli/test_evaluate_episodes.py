"""`evaluate`, `demonstrate` and `compare` through the door, on the toy of control."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from genpolicy.chain import DDIM, FloorStd, Mean
from genpolicy.cli import compare
from genpolicy.cli.main import main
from genpolicy.config import errors, parse
from genpolicy.config.errors import RenderError
from genpolicy.config.seal import unsealed
from genpolicy.evaluation import comparison
from genpolicy.evaluation.episode_scores import evaluate_control
from genpolicy.evaluation.samplers import variants
from genpolicy.evaluation.statistics import interval
from genpolicy.policy.files import saved
from genpolicy.training.experiment import train
from tests import lerobot_tiny as lerobot
from tests.cli.test_bad_inputs import complaint
from tests.toy_control import Point, Walk, cloned, experiment

torch.set_num_threads(1)
EPISODES = 10
FEW = ["--episodes", str(EPISODES), "--gifs", "0"]
METHOD = {"name": "dppo", "episodes": 10, "critic_epochs": 1, "epochs": 1, "warm_up": 0}


@pytest.fixture(autouse=True)
def _few_decisions_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genpolicy.cli.evaluate_episodes.DECISIONS", 5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two iterations of PPO on a clone."""
    folder = tmp_path_factory.mktemp("control")
    sections: dict[str, Any] = {"method": METHOD, "data": None, "budget": {"iterations": 2}}
    policy = {"name": "mlp", "pretrained": cloned(folder)}
    raw = experiment(folder, policy=policy, eval={"every": 1, "episodes": 20}, **sections)
    return train(parse.parse(raw)).folder


def evaluated(out: Path, *arguments: str) -> dict[str, Any]:
    assert main(["evaluate", "--trust", *arguments, "--out", str(out)]) == 0
    return json.loads((out / "eval.json").read_text())


# -- eval.json -------------------------------------------------------------------------------------


def test_evaluate_a_run_repeats_its_last_evaluation(run: Path, capsys):
    assert main(["evaluate", "--trust", str(run), "--gifs", "0"]) == 0
    found = json.loads((run / "eval.json").read_text())
    after = json.loads((run / "summary.json").read_text())["after"]
    for name in ("success_rate", "return", "length"):
        assert found[name] == pytest.approx(after[name], abs=1e-6)
    for name in ("success_rate", "return"):
        assert found["ci95"][name] == pytest.approx(after[f"ci95/{name}"], abs=1e-6)
    assert found["seeds"] == {"first": 1_000_003, "episodes": 20}
    assert found["n"] == 20
    assert found["sampler"]["kernel"]["name"] == "mean"
    assert found["nfe_per_decision"] == found["sampler"]["steps"] == 4
    assert (
        0 < found["latency_ms"]["p50"] <= found["latency_ms"]["p95"] <= found["latency_ms"]["p99"]
    )
    assert found["env_steps_per_s"] > 0
    assert found["task"] == {"name": "tests.toy_control:Point"}
    assert "samplers" not in found
    assert f"{found['success_rate']:.3f}" in capsys.readouterr().out


def test_as_asked(run: Path, tmp_path: Path):
    asked = [
        "--episodes",
        "7",
        "--seed",
        "5",
        "--environments",
        "3",
        "--steps",
        "2",
        "--task.limit=3",
        "--gifs",
        "0",
    ]
    found = evaluated(tmp_path, str(run / "policy_best"), *asked)
    assert (found["n"], found["seeds"]) == (7, {"first": 5, "episodes": 7})
    assert found["nfe_per_decision"] == found["sampler"]["steps"] == 2
    assert found["length"] <= 3
    assert found["task"]["limit"] == 3
    task = Point(limit=3)
    policy = saved(run / "policy_best", steps=2).load()
    again = evaluate_control(policy, task.environments(3, 1), episodes=7, seed=5)
    assert found["return"] == pytest.approx(float(again.returns.mean()), abs=1e-6)
    assert found["ci95"]["success_rate"] == pytest.approx(interval(again.success))


def test_a_policy_of_no_run_needs_a_task(run: Path, tmp_path: Path, capsys):
    moved = tmp_path / "moved"
    (run / "policy").rename(moved)
    try:
        said = complaint(
            capsys,
            tmp_path / "out",
            "evaluate",
            "--trust",
            str(moved),
            "--out",
            str(tmp_path / "out"),
        )
        assert "comes from no run of ours: name its --task" in said
        (tmp_path / "mine.yaml").write_text(
            yaml.safe_dump({"task": {"name": "tests.toy_control:Point", "limit": 4}})
        )
        by_name = evaluated(
            tmp_path / "a",
            str(moved),
            "--task",
            "tests.toy_control:Point",
            "--task.limit=4",
            "--seed",
            "9",
            *FEW,
        )
        by_file = evaluated(
            tmp_path / "b", str(moved), "--task", str(tmp_path / "mine.yaml"), "--seed", "9", *FEW
        )
        assert by_name["return"] == by_file["return"]
        assert by_name["length"] <= 4
    finally:
        moved.rename(run / "policy")


def test_a_task_without_a_verdict_has_returns_only(run: Path, tmp_path: Path, capsys):
    found = evaluated(tmp_path, str(run), "--task.judged=false", *FEW)
    assert "success_rate" not in found
    assert list(found["ci95"]) == ["return"]
    assert "return, 95 %" in capsys.readouterr().out


# -- samplers --------------------------------------------------------------------------------------


def test_samplers_meet_the_same_episodes(run: Path, tmp_path: Path, capsys):
    names = ["deployed", "ode", "mean", "stochastic", "last_mean", "steps=2", "ode"]
    found = evaluated(tmp_path, str(run), *FEW, "--samplers", *names)
    others = {entry["name"]: entry for entry in found["samplers"]}
    assert list(others) == ["ode", "mean", "stochastic", "last_mean", "steps=2"]
    assert others["mean"]["return"] == pytest.approx(found["return"]), "deployed is the mean"
    assert others["mean"]["difference"]["return"] == {"mean": 0.0, "ci95": [0.0, 0.0]}
    assert others["ode"]["return"] != pytest.approx(found["return"]), (
        "the negative control: another process"
    )
    assert [others[n]["nfe_per_decision"] for n in ("ode", "steps=2")] == [4, 2]
    difference = others["ode"]["difference"]["return"]
    assert difference["mean"] == pytest.approx(others["ode"]["return"] - found["return"], abs=1e-6)
    assert difference["ci95"][0] < difference["mean"] < difference["ci95"][1]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:7]] == ["sampler", "deployed", *others]


def test_what_the_presets_are(run: Path):
    asked = {
        v.name: v.sampler
        for v in variants(["ode", "mean", "stochastic", "last_mean", "steps=2"], saved(run))
    }
    floor = {"name": "floorstd", "kernel": {"name": "ddim", "eta": 1.0}, "floor": 0.1}
    assert asked["stochastic"].kernel == floor
    assert asked["deployed"].kernel == asked["mean"].kernel == {"name": "mean", "kernel": floor}
    assert asked["ode"].kernel == {"name": "ddim", "eta": 0.0}
    assert asked["steps=2"].steps == 2
    policy = saved(run).load()
    made = {
        v.name: v.of(policy).chain for v in variants(["stochastic", "last_mean", "ode"], saved(run))
    }
    assert made["stochastic"].kernel == FloorStd(DDIM(1.0), 0.1)
    assert made["deployed"].kernel == Mean(FloorStd(DDIM(1.0), 0.1))
    assert made["ode"].kernel == DDIM(0.0)


def test_a_window_over_the_whole_chain_stays_whole(tmp_path: Path, run: Path):
    """...and what is not trained on the last step is not noisy there under last_mean either."""
    folder = tmp_path / "run"
    (folder / "policy").mkdir(parents=True)
    raw = yaml.safe_load((run / "config.yaml").read_text())
    raw["chain"]["window"] = [0, 4]
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    for file in (run / "policy").iterdir():
        (folder / "policy" / file.name).write_bytes(file.read_bytes())
    description = unsealed((folder / "policy" / "genpolicy.json").read_text())
    description["chain"]["window"] = [0, 4]
    (folder / "policy" / "genpolicy.json").write_text(json.dumps(description))
    whole = {
        v.name: v.sampler
        for v in variants(["mean", "stochastic", "last_mean", "ode"], saved(folder, steps=6))
    }
    windows = {name: sampler.window and tuple(sampler.window) for name, sampler in whole.items()}
    assert windows == {
        "deployed": (0, 6),
        "mean": (0, 6),
        "stochastic": (0, 6),
        "last_mean": (0, 5),
        "ode": (0, 0),
    }


def test_a_moved_policy_knows_its_kernel_from_its_mean(run: Path, tmp_path: Path):
    moved = tmp_path / "moved"
    (run / "policy").rename(moved)
    try:
        alone = {v.name: v.sampler.kernel for v in variants(["stochastic"], saved(moved))}
        assert alone["stochastic"]["name"] == "floorstd"
        with pytest.raises(errors.ConfigError, match="the kernel that the policy was trained with"):
            variants(["stochastic"], saved(moved, kernel={"name": "ddim", "eta": 0.0}))
    finally:
        moved.rename(run / "policy")


# -- LeRobot's policies ----------------------------------------------------------------------------


@pytest.mark.parametrize(("scheduler", "eta"), [("DDIM", 0.0), ("DDPM", 1.0)])
def test_a_lerobot_folder_acts_with_its_own_sampler(tmp_path: Path, scheduler: str, eta: float):
    settings = {"noise_scheduler_type": scheduler, "num_inference_steps": 5}
    folder = lerobot.saved(lerobot.diffusion(lerobot.STATE, lerobot.WORLD, **settings), tmp_path)
    found = saved(folder)
    assert found.acts
    assert found.policy == {
        "name": "lerobot_diffusion",
        "pretrained": str(folder),
        "spacing": "lerobot",
    }
    assert (found.sampler.steps, found.sampler.kernel) == (5, {"name": "ddim", "eta": eta})
    policy = found.load()
    deployed, native = (v.of(policy).chain for v in variants(["native"], found))
    assert torch.equal(deployed.grid, native.grid)
    policy.model.spacing = "trailing"  # the negative control: our own grid is another one
    _, ours, native = (v.of(policy).chain for v in variants(["steps=5", "native"], found))
    assert torch.equal(deployed.grid, native.grid)
    assert not torch.equal(ours.grid, native.grid)


@pytest.mark.parametrize(
    ("settings", "leaf", "steps"),
    [
        ({"type": "smolvla", "num_steps": 7}, "lerobot_flow", 7),
        ({"type": "pi0", "num_inference_steps": 3}, "lerobot_flow", 3),
        ({"type": "pi05"}, "lerobot_flow", 10),
        (
            {"type": "diffusion", "num_train_timesteps": 50, "num_inference_steps": None},
            "lerobot_diffusion",
            50,
        ),
        ({"model_type": "clip"}, "diffusers_pipeline", 10),
    ],
)
def test_whose_policy_a_folder_is(tmp_path: Path, settings: dict, leaf: str, steps: int):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    found = saved(tmp_path)
    assert (found.policy["name"], found.sampler.steps) == (leaf, steps)
    (tmp_path / "model_index.json").write_text("{}")
    assert saved(tmp_path).policy["name"] == "diffusers_pipeline"


# -- GIFs ------------------------------------------------------------------------------------------


def test_gifs_of_successes_and_failures(run: Path, tmp_path: Path, capsys):
    found = evaluated(tmp_path, str(run), "--episodes", "20", "--gifs", "3")
    names = [path.stem.split("-") for path in sorted((tmp_path / "episodes").glob("*.gif"))]
    assert 0.15 <= found["success_rate"] <= 0.85, "the toy should have both"
    assert [kind for kind, _ in names] == ["failure"] * 3 + ["success"] * 3
    assert all(1_000_003 <= int(seed) < 1_000_023 for _, seed in names)
    assert f"6 GIFs in {tmp_path / 'episodes'}" in capsys.readouterr().out


def test_gifs_where_nobody_judges(run: Path, tmp_path: Path):
    evaluated(tmp_path, str(run), "--episodes", "5", "--gifs", "2", "--task.judged=false")
    assert {path.stem for path in (tmp_path / "episodes").iterdir()} == {
        "episode-1000003",
        "episode-1000004",
    }


def test_no_camera_no_gifs(run: Path, tmp_path: Path, capsys, monkeypatch):
    def dark(_: Walk):
        raise RenderError("there is no light here")

    monkeypatch.setattr(Walk, "render", dark)
    assert evaluated(tmp_path, str(run), "--episodes", "4", "--gifs", "1")["n"] == 4
    assert capsys.readouterr().err.splitlines()[-1] == "no GIFs: there is no light here"
    assert not (tmp_path / "episodes").exists()


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompts", "x.txt"], "--prompts does not apply"),
        (["--guidance", "2"], "--guidance does not apply"),
        (["--sampler", "guidance=2"], "guidance is for prompts"),
        (["--episodes", "0"], "--episodes is 0; it must be at least 1"),
        (["--environments", "0"], "--environments is 0"),
        (["--gifs", "-1"], "--gifs is -1; it must be at least 0"),
        (["--samplers", "odd"], "a sampler is 'odd'; did you mean ode"),
        (["--samplers", "native"], "no LeRobot policy"),
        (["--samplers", "step=3"], "no key 'step'; did you mean steps"),
        (["--task", "metawrld"], "there is no task 'metawrld'; did you mean metaworld"),
        (["--task", "nowhere.yaml"], "nowhere.yaml"),
        (["--task", "prompts", "--task.prompts=README.md"], "task prompts has no environments"),
        (
            ["--task", "tests.datasets.cart:Cart"],
            "needs observation.environment_state of shape (2,); the task has",
        ),
        (["--task.lmit=3"], "no key 'lmit'; did you mean limit"),
        (["--tusk.limit=3"], "evaluate does not take '--tusk.limit=3'"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    run: Path, tmp_path: Path, capsys, arguments: list[str], said: str
):
    out = tmp_path / "out"
    assert said in complaint(
        capsys, out, "evaluate", "--trust", str(run), "--out", str(out), *arguments
    )


def test_a_lerobot_policy_that_does_not_denoise(tmp_path: Path, capsys):
    (tmp_path / "config.json").write_text('{"type": "act"}')
    said = complaint(
        capsys, tmp_path / "out", "evaluate", "--trust", str(tmp_path), "--task", "metaworld"
    )
    assert (
        "of type act; those that denoise, and can be loaded, are diffusion, smolvla, pi0, pi05"
        in said
    )


def test_select_what_the_task_does_not_measure(tmp_path: Path, capsys):
    raw = experiment(tmp_path, task={"name": "tests.toy_control:Point", "judged": False})
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(raw))
    arguments = ["train", str(tmp_path / "experiment.yaml"), "--eval.select=success_rate"]
    said = complaint(capsys, tmp_path / "run", *arguments)
    assert "eval: select is 'success_rate'; valid are return" in said


def test_a_policy_that_acts_does_not_draw(run: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    said = complaint(
        capsys, out, "sample", "--trust", str(run), "--prompts", "x", "--out", str(out)
    )
    assert "acts, it does not draw: genpolicy evaluate plays and films it" in said


# -- train, demonstrate ----------------------------------------------------------------------------


def test_plan_of_an_experiment_in_environments(tmp_path: Path, run: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    policy = {"name": "mlp", "pretrained": str(run / "policy")}
    raw = experiment(tmp_path, policy=policy, method=METHOD, data=None, budget={"env_steps": 500})
    (tmp_path / "rl.yaml").write_text(yaml.safe_dump(raw))
    assert main(["train", str(tmp_path / "rl.yaml"), "--plan"]) == 0
    text = capsys.readouterr().out
    assert " decisions in " in text
    assert "environment steps, " in text
    assert "one evaluation: 20 episodes, about " in text
    (tmp_path / "bc.yaml").write_text(yaml.safe_dump(experiment(tmp_path)))
    assert main(["train", str(tmp_path / "bc.yaml"), "--plan"]) == 0
    assert (
        "one real iteration: 640 recorded frames, 2.0 network evaluations each"
        in capsys.readouterr().out
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bc.yaml", "rl.yaml"]


def test_train_says_what_became_of_success(tmp_path: Path, run: Path, capsys):
    assert main(["train", str(run / "config.yaml")]) == 0
    assert "success_rate 0." in capsys.readouterr().out


def test_demonstrate_where_a_yaml_says(tmp_path: Path, run: Path, capsys):
    data = {"name": "lerobot_dataset", "root": str(tmp_path / "set")}
    (tmp_path / "bc.yaml").write_text(yaml.safe_dump(experiment(tmp_path, data=data)))
    assert (
        main(["demonstrate", str(tmp_path / "bc.yaml"), "--episodes", "3", "--task.limit=20"]) == 0
    )
    assert "3 episodes of 3 tried, 3 of them successful" in capsys.readouterr().out
    made = json.loads((tmp_path / "set" / "meta" / "genpolicy.json").read_text())
    assert (made["noise"], made["seed"], made["task"]["limit"]) == (0.1, 10_000, 20)
    by = ["--by", str(run), "--out", str(tmp_path / "own"), "--episodes", "2"]
    assert main(["demonstrate", "tests.toy_control:Point", *by]) == 0
    made = json.loads((tmp_path / "own" / "meta" / "genpolicy.json").read_text())
    assert (made["noise"], made["policy"]) == (0.0, str(run))
    capsys.readouterr()
    said = complaint(capsys, tmp_path / "set", "demonstrate", "tests.toy_control:Point")
    assert "does not say where its data set is: give --out DIR" in said


# -- compare ---------------------------------------------------------------------------------------

SMALL = {"episodes": 6, "critic_epochs": 1, "epochs": 1, "warm_up": 0}
ARMS = {"first": {"name": "dppo", **SMALL}, "second": {"name": "dppo", "clip": 0.05, **SMALL}}


def arms(folder: Path, start: Path, **second: Any) -> list[str]:
    """The YAMLs of two arms."""
    sections = {
        "policy": {"name": "mlp", "pretrained": str(start)},
        "data": None,
        "budget": {"env_steps": 100},
    }
    for name, method in ARMS.items():
        raw = experiment(
            folder, method=method, **{**sections, **(second if name == "second" else {})}
        )
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(raw))
    return [str(folder / f"{name}.yaml") for name in ARMS]


def test_compare_in_environments(run: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    assert (
        main(["compare", *arms(tmp_path, run / "policy"), "--seeds", "0-1", "--out", str(out)]) == 0
    )
    table = json.loads((out / "compare.json").read_text())
    assert table["metrics"] == ["success_rate", "return", "length"]
    runs = {(r["arm"], r["seed"]): r["metrics"]["success_rate"] for r in table["runs"]}
    entries = {arm: table["arms"][arm]["metrics"]["success_rate"] for arm in ARMS}
    for arm, entry in entries.items():
        assert entry["values"] == [runs[arm, seed]["value"] for seed in (0, 1)]
        assert entry["before"] == entries["first"]["before"], (
            "same start, same episodes, same deployed sampler"
        )
        assert table["arms"][arm]["env_steps"]["mean"] >= 100
    pairs = [runs["second", seed]["value"] - runs["first", seed]["value"] for seed in (0, 1)]
    difference = table["arms"]["second"]["difference"]["success_rate"]
    assert difference["mean"] == pytest.approx(sum(pairs) / 2)
    low, high = runs["first", 0]["ci95"]
    assert low <= runs["first", 0]["value"] <= high
    text = capsys.readouterr().out
    assert "| eval/success_rate after |" in text
    assert "| environment steps |" in text
    assert (out / "compare.png").is_file()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"budget": {"env_steps": 200}}, "budget differs in env_steps"),
        ({"task": {"name": "tests.toy_control:Point", "limit": 5}}, "task differs in limit"),
        ({"eval": {"every": 0, "episodes": 9}}, "evaluation set differs in episodes (20 and 9)"),
        ({"chain": {"steps": 5}}, "evaluated sampler differs in steps (4 and 5)"),
        ({"policy": {"name": "mlp", "pretrained": None}}, "start (the policy section) differs"),
    ],
)
def test_arms_in_environments_that_can_not_be_compared(
    run: Path, tmp_path: Path, capsys, change: dict[str, Any], said: str
):
    out = tmp_path / "out"
    paths = arms(tmp_path, run / "policy", **change)
    assert said in complaint(capsys, out, "compare", *paths, "--out", str(out))


def test_kernels_of_arms_in_environments_may_differ(run: Path, tmp_path: Path):
    """Each is deployed with the mean of its own;
    on pictures the deployed samplers must be equal.
    """
    kernel = {"name": "ddim", "eta": 1.0}
    paths = arms(tmp_path, run / "policy", chain={"steps": 4, "kernel": kernel, "window": [0, 3]})
    compare._require_comparable([comparison.Arm(path, parse.load(path)) for path in paths])

"""The verbs, through the door, on the toy."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from genpolicy.cli import compare
from genpolicy.cli.main import main
from genpolicy.cli.options import command_line
from genpolicy.config.errors import ConfigError
from genpolicy.config.leaves import make, names
from genpolicy.config.origin import PERSON
from genpolicy.evaluation import comparison, metrics_file
from genpolicy.evaluation.prompt_scores import EVALUATION, draw, evaluate, measure
from genpolicy.policy.files import saved
from genpolicy.rollout.micro_batch import MicroBatches
from genpolicy.training.build import make_rewards
from genpolicy.training.prepare import required
from tests.toy import PROMPTS, experiment

torch.set_num_threads(1)
VERBS = (
    *("quickstart", "train", "evaluate", "demonstrate", "compare", "sample", "pairs", "export"),
    "list",
    "check",
)


def write(folder: Path, name: str = "experiment", **sections) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(experiment(folder, **sections)))
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three iterations."""
    folder = tmp_path_factory.mktemp("toy")
    path = write(folder, budget={"iterations": 3}, optimizer={"lr": 1e-2})
    assert main(["train", path]) == 0
    return folder / "run"


# -- help and list ---------------------------------------------------------------------------------


def test_help_names_every_verb(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS)
    for verb in VERBS:
        assert main([verb, "--help"]) == 0
        assert f"genpolicy {verb}" in capsys.readouterr().out


def test_help_and_list_import_nothing_heavy():
    """Not even torch, but for the kernels, which are objects of genpolicy.chain."""
    code = """
import sys
from genpolicy.cli.main import main
assert main(["--help"]) == main(["train", "--help"]) == 0
kinds = ("methods", "models", "rewards", "tasks", "datasets", "formats", "configs")
assert [main(["list", kind]) for kind in kinds] == [0] * 7
heavy = {"torch", "numpy", "diffusers", "transformers", "lerobot", "gymnasium", "matplotlib", "PIL"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("kind", "name", "text"),
    [
        ("methods", "grpo_guard", "GRPO-Guard (arXiv 2510.22319)"),
        ("models", "diffusers_pipeline", "Any diffusers pipeline"),
        ("rewards", "shapes_strict", "Strict score"),
        ("tasks", "prompts", "Prompts as a task"),
        ("tasks", "metaworld", "MetaWorld v3 from its state"),
        ("datasets", "lerobot_dataset", "A LeRobotDataset"),
        ("datasets", "picture_pairs", "Pairs of pictures"),
        ("formats", "onnx", "One ONNX graph"),
        ("kernels", "sde", "The reverse SDE"),
        ("configs", "quickstart", "A small Stable Diffusion 3"),
    ],
)
def test_list(capsys, kind: str, name: str, text: str):
    assert main(["list", kind]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows[name].startswith(text)
    assert not any(row.startswith("_") for row in rows)


@pytest.mark.parametrize(
    "kind",
    ["methods", "models", "rewards", "tasks", "datasets", "formats", "kernels", "configs"],
)
def test_no_line_of_a_list_stops_in_the_middle_of_a_sentence(capsys, kind: str):
    assert main(["list", kind]) == 0
    for line in capsys.readouterr().out.splitlines():
        assert line.endswith((".", "?")), line


def test_version_and_interruption(capsys, monkeypatch):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("genpolicy 0.")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("genpolicy.cli.check.run", interrupt)
    assert main(["check", "tests.toy"]) == 130
    assert capsys.readouterr().err == "genpolicy: interrupted\n"


# -- train -----------------------------------------------------------------------------------------


def test_train_leaves_the_folder_of_the_design(run: Path):
    names = {path.relative_to(run).as_posix() for path in run.rglob("*")}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "checkpoints/3/state.pt",
        "policy/toy.safetensors",
        "policy/genpolicy.json",
        "policy_best/genpolicy.json",
        "figures/curves.png",
        "samples/0/grid.png",
        "samples/2/group.png",
        "samples/3/grid.png",
    } <= names
    assert not [name for name in names if "staged" in name or ".old" in name]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1, 2, 2, 3, 3]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["iterations"] == summary["asked"]["iterations"] == 3


def test_a_finished_run_stays_as_it_is(run: Path, capsys):
    before = (run / "metrics.jsonl").read_bytes(), (run / "policy" / "toy.safetensors").read_bytes()
    assert main(["train", str(run / "config.yaml")]) == 0
    assert (
        (run / "metrics.jsonl").read_bytes(),
        (run / "policy" / "toy.safetensors").read_bytes(),
    ) == before
    assert "brightness" in capsys.readouterr().out


def test_overrides_reach_the_run(tmp_path: Path):
    path = write(tmp_path)
    out = f"--output={tmp_path / 'other'}"
    assert (
        main(["train", path, "--budget.iterations=1", "--optimizer.lr=1e-5", "--eval.every=0", out])
        == 0
    )
    resolved = yaml.safe_load((tmp_path / "other" / "config.yaml").read_text())
    assert resolved["budget"]["iterations"] == 1
    assert float(resolved["optimizer"]["lr"]) == 1e-5
    assert not (tmp_path / "run").exists()


def test_plan_measures_and_leaves_nothing(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, chain={"steps": 4, "window": [0, 2]}, eval={"every": 1, "samples": 16})
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", path, "--plan"]) == 0
    text = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert yaml.safe_load(text.partition("\n\n")[0])["chain"]["window"] == [0, 2]
    assert (
        "16 samples, 8.0 network evaluations each" in text
    )  # 4 to sample, 2 to score with gradients
    assert all(phase in text for phase in ("sample", "decode", "reward", "replay check", "update"))
    assert "the whole budget: 4 iterations, 512 network evaluations" in text


# -- evaluate and sample ---------------------------------------------------------------------------


def test_evaluate_a_run_repeats_its_last_evaluation(run: Path, capsys):
    assert main(["evaluate", "--trust", str(run)]) == 0
    found = json.loads((run / "eval.json").read_text())
    after = json.loads((run / "summary.json").read_text())["after"]
    for name in ("brightness", "brightness_strict", "total"):
        assert found[f"reward/{name}"] == pytest.approx(after[f"reward/{name}"], abs=1e-6)
        assert found["ci95"][name] == pytest.approx(after[f"ci95/{name}"], abs=1e-6)
    assert found["n"] == 16
    assert found["seeds"] == {"eval": 1_000_003}
    assert found["sampler"]["kernel"] == {"name": "ddim", "eta": 0.0}
    assert found["sampler"]["steps"] == found["nfe_per_sample"] == 4
    assert (
        0 < found["latency_ms"]["p50"] <= found["latency_ms"]["p95"] <= found["latency_ms"]["p99"]
    )
    assert "brightness" in capsys.readouterr().out


def test_evaluate_as_asked(run: Path, tmp_path: Path):
    (tmp_path / "mine.txt").write_text("bright\n")
    asked = [
        "--prompts",
        str(tmp_path / "mine.txt"),
        "--samples",
        "10",
        "--seed",
        "5",
        "--reward",
        "tests.toy:constant",
    ]
    sampler = ["--steps", "6", "--guidance", "2", "--sampler", "kernel.name=heun"]
    assert (
        main(
            [
                "evaluate",
                "--trust",
                str(run / "policy_best"),
                *asked,
                *sampler,
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    found = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert found["reward/constant"] == 1.0
    assert "reward/brightness" not in found
    assert (found["n"], found["seeds"]) == (10, {"eval": 5})
    assert found["sampler"]["kernel"] == {"name": "heun"}
    assert found["nfe_per_sample"] == 2 * (
        2 * 6 - 1
    )  # Heun: two a step but for the last; guidance: twice
    assert found["policy"].endswith("policy_best")


def test_evaluation_is_that_of_any_batch(run: Path):
    policy, rewards = (
        saved(run, trust=True).load(),
        make_rewards({"tests.toy:brightness": 1.0}, PERSON),
    )
    results = [
        evaluate(
            policy,
            rewards,
            prompts=PROMPTS,
            samples=10,
            seed=3,
            micro_batches=MicroBatches(size, print),
        ).parts["total"]
        for size in (10, 3)
    ]
    assert torch.allclose(*results, atol=1e-6)


def test_measure_halves_the_batch_when_memory_runs_out(run: Path, monkeypatch):
    policy, rewards = (
        saved(run, trust=True).load(),
        make_rewards({"tests.toy:brightness": 1.0}, PERSON),
    )
    whole, _ = measure(policy, rewards, prompts=PROMPTS, samples=64, seed=3)
    decode = policy.model.decode

    def small(x0):
        if len(x0) > 16:
            raise torch.OutOfMemoryError("a card of 16 rows")
        return decode(x0)

    monkeypatch.setattr(policy.model, "decode", small)
    halved, per_sample = measure(policy, rewards, prompts=PROMPTS, samples=64, seed=3)
    assert torch.allclose(whole.parts["total"], halved.parts["total"], atol=1e-6)
    assert per_sample == 4


def test_sample_draws_what_evaluation_draws(run: Path, tmp_path: Path):
    """One naming of noise: sample m of prompt p is evaluation's row of the same seed."""
    policy = saved(run, trust=True).load()
    rewards = make_rewards({"tests.toy:brightness": 1.0}, PERSON)
    seen = evaluate(policy, rewards, prompts=PROMPTS, samples=8, seed=9).outputs  # prompt i mod 4
    drawn = draw(policy, PROMPTS, 2, 9).view(4, 2, 3, 8, 8).transpose(0, 1).flatten(0, 1)
    assert EVALUATION < 0, "training's iterations must not draw the same"
    assert torch.allclose(seen, drawn, atol=1e-6)


def test_sample_writes_a_picture_each_and_a_grid(run: Path, tmp_path: Path, capsys):
    (tmp_path / "prompts.txt").write_text("bright\ndark\n")
    asked = ["--prompts", str(tmp_path / "prompts.txt"), "--n", "3", "--seed", "4"]
    for name in ("one", "two"):
        assert main(["sample", "--trust", str(run), *asked, "--out", str(tmp_path / name)]) == 0
    assert "6 samples of 2 prompts" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "one").glob("*.png"))
    assert names == [*(f"{p:03d}_{m:02d}.png" for p in range(2) for m in range(3)), "grid.png"]
    pictures = [
        np.asarray(Image.open(tmp_path / folder / name))
        for folder in ("one", "two")
        for name in names
    ]
    assert all(np.array_equal(a, b) for a, b in zip(pictures[:7], pictures[7:], strict=True)), (
        "not deterministic"
    )
    assert pictures[0].shape == (8, 8, 3)
    assert not np.array_equal(pictures[0], pictures[1])


def test_sample_of_one_text(run: Path, tmp_path: Path):
    assert (
        main(
            [
                "sample",
                "--trust",
                str(run),
                "--prompts",
                "bright picture",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "000_00.png",
        "grid.png",
        "grid.txt",
    }
    assert (tmp_path / "out" / "grid.txt").read_text() == "bright picture\n"


def test_videos_become_gifs_and_mp4s(tmp_path: Path):
    video = {"name": "toy", "frames": 5}
    path = write(tmp_path, policy=video, budget={"iterations": 1}, eval={"every": 0, "samples": 4})
    assert main(["train", path]) == 0
    assert (
        main(
            [
                "sample",
                "--trust",
                str(tmp_path / "run"),
                "--prompts",
                "bright",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    gif = Image.open(tmp_path / "out" / "000_00.gif")
    assert gif.n_frames == 5
    assert {path.name for path in (tmp_path / "out").glob("grid.*")} == {
        "grid.png",
        "grid.txt",
        "grid.gif",
        "grid.mp4",
    }
    assert (tmp_path / "out" / "000_00.mp4").is_file()


def test_a_saved_policy_carries_its_sampler(run: Path, tmp_path: Path):
    moved = tmp_path / "elsewhere"
    (run / "policy").rename(moved)
    try:
        alone = saved(moved, trust=True)
        assert alone.run is None
        assert alone.sampler.kernel == {"name": "ddim", "eta": 0.0}
        assert saved(moved, trust=True, steps=7).load().chain.K == 7
    finally:
        moved.rename(run / "policy")


# -- compare ---------------------------------------------------------------------------------------

ARMS = ("flow_grpo", "grpo_guard")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms, two seeds, three iterations."""
    folder = tmp_path_factory.mktemp("compared")
    paths = []
    for name in ARMS:
        method = {
            "name": name,
            "groups": 4,
            "group": 4,
            "updates": 2,
            "reduce": "sum",
            "clip": 0.05,
        }
        paths.append(write(folder, name, method=method, budget={"iterations": 9}))
    asked = [
        *paths,
        "--seeds",
        "0-1",
        "--out",
        str(folder / "out"),
        "--budget.iterations=3",
        "--optimizer.lr=3e-2",
    ]
    assert main(["compare", *asked]) == 0
    return folder


def test_compare_runs_every_arm_with_every_seed(compared: Path):
    out = compared / "out"
    for arm in ARMS:
        for seed in (0, 1):
            resolved = yaml.safe_load((out / arm / f"seed-{seed}" / "config.yaml").read_text())
            assert (resolved["method"]["name"], resolved["seed"]) == (arm, seed)
            assert resolved["budget"]["iterations"] == 3
    assert min(Image.open(out / "compare.png").size) > 400


def test_compare_writes_the_table(compared: Path):
    table = json.loads((compared / "out" / "compare.json").read_text())
    assert table["seeds"] == [0, 1]
    assert list(table["arms"]) == list(ARMS)
    assert table["metrics"] == [
        "reward/brightness",
        "reward/brightness_strict",
        "reward/total",
        "diversity",
    ]
    runs = {(run["arm"], run["seed"]): run["metrics"] for run in table["runs"]}
    for arm in ARMS:
        entry = table["arms"][arm]["metrics"]["reward/brightness"]
        values = [runs[arm, seed]["reward/brightness"]["value"] for seed in (0, 1)]
        assert entry["values"] == values
        assert entry["mean"] == pytest.approx(np.mean(values))
        assert entry["sd"] == pytest.approx(np.std(values, ddof=1))
        assert entry["before"][0] == entry["before"][1], "same start, same evaluation set"
    difference = table["arms"]["grpo_guard"]["difference"]["reward/brightness"]
    pairs = [
        runs["grpo_guard", s]["reward/brightness"]["value"]
        - runs["flow_grpo", s]["reward/brightness"]["value"]
        for s in (0, 1)
    ]
    assert difference["mean"] == pytest.approx(np.mean(pairs))
    half = 12.7062 * np.std(pairs, ddof=1) / np.sqrt(2)  # Student's t with one degree of freedom
    assert difference["ci95"] == pytest.approx(
        [np.mean(pairs) - half, np.mean(pairs) + half], rel=1e-4
    )
    assert table["arms"]["flow_grpo"]["nfe_per_sample"]["mean"] == 10
    text = (compared / "out" / "compare.md").read_text()
    assert "clipped, advantage > 0" in text
    assert "- grpo_guard, seed 1: brightness " in text


def test_compare_skips_what_is_finished_and_resumes_what_is_not(compared: Path, capsys):
    out = compared / "out"
    kept = out / "flow_grpo" / "seed-0" / "checkpoints" / "3" / "state.pt"
    broken = out / "grpo_guard" / "seed-1"
    stamp, weights = kept.stat().st_mtime_ns, (broken / "policy" / "toy.safetensors").read_bytes()
    summary = metrics_file.read_sealed(broken / "summary.json")
    metrics_file.write_sealed(broken / "summary.json", {**summary, "iterations": 2})
    paths = [str(compared / f"{name}.yaml") for name in ARMS]
    asked = [*paths, "--seeds", "0-1", "--out", str(out), "--optimizer.lr=3e-2"]
    assert main(["compare", *asked, "--budget.iterations=3"]) == 0
    assert kept.stat().st_mtime_ns == stamp
    assert json.loads((broken / "summary.json").read_text())["iterations"] == 3
    assert (broken / "policy" / "toy.safetensors").read_bytes() == weights
    capsys.readouterr()
    assert main(["compare", *asked, "--budget.iterations=4"]) == 2
    assert "they differ in budget.iterations (3 and 4)" in capsys.readouterr().err


def test_compare_of_one_seed_claims_no_interval(compared: Path, capsys):
    paths = [str(compared / f"{name}.yaml") for name in ARMS]
    out = ["--out", str(compared / "out"), "--optimizer.lr=3e-2", "--budget.iterations=3"]
    assert main(["compare", *paths, "--seeds", "0", *out]) == 0
    table = json.loads((compared / "out" / "compare.json").read_text())
    assert table["arms"]["grpo_guard"]["difference"]["reward/brightness"]["ci95"] is None
    assert "±" not in capsys.readouterr().out.partition("|")[2]


def test_compare_leaves_out_totals_that_mean_different_things():
    def fake(arm: str, weight: float) -> comparison.Finished:
        after = {
            "reward/a": 1.0,
            "reward/b": 2.0,
            "reward/total": weight,
            "ci95/a": [0.9, 1.1],
            "diversity": None,
        }
        summary = {
            "before": after,
            "after": after,
            "evaluations": 1,
            "iterations": 1,
            "training_s": 1,
            "wall_time_s": 1,
        }
        return comparison.Finished(
            arm, 0, Path("nowhere"), {"reward": {"a": weight, "b": 1.0}}, summary, []
        )

    assert "reward/total" in comparison.summarise([fake("one", 1.0), fake("two", 1.0)])["metrics"]
    assert (
        "reward/total" not in comparison.summarise([fake("one", 1.0), fake("two", 2.0)])["metrics"]
    )


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0-2", [0, 1, 2]), ("7", [7]), ("0,3,7", [0, 3, 7]), ("1-2,2,9", [1, 2, 9])],
)
def test_seeds(text: str, seeds: list[int]):
    assert compare.seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "2-0", "1-", "-1", "0--2", "1,"])
def test_seeds_that_are_none(text: str):
    with pytest.raises(ConfigError, match="--seeds"):
        compare.seeds(text)


# -- check -----------------------------------------------------------------------------------------

LEAVES = {
    "good.py": "def good(outputs, context):\n    return outputs.flatten(1).mean(1)\n",
    "settled.py": """
from dataclasses import dataclass

@dataclass
class Settled:
    scale: float = 2.0

    def __call__(self, outputs, context):
        return self.scale * outputs.flatten(1).amax(1)
""",
    "batchy.py": """
def batchy(outputs, context):
    return outputs.flatten(1).mean(1) - outputs.mean()
""",
    "noisy.py": """
import torch

def noisy(outputs, context):
    return torch.rand(len(outputs))
""",
    "single.py": "def single(outputs, context):\n    return outputs.mean()\n",
    "greedy.py": "def greedy(outputs, context):\n    return outputs.zero_().flatten(1).mean(1)\n",
    "endless.py": "def endless(outputs, context):\n    return outputs.flatten(1).sum(1) / 0\n",
    "informed.py": "def informed(outputs, context):\n    return outputs.flatten(1).mean(1), {}\n",
    "mute.py": "def mute(outputs, context):\n    pass\n",
    "named.py": "def named(outputs, context):\n    return {'mine': outputs.flatten(1).mean(1)}\n",
    "pulled.py": """
from dataclasses import dataclass
from genpolicy.methods.flow_grpo import FlowGRPO

@dataclass
class Pulled(FlowGRPO):
    def loss(self, step):
        loss, metrics = super().loss(step)
        return loss + step.new.mean.flatten(1).mean(1), metrics
""",
    "descends.py": """
from dataclasses import dataclass
import torch
from genpolicy.training.requirements import Needs

@dataclass
class Descends:
    group: int = 4
    needs = Needs()

    def train(self, run):
        for _ in run.iterations():
            x0 = run.collect(4, self.group).trajectory.x0
            mean = torch.stack([p.square().sum() for p in run.trainable])
            run.descend(lambda part: mean.sum().expand(len(x0[part])), len(x0), "mine")
""",
    "needless.py": """
from dataclasses import dataclass

@dataclass
class Needless:
    def train(self, run):
        pass
""",
    "still.py": """
from dataclasses import dataclass
from genpolicy.training.requirements import Needs

@dataclass
class Still:
    needs = Needs(("prompts",))

    def train(self, run):
        for _ in run.iterations():
            run.collect(2, 2)
""",
    "forgetful.py": """
from dataclasses import dataclass
import torch
from genpolicy.training.requirements import Needs

@dataclass
class Forgetful:
    needs = Needs(("robots",))

    def train(self, run):
        count = torch.zeros(())
        for _ in run.iterations():
            count += 1
            sums = torch.stack([p.sum() for p in run.trainable]).sum()
            run.descend(lambda part: ((-1) ** count * sums).expand(4)[part], 4, "mine")
""",
    "endless_loss.py": """
from dataclasses import dataclass
from genpolicy.training.requirements import Needs

@dataclass
class EndlessLoss:
    needs = Needs(("prompts",))

    def train(self, run):
        for _ in run.iterations():
            run.collect(2, 2)
            run.log("mine", float("inf"))
""",
    "idle.py": """
from dataclasses import dataclass
from genpolicy.training.requirements import Needs

@dataclass
class Idle:
    needs = Needs(("prompts",))

    def train(self, run):
        pass
""",
}


@pytest.fixture
def leaves(tmp_path: Path, monkeypatch) -> Path:
    package = tmp_path / "mypkg_of_test_cli"
    package.mkdir()
    for name, text in LEAVES.items():
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return package


@pytest.mark.parametrize(
    ("leaf", "broken"),
    [
        ("good", None),
        ("settled:Settled", None),
        ("batchy", "a row's reward does not depend on the others"),
        ("noisy", "the same outputs get the same reward"),
        ("single", "one number for every output"),
        ("informed", "one number for every output: reward mypkg_of_test_cli.informed:informed ret"),
        ("mute", "returned None; it must return one number for each output, a Float[6]"),
        ("named", "returned a dict; it must return one number for each output, a Float[6]"),
        ("greedy", "leaves the outputs as they are"),
        ("endless", "finite"),
        ("pulled:Pulled", "no advantage, no gradient"),
        ("descends:Descends", None),
        ("still:Still", "the weights or parts move"),
        ("forgetful:Forgetful", "a resumed run is the uninterrupted one"),
        ("endless_loss:EndlessLoss", "what it logs is finite"),
        ("idle:Idle", "trains on the toy"),
    ],
)
def test_check_of_leaves_outside(leaves: Path, capsys, leaf: str, broken: str | None):
    assert main(["check", f"mypkg_of_test_cli.{leaf}"]) == (0 if broken is None else 1)
    text = capsys.readouterr().out
    method = ":" in leaf and "Settled" not in leaf
    assert ("is a method" if method else "is a reward") in text
    failed = [line for line in text.splitlines() if "FAIL" in line]
    assert (failed == []) if broken is None else any(broken in line for line in failed)
    assert ("keeps every law" if broken is None else "breaks a law") in text.splitlines()[-1]


@pytest.mark.parametrize(
    ("leaf", "kind"),
    [
        ("models.toy", "model"),
        ("tasks.prompts", "task"),
        ("tasks.metaworld", "task of environments"),
        ("datasets.lerobot_dataset", "data set"),
    ],
)
def test_check_knows_what_a_leaf_is(capsys, leaf: str, kind: str):
    assert main(["check", f"genpolicy.{leaf}"]) == 2
    assert f" is a {kind}; check knows the laws of rewards and methods" in capsys.readouterr().err


@pytest.mark.parametrize("method", names("methods"))
def test_shipped_methods_keep_the_laws(capsys, method: str):
    """Every shipped method keeps the laws in every world that it trains in."""
    needs = required(make("methods", {"name": method}, PERSON))
    assert main(["check", f"genpolicy.methods.{method}"]) == 0
    text = capsys.readouterr().out
    for world in needs.worlds:
        assert f"ok    trains on the toy, on {world}" in text
        compares = needs.likelihoods or needs.window
        mark = "ok" if compares else "--"
        assert f"{mark}    the ratio is 1 on the first pass, on {world}" in text
    assert ("the ratio is 1" in text.splitlines()[-1]) == compares


def test_check_of_a_method_that_only_descends_tries_no_ratio(leaves: Path, capsys):
    assert main(["check", "mypkg_of_test_cli.descends:Descends"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all("--" in line for line in lines if "the ratio is 1" in line)
    assert "ratio" not in lines[-1]


def test_check_of_a_method_without_needs_says_what_to_give(leaves: Path, capsys):
    assert main(["check", "mypkg_of_test_cli.needless:Needless"]) == 2
    assert "method Needless does not say what it needs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "option"),
    [
        (["evaluate", "P"], "--reward"),
        (["evaluate", "P"], "--samplers"),
        (["pairs", "P", "--out", "O"], "--reward"),
        (["pairs", "P", "--out", "O"], "--sampler"),
    ],
)
def test_an_option_of_several_values_that_is_given_twice_has_all_of_them(verb, option):
    """...and not the last ones alone, as argparse has it by itself."""
    name = option.removeprefix("--")
    twice = command_line().parse_args([*verb, option, "a=1", option, "b=2"])
    once = command_line().parse_args([*verb, option, "a=1", "b=2"])
    assert getattr(twice, name) == getattr(once, name) == ["a=1", "b=2"]
    assert getattr(command_line().parse_args(verb), name) in (None, []), "nothing stays behind"

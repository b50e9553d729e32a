"""Nothing that was earned is lost: whatever ends a run, what is on disk stays, and the message says how to go on."""

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from genpolicy.cli.main import main
from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.contracts.reward import RewardError, WeightedRewards
from genpolicy.contracts.task import Context, TaskError
from genpolicy.evaluation import metrics_file
from genpolicy.rollout.episodes import reset_seed
from genpolicy.rollout.guard import guarded
from genpolicy.tasks._environments import Environments
from genpolicy.training import checkpoint, resume
from genpolicy.training.experiment import train
from genpolicy.training.processes import Processes
from genpolicy.training.run import Run
from tests import toy, toy_control
from tests.toy import brightness
from tests.toy_control import Point, Walk, prepared
from tests.training.test_trackers import trackers  # noqa: F401 (a fixture)

FIRST_ROWS = 16
"""Samples of the first evaluation of the toy of prompts, all of the same four prompts in turn."""


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    monkeypatch.setattr("genpolicy.evaluation.curves.figures", lambda folder: None)


# What goes wrong, in both worlds: at once, or only when something has been earned


def evaluating(context):
    """True for the rows of an evaluation, False for those of an iteration (groups of four)."""
    return context.prompts[0] != context.prompts[1]


def losing(outputs, context):
    if evaluating(context):
        return brightness(outputs, context)
    raise ConnectionResetError(104, "the judge's machine is gone")


def lost(outputs, context):
    raise ConnectionResetError(104, "the judge's machine is gone")


def refusing(outputs, context):
    if evaluating(context):
        return brightness(outputs, context)
    raise ConfigError("this caption is not for me")


def later_nan(outputs, context):
    value = brightness(outputs, context)
    return value if evaluating(context) else value * float("nan")


def leaving(outputs, context):
    sys.exit(0)


def failing(outputs, context):
    if evaluating(context):
        return brightness(outputs, context)
    raise AssertionError("a bug")


def hanging(outputs, context):
    for _ in range(1000):
        try:
            time.sleep(100)
        except Exception:  # as code that tries again and again does
            continue
    raise AssertionError


class Arm(Walk):
    """A `Walk` that goes wrong at step ``at`` of the episode from reset seed ``seed``."""

    def __init__(self, ends: bool, how: str, seed: int, at: int) -> None:
        super().__init__(ends)
        self.how, self.wrong, self.at = how, seed, at

    def reset(self, *, seed):
        self.seed, self.taken = seed, 0
        return super().reset(seed=seed)

    def step(self, action):
        seen, reward, ended, cut, info = super().step(action)
        self.taken += 1
        if self.seed == self.wrong and self.taken == self.at:
            if self.how == "loses its connection":
                raise ConnectionResetError(104, "the arm is gone")
            if self.how == "leaves":
                sys.exit(0)
            if self.how == "hangs":
                time.sleep(1000)
            if self.how == "reward":
                reward = float("nan")
            if self.how == "observation":
                seen = {**seen, "observation.state": seen["observation.state"] * float("inf")}
        return seen, reward, ended, cut, info


@dataclass
class Arms(Point):
    """``task: {name: "tests.training.test_earned:Arms", how: ..., wrong: SEED}``; the episodes of an evaluation begin at 1000003."""

    ends: bool = False
    how: str = ""
    wrong: int = -1
    at: int = 5
    workers: int = 0

    def environments(self, count, history):
        make = partial(Arm, self.ends, self.how, self.wrong, self.at)
        return Environments(
            make, count, history, self.limit, self.instruction, workers=self.workers
        )


def prompts(folder, reward, **sections):
    """An experiment of four iterations on prompts, as a YAML file."""
    raw = toy.experiment(folder, reward={f"tests.training.test_earned:{reward}": 1.0}, **sections)
    return written(folder, {**raw, "eval": {"every": 0, "samples": FIRST_ROWS}})


def robots(folder, how, wrong, **sections):
    """DPPO of two iterations, of which the first plays from ``first_start``."""
    task = {"name": "tests.training.test_earned:Arms", "how": how, "wrong": wrong, "limit": 8}
    method = {"name": "dppo", "episodes": 8, "epochs": 1, "critic_epochs": 1}
    common = {
        "method": method,
        "eval": {"every": 0, "episodes": 4},
        "budget": {"iterations": 2},
        "environments": 4,
    }
    raw = toy_control.experiment(folder, task=task, **{**common, **sections})
    return written(folder, raw)


def written(folder, raw):
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(raw))
    return str(path)


def command(folder):
    return f"genpolicy train {folder}/config.yaml"


# The folder


def in_iteration_1(folder, world, monkeypatch=None):
    """An experiment whose task or reward loses its connection in iteration 1."""
    if world == "prompts":
        return prompts(folder, "losing")
    return robots(folder, "loses its connection", reset_seed(0, 1, 0))


@pytest.mark.parametrize("world", ["prompts", "robots"])
def test_a_lost_connection_in_iteration_1_keeps_the_run_its_traceback_and_says_how_to_go_on(
    tmp_path, world
):
    path, folder = in_iteration_1(tmp_path, world), tmp_path / "run"
    with pytest.raises(ConnectionResetError) as raised:
        main(["train", path])
    assert raised.value.__notes__[-1].endswith(command(folder))
    assert len(metrics_file.read(folder)) == 1, "the first evaluation is on disk"
    assert checkpoint.iterations(folder) == [0]
    # what was wrong is mended: the run goes on where it was
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("losing", "constant").replace("loses", "mended"))
    config.write_text(config.read_text().replace("test_earned:constant", "test_earned:brightness"))
    result = train(config)
    assert result.summary["iterations"] in (2, 4)


@pytest.mark.parametrize("world", ["prompts", "robots"])
def test_a_run_that_fails_before_it_has_earned_anything_vanishes(tmp_path, world):
    if world == "prompts":
        path = prompts(tmp_path, "lost")
    else:
        path = robots(tmp_path, "loses its connection", 1_000_003)
    with pytest.raises(ConnectionResetError) as raised:
        main(["train", path])
    assert not any("genpolicy train" in note for note in raised.value.__notes__)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("reward", "said"),
    [("refusing", "not for me"), ("later_nan", "reward later_nan is nan")],
)
def test_a_sentence_ends_with_the_command(tmp_path, capsys, reward, said):
    folder = tmp_path / "run"
    assert main(["train", prompts(tmp_path, reward)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert said in last
    assert last.startswith("genpolicy: ")
    assert last.endswith(command(folder))
    assert len(metrics_file.read(folder)) == 1
    assert (folder / "config.yaml").is_file()


def test_a_bug_keeps_the_run_and_its_traceback_too(tmp_path):
    with pytest.raises(AssertionError, match="a bug") as raised:
        main(["train", prompts(tmp_path, "failing")])
    assert raised.value.__notes__[-1].endswith(command(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / "0").is_dir()


def test_interrupted_at_once_the_run_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("genpolicy.training.prompt_collector.collect", interrupted)
    assert main(["train", prompts(tmp_path, "brightness")]) == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith(command(tmp_path / "run"))


def test_an_episode_that_is_on_disk_keeps_the_run(tmp_path, monkeypatch):
    """...though nothing was measured: the first evaluation is not the only thing that was earned."""
    monkeypatch.setattr(metrics_file, "append", lambda folder, metrics: None)
    monkeypatch.setattr(resume, "save", lambda run: None)
    honest = Run.collect

    def keeping(self, *arguments, **options):
        honest(self, *arguments, **{**options, "keep": True})
        raise ConfigError("there is no second floor")

    monkeypatch.setattr(Run, "collect", keeping)
    with pytest.raises(ConfigError) as raised:
        train(robots(tmp_path, "", -1))
    assert raised.value.__notes__[-1].endswith(command(tmp_path / "run"))
    assert len(list((tmp_path / "run/episodes/1").glob("*.pt"))) == 8


def test_a_run_that_was_killed_before_its_config_stood_is_begun_again(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / checkpoint.LOCK).touch()
    (folder / ".staged.config.yaml").write_text("policy: {na")
    assert train(prompts(tmp_path, "brightness")).summary["iterations"] == 4
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="not empty"):
        train(parse.load(tmp_path / "experiment.yaml", [f"--output={other}"]))


@pytest.mark.usefixtures("trackers")
def test_trackers_write_only_beside_a_config(tmp_path, monkeypatch):
    """A kill while they begin leaves a folder that can be resumed."""
    seen = []

    def look(self, text):
        seen.append((tmp_path / "run" / "config.yaml").is_file())

    monkeypatch.setattr(Processes, "start_trackers", look)
    path = prompts(tmp_path, "brightness", trackers=["told"], budget={"iterations": 1})
    train(path)
    assert seen == [True]


@pytest.mark.parametrize("mark", ["metrics.jsonl", "checkpoints"])
def test_a_run_copied_without_its_dotfiles_goes_on_where_it_lies(tmp_path, mark):
    first = train(prompts(tmp_path, "brightness", budget={"iterations": 2})).folder
    copy = tmp_path / "copy"
    shutil.copytree(first, copy, ignore=shutil.ignore_patterns(".*"))
    assert not list(copy.glob(".*"))
    shutil.rmtree(first)
    if mark == "checkpoints":
        (copy / "metrics.jsonl").unlink()
    again = train(parse_path(copy), ["--budget.iterations=3"])
    assert again.folder == copy
    assert checkpoint.iterations(copy)[-1] == 3
    assert not first.exists()


def parse_path(folder):
    return str(folder / "config.yaml")


def test_a_config_that_is_no_runs_begins_at_its_output(tmp_path):
    path = Path(prompts(tmp_path, "brightness", budget={"iterations": 1}))
    template = tmp_path / "mine" / "config.yaml"
    template.parent.mkdir()
    shutil.copy(path, template)
    assert train(template).folder == tmp_path / "run"


def test_measured_iterations_without_a_checkpoint_are_not_overwritten(tmp_path, capsys):
    folder = train(prompts(tmp_path, "brightness", budget={"iterations": 2})).folder
    before = (folder / "metrics.jsonl").read_bytes()
    shutil.rmtree(folder / "checkpoints")
    assert main(["train", parse_path(folder)]) == 2
    assert "measured 2 iterations and has no checkpoint" in capsys.readouterr().err
    assert (folder / "metrics.jsonl").read_bytes() == before


# sys.exit


def test_a_reward_that_exits_does_not_end_the_run_as_if_it_were_done(tmp_path, capsys):
    assert main(["train", prompts(tmp_path, "leaving")]) == 2
    assert "reward leaving has called sys.exit(0)" in capsys.readouterr().err
    with pytest.raises(RewardError, match=r"sys.exit\(0\)"):
        train(prompts(tmp_path, "leaving"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_simulation_that_exits_is_told(workers):
    arms = guarded(Arms(how="leaves", wrong=7, workers=workers), "Arms", 2, 1)
    arms.reset([0, 1], [7, 8])
    with pytest.raises(
        (TaskError, RuntimeError),
        match=r"sys.exit\(0\)",
    ):
        arms.step([0, 1], torch.zeros(2, 8, 2))
    arms.close()


@pytest.mark.parametrize("code", [0, 3, "no more", None])
def test_a_program_that_anything_else_ends_is_not_a_success(monkeypatch, capsys, code):
    monkeypatch.setattr("genpolicy.cli.check.run", lambda args: sys.exit(code))
    assert main(["check", "tests.toy"]) == 1
    assert f"sys.exit({code!r}) was called" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # control: what the parser ends is what argparse says
        raise SystemExit(main(["--help"]))


# What is not finite


@pytest.mark.parametrize(
    ("how", "length", "said"),
    [
        ("reward", 1, "its reward is nan"),
        ("reward", 8, "its reward is nan"),
        # in the middle of a chunk nobody sees the frame
        ("observation", 1, "observation.state is inf"),
        ("observation", 5, "observation.state is inf"),
    ],
)
def test_what_is_not_finite_is_named_by_slot_step_and_seed(how, length, said):
    arms = guarded(Arms(how=how, wrong=7), "Arms", 3, 1)
    arms.reset([0, 1, 2], [5, 6, 7])
    if length == 1:
        for _ in range(4):
            arms.step([0, 1, 2], torch.zeros(3, 1, 2))
    with pytest.raises(TaskError) as raised:
        arms.step([0, 1, 2], torch.zeros(3, length, 2))
    where = "task Arms, environment slot 2, step 5 of the episode from reset seed 7: "
    assert where in str(raised.value)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_observation_is_looked_at_when_an_episode_begins(monkeypatch):
    honest = Walk.reset
    monkeypatch.setattr(
        Walk,
        "reset",
        lambda self, *, seed: ({"state": torch.tensor([1, float("nan")]).numpy()}, {}),
    )
    with pytest.raises(TaskError, match="slot 1, step 0 of the episode from reset seed 9"):
        guarded(Point(), "Point", 2, 1).reset([1], [9])
    monkeypatch.setattr(Walk, "reset", honest)
    guarded(Point(), "Point", 2, 1).reset([1], [9])  # control


@pytest.mark.parametrize("how", ["reward", "observation"])
def test_no_episode_with_a_number_that_is_not_finite_is_stored(tmp_path, how):
    wrong = {"how": how, "wrong": reset_seed(0, 1, 3), "at": 4}  # the last step of a chunk is seen
    task = {"name": "tests.training.test_earned:Arms", **wrong}
    run, _ = prepared(tmp_path, task=task, environments=8)
    with pytest.raises(TaskError, match="slot 3, step 4 of"):
        run.collect(8, 1, keep=True)
    assert not list((tmp_path / "run").rglob("3-0-*.pt"))


@pytest.mark.parametrize("how", ["reward", "observation"])
def test_no_demonstration_with_a_number_that_is_not_finite_is_recorded(monkeypatch, how):
    honest = Walk.step

    def step(self, action):
        seen, reward, *rest = honest(self, action)
        if how == "reward":
            return seen, float("nan"), *rest
        return {name: value * float("nan") for name, value in seen.items()}, reward, *rest

    monkeypatch.setattr(Walk, "step", step)
    with pytest.raises(TaskError, match="step 1 of the episode from reset seed 4"):
        Point().demonstrate(4, 0.0)


def test_a_weighted_sum_that_is_not_finite_is_told_with_its_terms():
    parts = {"a": torch.tensor([1.0, 1e200], dtype=torch.float64)}
    rewards = WeightedRewards({"a": (brightness, 1e200)})
    with pytest.raises(RewardError, match=r"weighted sum of the rewards is inf: a inf \(weight"):
        rewards.total(parts)
    assert rewards.total({"a": parts["a"][:1]}).isfinite().all(), "control"


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (".inf", "its weight must be a finite number"),
        (".nan", "brightness is nan; it must be a finite number"),
    ],
)
def test_a_weight_that_is_not_finite_is_refused(tmp_path, capsys, weight, said):
    path = prompts(tmp_path, "brightness")
    asked = "--reward={tests.toy:brightness: " + weight + "}"
    assert main(["train", path, asked]) == 2
    assert said in capsys.readouterr().err


# What hangs


@pytest.mark.parametrize("workers", [0, 2])
def test_a_simulation_that_hangs_is_told(workers):
    begun = time.monotonic()
    arms = guarded(Arms(how="hangs", wrong=7, workers=workers), "Arms", 2, 1, patience=None)
    arms._patience = 0.3
    arms.reset([0, 1], [7, 8])
    with pytest.raises(TaskError, match=r"task Arms has not answered for 0.3 seconds \(\w+.py:"):
        arms.step([0, 1], torch.zeros(2, 8, 2))
    if workers:
        for share in arms._environments._shares:
            share._process.kill()  # closing waits for a worker
    arms.close()
    assert time.monotonic() - begun < 60


def test_a_reward_that_hangs_and_tries_again_is_told():
    rewards = WeightedRewards({"hanging": (hanging, 1.0)}, patience=0.2)
    with pytest.raises(
        RewardError, match=r"reward hanging has not answered for 0.2 seconds \(test_earned.py:"
    ) as raised:
        rewards.parts(torch.zeros(2, 3, 4, 4), Context(["bright"] * 2))
    assert "patience: SECONDS" in str(raised.value)
    patient = WeightedRewards({"brightness": (brightness, 1.0)}, patience=0.2)
    patient.parts(torch.zeros(2, 3, 4, 4), Context(["bright"] * 2))
    time.sleep(0.3)  # control: no alarm is left behind


@pytest.mark.parametrize("patience", [0, -1, ".inf", "long"])
def test_patience_is_a_number_of_seconds_or_null(tmp_path, capsys, patience):
    path = prompts(tmp_path, "brightness")
    assert main(["train", path, f"--patience={patience}"]) == 2
    assert "patience is" in capsys.readouterr().err
    assert parse.load(path, ["--patience=null"]).patience is None


# Other errors of the system are bad input


def test_a_disk_that_is_full_is_one_sentence_and_the_command(tmp_path, capsys, monkeypatch):
    honest = checkpoint.write

    def full(folder, iteration, state, keep=2):
        if iteration:
            raise OSError(28, "No space left on device", str(folder))
        honest(folder, iteration, state, keep)

    monkeypatch.setattr(checkpoint, "write", full)
    assert main(["train", prompts(tmp_path, "brightness", checkpoint_every=1)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("genpolicy: No space left on device: ")
    assert last.endswith(command(tmp_path / "run"))
    assert (
        json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[1])["iteration"] == 1
    )
    assert os.path.isdir(tmp_path / "run/checkpoints/0")

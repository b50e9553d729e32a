"""Whose code the verbs run: the person's own, and a stranger's only with --trust."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from genpolicy.cli.main import main
from genpolicy.training.experiment import train
from tests import toy, toy_control
from tests.marked import Marked

REFUSED = "which is code: it is imported only with --trust"
FEW = ("--episodes", "2", "--gifs", "0")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, from which Python imports nothing by itself."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    return folder


def refused(capsys: pytest.CaptureFixture[str], marked: Marked, *arguments: str | Path) -> str:
    """The verb refuses in one sentence, and nothing was run."""
    capsys.readouterr()
    path = list(sys.path)
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert REFUSED in said
    assert marked.name in said
    assert not marked.ran()
    assert sys.path == path
    return said


def allowed(marked: Marked, *arguments: str | Path) -> None:
    """The verb does its work, and the code was run (what Python has imported once stays)."""
    assert main([str(argument) for argument in arguments]) == 0
    assert marked.ran()


PICTURES: dict[str, Any] = {
    "policy": {"name": "toy"},
    "eval": {"every": 0, "samples": 8, "select": None},
    "reward": {"jpeg_compressibility": 1.0},
    "budget": {"iterations": 1},
}
CONTROL: dict[str, Any] = {"budget": {"iterations": 1}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run that draws and a run that acts."""
    found: dict[str, Path] = {}
    for world, sections in ((toy, PICTURES), (toy_control, CONTROL)):
        folder = tmp_path_factory.mktemp("trained")
        path = folder / "experiment.yaml"
        path.write_text(yaml.safe_dump(world.experiment(folder, **sections)))
        found["draws" if world is toy else "acts"] = train(path).folder
    return found


def theirs(run: Path, folder: Path, **sections: Any) -> Path:
    """A copy of a run that somebody made with ``sections`` of their own, as its config.yaml says."""
    shutil.copytree(run, folder / "run")
    config = folder / "run" / "config.yaml"
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), **sections}))
    return folder / "run"


# -- a stranger's run folder ----------------------------------------------------------------------------------


def test_a_run_with_a_reward_of_their_own(
    tmp_path: Path, here: Path, trained: dict[str, Path], capsys
):
    """The whole run folder of somebody, evaluated with and without --trust."""
    marked = Marked(here)
    reward = {f"{marked.name}:brightness": 1.0}
    run = theirs(trained["draws"], tmp_path, reward=reward)
    said = refused(capsys, marked, "evaluate", run)
    assert str(run / "config.yaml") in said
    assert not (run / "eval.json").exists()
    refused(capsys, marked, "evaluate", run / "policy")  # its run lies above it
    refused(capsys, marked, "pairs", run, "--out", tmp_path / "pairs")
    assert not (tmp_path / "pairs").exists()
    # controls: what needs none of their code works, and with --trust all does
    assert main(["sample", str(run), "--prompts", "bright", "--out", str(tmp_path / "out")]) == 0
    assert main(["evaluate", str(run), "--reward", "jpeg_compressibility"]) == 0
    asked = ("--reward", "jpeg_compressibility", "--out", str(tmp_path / "pairs"))
    assert main(["pairs", str(run), *asked]) == 0
    assert not marked.ran()
    allowed(marked, "evaluate", run, "--trust")
    assert json.loads((run / "eval.json").read_text())["reward/brightness"] > 0


def test_the_rewards_settings_can_not_name_another(
    tmp_path: Path, here: Path, trained: dict[str, Path], capsys
):
    marked = Marked(here)
    reward = {"jpeg_compressibility": {"weight": 1.0, "name": f"{marked.name}:brightness"}}
    run = theirs(trained["draws"], tmp_path, reward=reward)
    main(["evaluate", str(run)])
    assert not marked.ran()


def test_a_task_of_their_own(tmp_path: Path, here: Path, trained: dict[str, Path], capsys):
    marked = Marked(here)
    task = {"name": f"{marked.name}:brightness"}
    run = theirs(trained["draws"], tmp_path, task=task)
    refused(capsys, marked, "evaluate", run)
    run = theirs(trained["acts"], tmp_path / "control", task=task)
    refused(capsys, marked, "evaluate", run, *FEW)


def test_a_kernel_of_their_own(tmp_path: Path, here: Path, trained: dict[str, Path], capsys):
    """In the sampler that is deployed, and in the one that the policy was trained with."""
    marked = Marked(here)
    run = theirs(trained["acts"], tmp_path)
    config, ours = run / "config.yaml", ("--task", "tests.toy_control:Point", *FEW)
    assert main(["evaluate", str(run), *ours, "--samplers", "stochastic"]) == 0  # control
    raw = yaml.safe_load(config.read_text())
    raw["chain"]["kernel"] = {"name": f"{marked.name}:DDIM", "eta": 1.0}
    config.write_text(yaml.safe_dump(raw))
    refused(capsys, marked, "evaluate", run, *ours, "--samplers", "stochastic")
    refused(capsys, marked, "evaluate", run, *ours, "--samplers", "last_mean")
    description = json.loads((run / "policy/genpolicy.json").read_text())
    description.pop("crc32")
    description["chain"]["kernel"] = {"name": f"{marked.name}:DDIM", "eta": 1.0}
    (run / "policy/genpolicy.json").write_text(json.dumps(description))
    refused(capsys, marked, "evaluate", run, *ours)
    refused(
        capsys,
        marked,
        *("demonstrate", "tests.toy_control:Point", "--by", run, "--out", tmp_path / "set"),
    )
    allowed(marked, "evaluate", run, *ours, "--trust")


PENDULUM = {"name": "gymnasium", "limit": 5}


@pytest.mark.parametrize("form", ["{}:Marked-v0", "{}/Marked-v0", "{}:Pendulum-v1"])
@pytest.mark.parametrize("word", ["--task.env", "--trust"])
def test_an_environment_of_their_package(
    tmp_path: Path, here: Path, trained: dict[str, Path], capsys, form: str, word: str
):
    marked = Marked(here)
    env = form.format(marked.name)
    task = {**PENDULUM, "env": env}
    run = theirs(trained["acts"], tmp_path, task=task)
    refused(capsys, marked, "evaluate", run, *FEW)
    # the person's own word for it is the person's, and --trust is for the file's
    main(["evaluate", str(run), *FEW, f"{word}={env}" if "." in word else word])
    assert marked.ran()
    assert REFUSED not in capsys.readouterr().err


def test_an_environment_that_makes_another_one(
    tmp_path: Path, here: Path, trained: dict[str, Path], capsys
):
    marked = Marked(here)
    for env in ("GymV26Environment-v0", "GymV21Environment-v0"):
        task = {**PENDULUM, "env": env, "kwargs": {"env_id": f"{marked.name}:Marked-v0"}}
        run = theirs(trained["acts"], tmp_path / env.replace("/", "-"), task=task)
        assert main(["evaluate", str(run), *FEW]) == 2
        assert f"'{env}', {REFUSED}" in capsys.readouterr().err


def test_an_environment_that_everybody_has_needs_no_trust(
    tmp_path: Path, here: Path, trained: dict[str, Path], capsys
):
    """Control: it is made, and only then does the policy not fit it."""
    for env in ("Pendulum-v1", "PointMaze_UMaze-v3", "gym_pusht/PushT-v0"):
        task = {"name": "gymnasium", "env": env}
        run = theirs(trained["acts"], tmp_path / env.replace("/", "-"), task=task)
        assert main(["evaluate", str(run), *FEW]) == 2
        assert REFUSED not in capsys.readouterr().err


def test_training_goes_on_from_a_stranger_only_as_far_as_their_weights(
    tmp_path: Path, here: Path, trained: dict[str, Path], capsys
):
    """policy.pretrained is a stranger's, the YAML that names it the person's."""
    from tests import tiny

    marked = Marked(here)
    folder = tmp_path / "pipeline"
    tiny.build("sd15").save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps({**index, "vae": [marked.name, "AutoencoderKL"]})
    )
    policy = {"name": "diffusers_pipeline", "pretrained": str(folder), "device": "cpu"}
    path = tmp_path / "experiment.yaml"
    raw = toy.experiment(tmp_path, **{**PICTURES, "policy": policy})
    path.write_text(yaml.safe_dump(raw))
    said = refused(capsys, marked, "train", path)
    assert str(folder / "model_index.json") in said
    assert not (tmp_path / "run").exists()
    main(["train", str(path), "--plan", "--trust"])
    assert marked.ran()


# -- the person's own -----------------------------------------------------------------------------------------


def test_what_the_person_names_needs_no_trust(tmp_path: Path, here: Path, trained: dict[str, Path]):
    """--reward and check, of modules in the current folder; and a run's own config.yaml, to resume it."""
    mine, other = Marked(here), Marked(here)
    run = theirs(trained["draws"], tmp_path)
    allowed(mine, "evaluate", run, "--reward", f"{mine.name}:brightness")
    config = run / "config.yaml"
    raw = yaml.safe_load(config.read_text())
    raw |= {"reward": {f"{other.name}:brightness": 1.0}, "budget": {"iterations": 2}}
    config.write_text(yaml.safe_dump(raw))
    allowed(other, "train", config)
    checked = Marked(here)
    main(["check", f"{checked.name}:brightness"])
    assert checked.ran()


def test_modules_beside_the_persons_yaml_are_found(
    tmp_path: Path, here: Path, trained: dict[str, Path]
):
    """CONFIG of train and compare, and --task FILE."""
    beside = tmp_path / "beside"
    beside.mkdir()
    mine = Marked(beside)
    raw = toy.experiment(tmp_path, **PICTURES)
    raw["reward"] = {f"{mine.name}:brightness": 1.0}
    (beside / "experiment.yaml").write_text(yaml.safe_dump(raw))
    allowed(mine, "train", beside / "experiment.yaml")
    second = tmp_path / "second"
    second.mkdir()
    other = Marked(second)
    raw["reward"] = {f"{other.name}:brightness": 1.0}
    (second / "arm.yaml").write_text(yaml.safe_dump(raw))
    allowed(other, "compare", second / "arm.yaml", "--seeds", "0", "--out", tmp_path / "out")
    third = tmp_path / "third"
    third.mkdir()
    task = Marked(third, more="from tests.toy_control import Point\n")
    (third / "task.yaml").write_text(yaml.safe_dump({"task": {"name": f"{task.name}:Point"}}))
    run = theirs(trained["acts"], tmp_path / "control")
    allowed(task, "evaluate", run, "--task", third / "task.yaml", *FEW)


# -- the current folder ---------------------------------------------------------------------------------------


def test_no_verb_takes_modules_from_the_current_folder_for_a_strangers_file(
    tmp_path: Path, here: Path, trained: dict[str, Path]
):
    """As the installed command runs, which has no current folder on Python's path."""
    script = (
        "import sys; sys.path = [p for p in sys.path if p not in ('', '.')]\n"
        "from genpolicy.cli.main import main\n"
        "code = main(sys.argv[1:])\n"
        "import os; assert os.getcwd() not in sys.path, sys.path\n"
        "sys.exit(code)"
    )
    run = theirs(trained["draws"], tmp_path)
    root = str(Path(__file__).parents[2])
    asked = ("sample", str(run), "--prompts", "bright", "--out", str(tmp_path / "out"))
    ended = subprocess.run(
        [sys.executable, "-P", "-c", script, *asked],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr


def test_a_process_that_simulates_imports_nothing_from_the_current_folder(
    tmp_path: Path, here: Path, trained: dict[str, Path]
):
    """The first thing that it imports is pickle."""
    mark = here / "pickle.ran"
    (here / "pickle.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    from genpolicy.tasks.gymnasium import Gymnasium

    environments = Gymnasium("Pendulum-v1", workers=1).environments(1, 1)
    try:
        assert len(environments.reset([0], [0])) == 1
    finally:
        environments.close()
    assert not mark.exists()

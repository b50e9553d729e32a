"""Mistakes of users: one sentence on stderr, exit code 2, nothing half-written."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from genpolicy.cli.main import main
from genpolicy.training import checkpoint
from tests.toy import brightness, experiment

torch.set_num_threads(1)
SHAPES = {"name": "diffusers_pipeline", "pretrained": "assets/shapes-sd3", "train": "full"}


def unreadable(outputs, context):
    raise ValueError("this caption has no colour")


def informed(outputs, context):
    return brightness(outputs, context), {"why": "it is bright"}


def tree(folder: Path) -> dict[str, bytes] | None:
    """Every file of a folder and what it holds; None if there is no folder."""
    if not folder.exists():
        return None
    files = [folder] if folder.is_file() else [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in files}


def write(folder: Path, raw: Any) -> str:
    path = folder / "experiment.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
    return str(path)


def complaint(capsys: pytest.CaptureFixture[str], output: Path, *arguments: str) -> str:
    """Run the CLI, require what every bad input must do, and return the sentence."""
    before = tree(output)
    capsys.readouterr()
    code = main(list(arguments))
    error = capsys.readouterr().err
    assert code == 2, error
    assert "Traceback" not in error
    sentences = [line for line in error.splitlines() if "genpolicy: " in line]
    assert len(sentences) == 1
    assert error.splitlines()[-1] == sentences[0]
    assert sentences[0].startswith("genpolicy: ")
    assert tree(output) == before
    return sentences[0]


OVERRIDES = {
    "unknown key": (["--budgett.iterations=3"], "no key 'budgett'; did you mean budget"),
    "unknown nested key": (["--budget.iteration=3"], "no key 'iteration'; did you mean iterations"),
    "unknown key of a leaf": (["--method.gruop=4"], "no key 'gruop'; did you mean group"),
    "unknown key of a kernel": (
        ["--chain.kernel.etta=1"],
        "kernel ddim has no key 'etta'; did you mean eta",
    ),
    "a key of a kernel that has none": (
        ["--chain.kernel={name: heun, order: 2}"],
        "kernel heun has no key 'order'; there are none",
    ),
    "an order of prompts that there is not": (
        ["--task.order=random"],
        "genpolicy: task prompts: order is 'random'; valid are 'shuffled', 'sequential'",
    ),
    "a floor under a kernel without a std of its own, before the model is read": (
        ["--policy.pretrained=nowhere", "--chain.kernel={name: floorstd, floor: 0.1, kernel: sde}"],
        "kernel floorstd can't go around sde, which has no std of its own",
    ),
    "the same in the deployed sampler": (
        ["--policy.pretrained=nowhere", "--eval.sampler.kernel={name: clipstd, kernel: sde}"],
        "kernel clipstd can't go around sde, which has no std of its own",
    ),
    "the best of several without a critic": (
        ["--eval.sampler.best_of=4"],
        "leave best_of at 1, or go on from a policy that has one",
    ),
    "the best of several in training": (
        ["--chain.best_of=4"],
        "eval.sampler.best_of is for a policy that has a critic",
    ),
    "unknown key of the deployed sampler": (
        ["--eval.sampler.step=4"],
        "no key 'step'; did you mean steps",
    ),
    "wrong type": (["--budget.iterations=many"], "iterations is 'many'; it must be a whole number"),
    "a fraction where a number of things is asked": (["--eval.samples=3.5"], "samples is 3.5"),
    "null where a number is needed": (
        ["--eval.samples=null"],
        "samples is None; it must be a whole number",
    ),
    "a number where a section is needed": (["--budget=5"], "budget is 5; it must be a mapping"),
    "too long a list": (["--chain.window=[1,2,3]"], "window is [1, 2, 3]; it must be a list of 2"),
    "unknown method": (
        ["--method.name=flow_gpro"],
        "no method 'flow_gpro'; did you mean flow_grpo",
    ),
    "unknown reward": (
        ["--reward.shapes_strickt=1"],
        "no reward 'shapes_strickt'; did you mean shapes_strict",
    ),
    "unknown task": (["--task.name=prompt"], "no task 'prompt'; did you mean prompts"),
    "unknown kernel": (["--chain.kernel.name=dddim"], "no kernel 'dddim'; did you mean ddim"),
    "unknown model": (
        ["--policy.name=diffuser_pipeline"],
        "no model 'diffuser_pipeline'; did you mean diffusers_pip",
    ),
    "a dotted leaf that is not there": (
        ["--method.name=tests.toy:nope"],
        "'tests.toy:nope' can't be imported",
    ),
    "missing prompt file": (
        ["--task.prompts=nowhere.txt"],
        "prompt file nowhere.txt does not exist",
    ),
    "missing evaluation prompts": (
        ["--eval.prompts=nowhere.txt"],
        "prompt file nowhere.txt does not exist",
    ),
    "a shipped file that does not ship": (
        ["--eval.prompts=assets/shapes-sd3/captions_test.txt"],
        "There is no",
    ),
    "a group of one": (["--method.group=1"], "group is 1; it must be at least 2"),
    "groups that do not divide": (
        ["--method.updates=3"],
        "groups is 4 and can't be split evenly into updates = 3",
    ),
    "a clip range of zero": (["--method.clip=0"], "clip is 0.0; it must be above 0"),
    "window outside the chain": (
        ["--chain.window=[0,9]"],
        "window [0, 9) does not lie inside the chain's 4 steps",
    ),
    "window_size over the window": (
        ["--chain.window_size=4"],
        "window_size 4 does not fit into the window of 3 steps",
    ),
    "no noise for a method with likelihoods": (
        ["--chain.kernel.eta=0"],
        "step 0 of the window is deterministic",
    ),
    "a solver for a method with likelihoods": (
        ["--chain.kernel=heun"],
        "no stochastic step to train",
    ),
    "the flow SDE on another schedule": (
        ["--policy.family=vp", "--chain.kernel=sde"],
        "use kernel ddim on this model",
    ),
    "NaN reward": (["--reward={tests.toy:nan: 1}"], "reward nan is nan for '"),
    "reward of the wrong shape": (
        ["--reward={tests.toy:wrong_shape: 1}"],
        "returned shape () for 16 outputs",
    ),
    "a reward that can't read a prompt": (
        ["--reward={tests.cli.test_bad_inputs:unreadable: 1}"],
        "has no colour (test_bad",
    ),
    "a reward that returns more than its scores": (
        ["--reward={tests.cli.test_bad_inputs:informed: 1}"],
        "reward informed returned a tuple of Tensor, dict; it must return one number for each",
    ),
    "captions of another world": (["--reward=shapes_strict"], "is not a shapes caption"),
    "two rewards of one name": (
        ["--reward={tests.toy:brightness: 1, tests.training.test_earned:brightness: 1}"],
        "two rewards are called brightness",
    ),
    "a reward's weight in words": (
        ["--reward={tests.toy:constant: much}"],
        "its weight must be a finite number, got 'much'",
    ),
    "no reward at all": (["--reward={}"], "names no reward"),
    "unknown eval.select": (["--eval.select=reward/brigthness"], "did you mean reward/brightness"),
    "bad advantage": (["--method.advantage=grup"], "advantage is 'grup'; did you mean group"),
    "negative budget": (["--budget.iterations=-1"], "iterations is -1; it must be above 0"),
    "no budget": (["--budget={}"], "budget sets no limit"),
    "negative learning rate": (["--optimizer.lr=-1e-4"], "lr is -0.0001; it must be above 0"),
    "betas of one": (["--optimizer.betas=[0.9,1.0]"], "it must lie in [0, 1)"),
    "no steps": (["--chain.steps=0"], "steps is 0; it must be at least 1"),
    "no samples": (["--eval.samples=0"], "samples is 0; it must be at least 1"),
    "micro_batch in words": (
        ["--micro_batch=few"],
        "micro_batch is 'few'; it must be auto or a number of rows",
    ),
    "micro_batch of none": (["--micro_batch=0"], "micro_batch is 0"),
    "unknown tracker": (["--trackers=[wandbb]"], "trackers"),
    "a truth where a number is asked": (
        ["--chain.best_of=true"],
        "best_of is True; it must be a whole number",
    ),
    "a list where text is asked": (["--output=[1]"], "output is [1]; it must be text"),
    "a list where a section is needed": (["--chain=[]"], "chain is []; it must be a mapping"),
    "a number of more than 64 bits": (["--seed=1e308"], "a whole number must fit into 64 bits"),
    "a key that is no text": (["--reward={null: 1}"], "has the key None; its keys must be text"),
    "a path that is no dotted one": (["--method=..:x"], "method '..:x' is no dotted path"),
    "a number whose square is infinite": (
        ["--method.clip=1e308"],
        "clip is 1e+308; a number must be below 1e+19",
    ),
    "a learning rate that overflows": (["--optimizer.lr=1e19"], "a number must be below 1e+19"),
    "a weight of a reward that overflows": (
        ["--reward={tests.toy:brightness: -1e30}"],
        "a number must be below 1e+19",
    ),
    "a number that overflows in a sampler": (
        ["--eval.sampler={guidance: 1e200}"],
        "a number must be below 1e+19",
    ),
    "a group that no memory holds": (
        ["--method.group=4611686018427387904"],
        "group is 4611686018427387904; it must be below 2147483648",
    ),
    "more iterations than a run reaches": (["--budget.iterations=1e10"], "it must be below 2147"),
    "a function that is no reward": (
        ["--reward=os:getcwd"],
        "os:getcwd is no reward: it is called with (outputs, context), and takes ()",
    ),
    "a class that is no reward": (["--reward=builtins:dict"], "dict is a plain class"),
    "override without a value": (["--budget.iterations"], "not of the form --section.key=value"),
    "override in two words": (["--budget.iterations", "3"], "not of the form --section.key=value"),
    "override of what has no keys": (["--seed.value=3"], "seed is a plain value"),
    "override that is no YAML": (["--method.group=[1"], "its value is not readable YAML"),
    "a policy folder without a policy": (["--policy.pretrained=tests"], "is no saved toy"),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_wrong_values(tmp_path: Path, capsys, name: str):
    overrides, said = OVERRIDES[name]
    evaluation = {"every": 2, "samples": 16}
    path = write(
        tmp_path, experiment(tmp_path, reward={"tests.toy:brightness": 1.0}, eval=evaluation)
    )
    for plan in ([], ["--plan"]):
        assert said in complaint(capsys, tmp_path / "run", "train", path, *overrides, *plan)


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ({"pretrained": "tests"}, "tests is no diffusers pipeline: it has no model_index.json"),
        ({"pretrained": "nobody/nothing"}, "the hub repository can't be read"),
        ({"pretrained": "assets/shapes-sd4"}, "the nearest: assets/shapes-sd3"),
        ({"call": {"heigth": 32}}, "has no such argument; the nearest are height"),
        ({"call": {"latents": 1}}, "can't be set there"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
    ],
)
def test_wrong_pipelines(tmp_path: Path, capsys, monkeypatch, policy: dict[str, Any], said: str):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        "logging.raiseExceptions", False
    )  # diffusers logs to the stderr of its import: a closed one
    path = write(tmp_path, experiment(tmp_path, policy={**SHAPES, **policy}))
    assert said in complaint(capsys, tmp_path / "run", "train", path)


@pytest.mark.parametrize("section", ["policy", "task", "reward", "method"])
def test_missing_section(tmp_path: Path, capsys, section: str):
    raw = experiment(tmp_path)
    del raw[section]
    said = "names no reward" if section == "reward" else f"needs the key '{section}'"
    assert said in complaint(capsys, tmp_path / "run", "train", write(tmp_path, raw))


def test_missing_name(tmp_path: Path, capsys):
    path = write(tmp_path, experiment(tmp_path, method={"group": 4}))
    assert "the method section needs a name" in complaint(capsys, tmp_path / "run", "train", path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "not readable YAML"),
        ("- 1\n- 2\n", "must be a YAML mapping"),
        ("", "YAML mapping"),
    ],
)
def test_files_that_are_no_experiment(tmp_path: Path, capsys, text: str, said: str):
    assert said in complaint(capsys, tmp_path / "run", "train", write(tmp_path, text))


def test_missing_file(tmp_path: Path, capsys):
    said = complaint(capsys, tmp_path / "run", "train", "quickstrat")
    assert "no config 'quickstrat'" in said
    assert "quickstart" in said


@pytest.mark.parametrize("key", ["task", "eval"])
def test_empty_prompt_file(tmp_path: Path, capsys, key: str):
    (tmp_path / "empty.txt").write_text("\n  \n")
    path = write(tmp_path, experiment(tmp_path))
    said = complaint(
        capsys, tmp_path / "run", "train", path, f"--{key}.prompts={tmp_path / 'empty.txt'}"
    )
    assert "has no prompts" in said


# -- folders ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with experiment.yaml and run/, two iterations long."""
    folder = tmp_path_factory.mktemp("finished")
    sections = {
        "budget": {"iterations": 2},
        "eval": {"every": 0, "samples": 8},
        "checkpoint_every": 1,
    }
    assert main(["train", write(folder, experiment(folder, **sections))]) == 0
    return folder


def test_folder_with_a_run(finished: Path, capsys):
    said = complaint(capsys, finished / "run", "train", str(finished / "experiment.yaml"))
    assert "holds a run already: resume it with genpolicy train" in said


def test_a_policy_that_is_a_runs_folder(finished: Path, tmp_path: Path, capsys):
    path = write(tmp_path, experiment(tmp_path, policy={"name": "toy"}))
    run, output = finished / "run", tmp_path / "run"
    said = complaint(capsys, output, "train", path, f"--policy.pretrained={run}")
    assert f"pretrained is {run}, the folder of a run: its policy is {run}/policy" in said
    lora = f"--policy.lora={{start: {run}}}"
    said = complaint(capsys, output, "train", path, lora, "--policy.train=lora")
    assert f"lora.start is {run}, the folder of a run" in said
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").touch()
    begun = f"--policy.pretrained={tmp_path / 'begun'}"
    assert "has saved no policy yet" in complaint(capsys, output, "train", path, begun)
    good = [f"--policy.pretrained={run}/policy", "--budget.iterations=1", "--eval.every=0"]
    assert main(["train", path, *good]) == 0, "control"


def test_folder_in_use(finished: Path, capsys):
    with checkpoint.locked(finished / "run"):
        assert "in use by another run" in complaint(
            capsys, finished / "run", "train", str(finished / "run" / "config.yaml")
        )


def test_checkpoint_cut_in_half(finished: Path, capsys):
    """The older one is taken up; where that is damaged too, nothing is overwritten."""
    config = str(finished / "run" / "config.yaml")
    files = [finished / "run" / "checkpoints" / str(n) / "state.pt" for n in (1, 2)]
    whole = [file.read_bytes() for file in files]
    for file, contents in zip(files, whole, strict=True):
        file.write_bytes(contents[: len(contents) // 2])
    said = complaint(capsys, finished / "run", "train", config)
    assert f"{files[1].parent} is damaged" in said
    assert "there is no older one" in said
    files[0].write_bytes(whole[0])
    assert main(["train", config]) == 0
    told = capsys.readouterr().err
    assert f"{files[1]} is damaged" in told
    assert "resumed at iteration 1" in told
    assert [path.name for path in files[1].parents[1].iterdir()] in (["1", "2"], ["2", "1"])
    same = torch.load(files[1], weights_only=True)["parameters"]
    files[1].write_bytes(whole[1])
    before = torch.load(files[1], weights_only=True)["parameters"]
    assert all(map(torch.equal, same, before))


def test_checkpoint_of_another_policy(finished: Path, capsys):
    config = str(finished / "run" / "config.yaml")
    said = complaint(
        capsys, finished / "run", "train", config, "--policy.hidden=8", "--budget.iterations=3"
    )
    assert "policy.hidden is 8, and was None" in said


def test_folder_that_is_not_empty(tmp_path: Path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    path = write(tmp_path, experiment(tmp_path))
    assert "is not empty and holds no run" in complaint(capsys, tmp_path / "run", "train", path)


def test_an_empty_folder_stays_empty(tmp_path: Path, capsys):
    (tmp_path / "run").mkdir()
    path = write(tmp_path, experiment(tmp_path, reward={"tests.toy:nan": 1.0}))
    complaint(capsys, tmp_path / "run", "train", path)
    assert list((tmp_path / "run").iterdir()) == []


def test_output_that_is_a_file(tmp_path: Path, capsys):
    (tmp_path / "run").write_text("years of work")
    path = write(tmp_path, experiment(tmp_path))
    assert "is a file" in complaint(capsys, tmp_path / "run", "train", path)


def test_damaged_policy(finished: Path, capsys):
    file = finished / "run" / "policy" / "genpolicy.json"
    whole = file.read_text()
    file.write_text(whole[:20])
    said = complaint(capsys, finished / "run", "evaluate", "--trust", str(finished / "run"))
    assert "genpolicy.json is damaged" in said
    file.write_text(whole)


# -- other verbs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian", "quickstart"], "'trian'; did you mean train"),
        (["train"], "required: config"),
        (["list", "method"], "'method'; did you mean methods"),
        (["list", "methods", "--fast"], "list does not take '--fast'"),
        (["evaluate", "nowhere/at/all"], "no such folder"),
        (["evaluate", "--trust", "RUN", "--samples", "0"], "--samples is 0; it must be at least 1"),
        (["evaluate", "--trust", "RUN", "--samples", "few"], "invalid int value: 'few'"),
        (
            ["evaluate", "--trust", "RUN", "--prompts", "nowhere.txt"],
            "prompt file nowhere.txt does not exist",
        ),
        (["evaluate", "--trust", "RUN", "--reward", "shapes_strikt"], "did you mean shapes_strict"),
        (["evaluate", "--trust", "RUN", "--steps", "0"], "steps is 0; it must be at least 1"),
        (["evaluate", "--trust", "RUN", "--sampler", "kernel.name=huen"], "did you mean heun"),
        (["evaluate", "--trust", "RUN", "--sampler", "kernel"], "not of the form"),
        (["evaluate", "assets/shapes-sd3"], "comes from no run of ours"),
        (
            ["sample", "--trust", "RUN", "--prompts", "x", "--out", "OUT", "--n", "0"],
            "--n is 0; it must be at least 1",
        ),
        (["sample", "--trust", "RUN", "--prompts", " ", "--out", "OUT"], "--prompts is empty"),
        (
            ["sample", "--trust", "RUN", "--prompts", "nowhere.txt", "--out", "OUT"],
            "nowhere.txt does not exist",
        ),
        (["compare", "YAML", "--out", "OUT", "--seeds", "2-0"], "--seeds is '2-0'"),
        (["compare", "YAML", "nowhere", "--out", "OUT"], "no config 'nowhere'"),
        (["compare", "YAML", "YAML", "--out", "OUT"], "two of the configs are called experiment"),
        (["check", "nowhere.at.all"], "can't be imported"),
        (
            ["check", "genpolicy.models.toy"],
            "is a model; check knows the laws of rewards and methods",
        ),
        (["check", "tests.toy"], "does not say which entry is meant"),
    ],
)
def test_wrong_words_to_other_verbs(
    tmp_path: Path, finished: Path, capsys, arguments: list[str], said: str
):
    words = {"RUN": finished / "run", "OUT": tmp_path / "out", "YAML": finished / "experiment.yaml"}
    before = tree(finished / "run")
    assert said in complaint(
        capsys, tmp_path / "out", *(str(words.get(word, word)) for word in arguments)
    )
    assert tree(finished / "run") == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"policy": {"name": "tests.toy:ToyModel", "hidden": 8}},
            "start (the policy section) differs in hidden",
        ),
        ({"budget": {"iterations": 3}}, "budget differs in iterations (2 and 3)"),
        ({"eval": {"every": 0, "samples": 16}}, "evaluation set differs in samples (8 and 16)"),
        ({"eval": {"every": 0, "samples": 8, "seed": 5}}, "evaluation set differs in seed"),
        ({"chain": {"steps": 5}}, "evaluated sampler differs in steps (4 and 5)"),
    ],
)
def test_arms_that_can_not_be_compared(
    tmp_path: Path, finished: Path, capsys, change: dict[str, Any], said: str
):
    other = {**yaml.safe_load((finished / "experiment.yaml").read_text()), **change}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    arms = [str(finished / "experiment.yaml"), str(tmp_path / "other.yaml")]
    assert said in complaint(
        capsys, tmp_path / "out", "compare", *arms, "--out", str(tmp_path / "out")
    )


def test_a_bug_keeps_its_traceback(tmp_path: Path, monkeypatch):
    """The negative control: only bad input is put into one sentence."""
    monkeypatch.setattr("genpolicy.models.toy.Toy.grid", lambda self, steps, start=None: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["train", write(tmp_path, experiment(tmp_path))])


def test_a_start_above_the_noisiest_time_is_told_before_any_work(tmp_path, capsys):
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(experiment(tmp_path, policy={"name": "toy"})))
    for start in ("1.01", "-1", ".nan"):
        assert main(["train", str(path), f"--chain.start={start}"]) == 2
        assert "start" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_unknown_head_names_the_valid_ones(tmp_path, capsys):
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(experiment(tmp_path, policy={"name": "toy"})))
    assert main(["train", str(path), "--policy.prediction_type=epsilo"]) == 2
    assert "one of epsilon, sample, v_prediction, velocity" in capsys.readouterr().err

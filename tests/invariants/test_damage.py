"""Every file of a run, a policy and a data set, damaged in four ways: a sentence, or the same numbers, never others."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from genpolicy.chain import Noise
from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.config.leaves import make
from genpolicy.contracts.task import Context
from genpolicy.policy.files import load
from genpolicy.rollout.demonstrations import demonstrate
from genpolicy.training import checkpoint
from genpolicy.training.experiment import train
from tests import rl100_toy, toy
from tests.invariants.test_control_run import same_state
from tests.invariants.test_same_run import metrics

SEED, WHOLE = 3, 60


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    monkeypatch.setattr("genpolicy.evaluation.curves.figures", lambda folder: None)


# Damages


def cut(file: Path, dice: random.Random) -> None:
    contents = file.read_bytes()
    file.write_bytes(contents[: dice.randrange(len(contents))] if contents else b"")


def flipped(file: Path, dice: random.Random) -> None:
    contents = bytearray(file.read_bytes())
    if contents:
        contents[dice.randrange(len(contents))] ^= 1 << dice.randrange(8)
    file.write_bytes(contents)


def emptied(file: Path, dice: random.Random) -> None:
    file.write_bytes(b"")


def missing(file: Path, dice: random.Random) -> None:
    file.unlink()


DAMAGES = (cut, flipped, emptied, missing)


# What is damaged, and the numbers that come out of it


def prompts(folder):
    raw = toy.experiment(folder, checkpoint_every=1, budget={"iterations": 3})
    return {**raw, "eval": {"every": 2, "samples": 8}}


def robots(folder):
    """...which has collected five episodes that it still learns from."""
    return rl100_toy.experiment(
        folder,
        method={"offline": {"episodes": 5}, "online": {"episodes": 4}},
        budget={"iterations": 4},
        eval={"every": 0, "episodes": 2},
        checkpoint_every=1,
    )


def gone_on(run: Path):
    """The numbers of a run that goes on for an iteration, and whether something was told about a file."""
    last = {"prompts": 3, "robots": 4}[run.parent.parent.name]
    result = train(run / "config.yaml", [f"--budget.iterations={last + 1}"])
    lines = [{k: v for k, v in m.items() if v is not None} for m in metrics(result.folder)]
    state = checkpoint.latest(result.folder)
    return state, [line for line in lines if line["iteration"] == last + 1]


def same_run(one, other) -> bool:
    return all(same_state(one[0], other[0]).values()) and one[1] == other[1]


def actions(policy: Path):
    """What a saved policy draws."""
    found = load(policy)
    if found.model.acts:
        seen = rl100_toy.Outcomes(episodes=2).rows(torch.arange(4), 1, range(2))[0]
    else:
        seen = Context(["bright", "dark", "bright picture", "dark"])
    condition = found.model.encode(seen)
    return found.sample(condition, Noise.rows(0, 0, torch.arange(4), 1)).x0


def columns(folder: Path):
    """What a data set teaches."""
    found = make("datasets", {"name": "lerobot_dataset", "root": str(folder)})
    context, action, pad = found.rows(torch.arange(len(found)), 1, range(2))
    return [action, pad, *context.observation.values(), *found.columns.values()], context.prompts


def same_columns(one, other) -> bool:
    return one[1] == other[1] and all(map(torch.equal, one[0], other[0]))


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """By name a folder, what reads its numbers, and what compares them."""
    root = tmp_path_factory.mktemp("things")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("genpolicy.evaluation.curves.figures", lambda folder: None)
        made: dict[str, tuple[Path, Callable, Callable]] = {}
        for world in (prompts, robots):
            home = root / world.__name__
            home.mkdir()
            run = train(parse.parse(world(home))).folder
            made[world.__name__] = run, gone_on, same_run
            made[f"policy of {world.__name__}"] = run / "policy", actions, torch.equal
        demonstrate(
            {"name": "tests.datasets.cart:Cart"}, root / "set", episodes=3, noise=0.0, seed=0
        )
        made["data set"] = root / "set", columns, same_columns
    return made


def files(folder: Path) -> list[str]:
    """One of a kind: of the episodes and pictures the first."""
    found: dict[str, str] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        one_of = "episode" if "episodes/" in name and name.endswith(".pt") else name
        found.setdefault("pictures" if name.startswith("samples/") else one_of, name)
    return list(found.values())


def outcome(things, name, file, damage, folder, reference):
    """What comes of it: "told" (one sentence), "same" numbers, or "OTHER"."""
    source, read, equal = things[name]
    copy = folder / name.replace("policy of ", "") / "case" / source.name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, copy)
    if file is not None:
        damage(copy / file, random.Random(f"{SEED} {name} {file} {damage.__name__}"))
    try:
        return "same" if equal(read(copy), reference) else "OTHER"
    except ConfigError as error:
        return "several lines" if "\n" in str(error) else "told"


def cases(things):
    """Every file in every way."""
    return [
        (name, file, damage)
        for name, (folder, _, _) in things.items()
        for file in files(folder)
        for damage in DAMAGES
    ]


@pytest.mark.parametrize("count", [16, pytest.param(None, marks=pytest.mark.slow)])
def test_a_damaged_file_is_told_or_changes_no_number(things, tmp_path, capsys, count):
    references = {}
    for name in things:
        source, read, _ = things[name]
        copy = tmp_path / name.replace("policy of ", "") / "case" / source.name
        shutil.copytree(source, copy)
        references[name] = read(copy)
        shutil.rmtree(copy)
    every = cases(things)
    assert len(every) >= WHOLE
    chosen = random.Random(SEED).sample(every, count) if count else every
    found = {}
    for name, file, damage in chosen:
        capsys.readouterr()
        came = outcome(things, name, file, damage, tmp_path / "case", references[name])
        if (
            file == "config.yaml"
            and came == "OTHER"
            and "has changed since" in capsys.readouterr().err
        ):
            came = "told"  # a person may edit it: the run goes on as it says, and says so
        found[name, file, damage.__name__] = came
    assert not [case for case, came in found.items() if came not in ("told", "same")]
    assert {"told", "same"} <= set(found.values())


def test_control_without_checksums_a_flipped_bit_is_another_number(things, tmp_path, monkeypatch):
    """...of the state of a run: torch reads it as it stands."""
    monkeypatch.setattr("zipfile.ZipFile.testzip", lambda self: None)
    run, *_ = things["prompts"]
    found = set()
    for number in range(20):
        copy = tmp_path / str(number)
        shutil.copytree(run / "checkpoints", copy / "checkpoints")
        file = copy / "checkpoints" / "3" / "state.pt"
        flipped(file, random.Random(number))
        try:
            state, whole = checkpoint.latest(copy), checkpoint.latest(run)
            found.add(all(same_state(whole, state).values()))
        except (ConfigError, KeyError):
            continue
    assert False in found

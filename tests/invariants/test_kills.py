"""A run that is killed before any of the things that it does to files goes on to the same numbers."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from genpolicy.evaluation import metrics_file
from genpolicy.training import checkpoint
from tests import rl100_toy, toy
from tests.invariants.test_control_run import same_state
from tests.invariants.test_same_run import CHECKOUT, metrics

KILLS = 30
"""Runs that are killed, per world; every third of them is killed once more after it was resumed."""
SEED = 7


def prompts(folder):
    return toy.experiment(
        folder, checkpoint_every=2, budget={"iterations": 5}, optimizer={"lr": 3e-3, "ema": 0.9}
    )


def robots(folder):
    return rl100_toy.experiment(
        folder,
        method={"offline": {"episodes": 5}, "online": {"episodes": 4}},
        budget={"iterations": 8},
        eval={"every": 4, "episodes": 2},
        checkpoint_every=2,
    )


WORLDS = {"prompts": prompts, "robots": robots}
TO_THE_END = 0


def trained(
    folder: Path, jobs: dict[str, tuple[str, int, list[int]]]
) -> dict[str, list[list[int]]]:
    """The exit codes and numbers of operations of runs: by name the world, the seed, and the places of the kills."""
    asked = []
    for name, (world, seed, places) in jobs.items():
        home = folder / name
        home.mkdir(parents=True)
        (home / "experiment.yaml").write_text(yaml.safe_dump({**WORLDS[world](home), "seed": seed}))
        asked.append([str(home / "experiment.yaml"), str(home / "run"), [*places, TO_THE_END]])
    (folder / "jobs.yaml").write_text(yaml.safe_dump(asked))
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(CHECKOUT),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed", str(folder / "jobs.yaml")],
        env=environment,
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(jobs, json.loads(done.stdout.splitlines()[-1]), strict=True))


def numbers(run: Path):
    """All that a run has come to, its clock aside."""
    policies = {
        str(path.relative_to(run)): path.read_bytes()
        for name in ("policy", "policy_best", "stages")
        for path in (run / name).rglob("*.safetensors")
    }
    summary = metrics_file.read_sealed(run / "summary.json")
    told = {name: summary[name] for name in ("before", "after", "evaluations", "env_steps")}
    return checkpoint.latest(run), (metrics(run), policies, told)


def same(one: Path, other: Path) -> bool:
    (state, told), (again, retold) = numbers(one), numbers(other)
    return all(same_state(state, again).values()) and told == retold


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """A run of each world in one piece: its folder, and how many operations it made. And one of another seed."""
    folder = tmp_path_factory.mktemp("wholes")
    jobs = {world: (world, 0, []) for world in WORLDS}
    jobs |= {f"{world}-other": (world, 1, []) for world in WORLDS}
    codes = trained(folder, jobs)
    assert all(
        code == [[0, made]] and made > 60 for code in codes.values() for ((_, made),) in [code]
    )
    return {name: (folder / name / "run", codes[name][0][1]) for name in jobs}


def drawn(made: int, count: int) -> list[list[int]]:
    """Places of kills, spread over the whole run, a second one after every third."""
    dice = random.Random(SEED)
    first = [dice.randint(1 + made * k // count, made * (k + 1) // count) for k in range(count)]
    return [
        [place, dice.randint(1, 20)] if k % 3 == 2 else [place] for k, place in enumerate(first)
    ]


@pytest.mark.parametrize("count", [2, pytest.param(KILLS, marks=pytest.mark.slow)])
def test_killed_at_any_file_operation_a_run_goes_on_to_the_same_numbers(tmp_path, wholes, count):
    jobs = {
        f"{world}-{'-'.join(map(str, places))}": (world, 0, places)
        for world in WORLDS
        for places in drawn(wholes[world][1], count)
    }
    codes = trained(tmp_path, jobs)
    for name, (world, _, places) in jobs.items():
        assert [code for code, _ in codes[name]] == [-9] * len(places) + [0], name
        run = tmp_path / name / "run"
        assert same(run, wholes[world][0]), name
        left = [p.name for p in run.rglob("*") if p.name.startswith(".") or ".old" in p.name]
        assert left == [checkpoint.LOCK], name


@pytest.mark.parametrize("world", WORLDS)
def test_control_a_run_of_another_seed_has_other_numbers(wholes, world):
    assert not same(wholes[world][0], wholes[f"{world}-other"][0])

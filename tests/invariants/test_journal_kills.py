"""A run that records is killed with -9: its journal loses what was in flight and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from genpolicy.rollout.store import EpisodeStore
from tests.invariants.test_same_run import CHECKOUT
from tests.toy_control import cloned, experiment

pytestmark = pytest.mark.slow

ITERATIONS, EPISODES, SLOTS = 2, 9, 3
PLACES = [40, 61, 90]
"""Operations on files before which a run is killed: an episode makes about five, and each iteration
some more.
"""


def trained(jobs: list) -> tuple[list[list[int]], str]:
    """The exit codes of runs, [experiment, run, places] each, and what was said."""
    path = Path(jobs[0][1]).parent / "jobs.yaml"
    path.write_text(yaml.safe_dump([[str(e), str(run), places] for e, run, places in jobs]))
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed", str(path)],
        env=os.environ
        | {
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(CHECKOUT),
            "HF_HUB_OFFLINE": "1",
        },
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    return [[code for code, _ in each] for each in codes], done.stderr


def journal(run: Path):
    """Every whole episode by its iteration and name."""
    said: list[str] = []
    store = EpisodeStore(run, said.append)
    found = {(i, path.name): e for i in store.iterations() for path, e in store.whole(i)}
    assert not any("damaged" in each for each in said), "an episode is there whole or not at all"
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run in a piece, and for every place one that was killed there: their folders by place (0:
    in a piece), the journals of the killed as they were left, and what their restarts said.
    """
    root = tmp_path_factory.mktemp("journals")
    start = cloned(root)
    folders, jobs = {}, []
    for place in (0, *PLACES):
        home = root / str(place)
        home.mkdir()
        raw = experiment(
            home,
            policy={"name": "mlp", "pretrained": start},
            method={"name": "dppo", "episodes": EPISODES},
            budget={"iterations": ITERATIONS},
            eval={"every": 0, "episodes": 2},
            environments=SLOTS,
            checkpoint_every=1,
            record=True,
        )
        del raw["data"]
        (home / "experiment.yaml").write_text(yaml.safe_dump(raw))
        folders[place] = home / "run"
        jobs.append([home / "experiment.yaml", home / "run", [place]])
    codes, said = trained(jobs)
    assert codes == [[0], *([-9] for _ in PLACES)], said
    left = {place: journal(folders[place]) for place in PLACES}
    codes, said = trained(
        [[folders[place] / "config.yaml", folders[place], [0]] for place in PLACES]
    )
    assert codes == [[0]] * len(PLACES), said
    return folders, left, said


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    return one == other


def test_what_was_over_was_written_and_is_the_same_to_the_bit(runs):
    folders, left, _ = runs
    whole = journal(folders[0])
    assert len(whole) == ITERATIONS * EPISODES
    assert any(len(found) % EPISODES > 0 for found in left.values()), "killed while it collected"
    for place, found in left.items():
        for name, episode in found.items():
            assert same(episode, whole[name]), (place, name)
    names = list(whole)
    assert not same(whole[names[0]], whole[names[1]]), "control"


def test_after_its_restart_a_killed_run_has_the_same_journal(runs):
    folders, left, _ = runs
    whole = journal(folders[0])
    for place in PLACES:
        again = journal(folders[place])
        assert again.keys() == whole.keys()
        assert all(same(again[name], whole[name]) for name in whole), place
        for name in left[place]:
            assert name in again
        assert not [p for p in (folders[place] / "episodes").rglob(".*") if p.is_file()]


def test_the_restart_says_what_it_found(runs):
    _, left, said = runs
    for found in left.values():
        counts = {i: sum(name[0] == i for name in found) for i in range(1, ITERATIONS + 1)}
        for iteration, count in counts.items():
            if 0 < count < EPISODES:
                told = f"iteration {iteration}: {count} of {EPISODES} episodes were on disk"
                assert told in said
                assert f"the other {EPISODES - count} are played" in said

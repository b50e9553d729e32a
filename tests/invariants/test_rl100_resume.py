"""RL-100 stopped anywhere is the run that was not: killed inside an episode of either collection,
or between two stages; and no episode that was over is ever played again.
"""

import os
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
import yaml

import genpolicy
from genpolicy.evaluation import metrics_file
from genpolicy.rollout.episodes import reset_seed
from genpolicy.training.experiment import train
from tests.invariants.test_control_run import same_state
from tests.invariants.test_same_run import CHECKOUT, largest_difference, metrics, weights
from tests.rl100_toy import experiment

COLLECTIONS = {3: 11, 7: 7, 8: 7, 9: 7}
"""Episodes of the iterations that collect some."""
BOUNDARIES = [2, 3, 4, 6]
"""Iterations after which a stage is through."""
EXAMINED = 1_000_003
"""The first reset seed of the examinations, which play four episodes."""
SECTIONS = {
    "method": {"offline": {"episodes": 11}, "online": {"episodes": 7}},
    "optimizer": {"lr": 1e-3, "weight_decay": 0.0, "betas": [0.9, 0.95]},
    "environments": 3,
    "checkpoint_every": 2,
}


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    monkeypatch.setattr("genpolicy.evaluation.curves.figures", lambda folder: None)


def write(folder, **sections):
    folder.mkdir(parents=True)
    task = {"name": "tests.rl100_toy:Watched", "log": str(folder / "played.log"), "limit": 6}
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(experiment(folder, task=task, **{**SECTIONS, **sections})))
    return path


def trained(paths):
    """The exit codes of training these, one after the other."""
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(CHECKOUT),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "tests.rl100_toy", *map(str, paths)]
    done = subprocess.run(
        command, env=environment, cwd=CHECKOUT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout.splitlines()[-1]), done.stderr


def played(folder):
    """Counts how often each start was begun, and how often an episode from it was over;
    the starts of examinations are left out.
    """
    begun, over = Counter(), Counter()
    for line in (folder / "played.log").read_text().splitlines():
        what, seed = line.split()
        if (
            not EXAMINED <= int(seed) < EXAMINED + 4 and seed != "0"
        ):  # 0: the run looks at what can be seen
            (begun if what == "begin" else over)[int(seed)] += 1
    return begun, over


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run in a piece, and one that is killed in the middle of the offline collection (iteration
    3) and of the second online iteration (8), each time as its fifth start begins.
    """
    root = tmp_path_factory.mktemp("runs")
    whole, broken = write(root / "whole"), write(root / "broken")
    kill = [str(reset_seed(0, iteration, 4)) for iteration in (3, 8)]
    (root / "broken/played.kill").write_text(" ".join(kill))
    again = root / "broken/run/config.yaml"
    codes, said = trained([whole, broken, again, again])
    assert codes == [0, -9, -9, 0], said
    (root / "said.txt").write_text(said)
    return root


def test_killed_twice_while_collecting_equals_uninterrupted_bit_for_bit(runs):
    a, b = (weights(runs / name / "run", 9) for name in ("whole", "broken"))
    verdicts = same_state(a, b)
    assert all(verdicts.values()), verdicts
    assert set(a["parts"]) == {"best_of"}
    for part in (
        "experience",
        "anchor",
        "q_target",
        "v",
        "world",
        "q_optimizer",
        "value",
        "value_optimizer",
    ):
        assert part in a["kept"]
    assert "q" not in a["kept"], "the critic is the part's alone"
    left, right = (metrics(runs / name / "run") for name in ("whole", "broken"))
    differ = [
        (x["iteration"], {k for k in x.keys() | y.keys() if x.get(k) != y.get(k)})
        for x, y in zip(left, right, strict=True)
    ]
    assert left == right, [each for each in differ if each[1]]


def test_no_episode_that_was_over_is_played_again_and_none_is_missing(runs):
    begun, over = played(runs / "whole")
    assert begun == over
    assert sum(over.values()) == sum(COLLECTIONS.values())
    assert {reset_seed(0, i, g) for i, groups in ((3, 11), (7, 7)) for g in range(groups)} <= set(
        over
    )
    again, once = played(runs / "broken")
    assert once == over, "every episode was over as often as in one piece"
    twice = again - begun
    for iteration in (3, 8):
        going = {reset_seed(0, iteration, g) for g in range(5)} & set(twice)
        assert 1 <= len(going) <= 2, "only what was going on when it was killed begins again"
        twice -= Counter(going)
    assert not twice


def test_a_restart_says_how_many_episodes_it_found_and_what_it_plays_again(runs):
    told = re.findall(
        r"iteration (\d+): (\d+) of (\d+) episodes were on disk already .*; the other (\d+) are"
        r" played, those in flight again from their beginning",
        (runs / "said.txt").read_text(),
    )
    assert [(int(i), int(asked)) for i, _, asked, _ in told] == [(3, 11), (8, 7)]
    for iteration, known, asked, left in told:
        assert int(known) + int(left) == int(asked)
        begun = {reset_seed(0, int(iteration), g) for g in range(5)}
        again = begun & set(played(runs / "broken")[0] - played(runs / "whole")[0])
        # the fifth was never begun: the process died in its place
        assert int(known) == len(begun) - 1 - len(again)


def test_what_the_robot_did_is_counted_once(runs):
    a, b = (weights(runs / name / "run", 9)["kept"]["spent"] for name in ("whole", "broken"))
    for counter in ("iteration", "env_steps", "env_decisions", "evaluations"):
        assert a[counter] == b[counter], counter
    assert a["env_steps"] > a["env_decisions"] > 4 * 7


def test_only_what_is_still_learned_from_stays_on_disk(runs):
    """The offline collection for as long as the run lives;
    of the others those after the oldest checkpoint.
    """
    for name in ("whole", "broken"):
        kept = sorted(int(path.name) for path in (runs / name / "run/episodes").iterdir())
        assert kept == [3, 9]
        assert len(list((runs / name / "run/episodes/3").glob("*.pt"))) == 11


def test_stopped_at_every_boundary_equals_uninterrupted_bit_for_bit(tmp_path, runs):
    """Course, anchor, critics, experience and the stage's own optimiser are what they were."""
    path = write(tmp_path / "broken", budget={"iterations": BOUNDARIES[0]})
    resumed = tmp_path / "broken/run/config.yaml"
    for here, following in zip(BOUNDARIES, [*BOUNDARIES[1:], 9], strict=True):
        train(path)
        state = weights(tmp_path / "broken/run", here)
        assert state["stages"] == {"at": BOUNDARIES.index(here) + 1, "done": 0}
        assert state["optimizer"]["updates"] == 0, "a stage begins with a fresh optimiser"
        assert state["kept"]["experience"]["iterations"] == ([] if here < 3 else [3])
        resumed.write_text(
            resumed.read_text().replace(
                f"iterations: {here}\n  nfe", f"iterations: {following}\n  nfe"
            )
        )
        path = resumed
    train(path)
    a, b = weights(runs / "whole/run", 9), weights(tmp_path / "broken/run", 9)
    a["kept"].pop("deployment"), b["kept"].pop("deployment")  # every stop was examined
    verdicts = same_state(a, b)
    assert all(verdicts.values()), verdicts


@pytest.mark.parametrize("part", ["anchor", "q", "stages"])
def test_control_what_is_not_resumed_makes_another_run(tmp_path, runs, part):
    """Iteration 5 is the first candidate:
    without one of these the next is another, or another stage.
    """
    train(write(tmp_path / "broken", budget={"iterations": 5}))
    file = tmp_path / "broken/run/checkpoints/5/state.pt"
    state = torch.load(file, weights_only=True)
    if part == "anchor":
        held = state["kept"]["anchor"]["weights"]
        held["values"] = [v + 0.1 for v in held["values"]]
    elif part == "q":
        critic = state["parts"]["best_of"]
        state["parts"]["best_of"] = {n: v.roll(1, -1) for n, v in critic.items()}
    else:
        state["stages"]["done"] = 0
    torch.save(state, file)
    resumed = tmp_path / "broken/run/config.yaml"
    resumed.write_text(resumed.read_text().replace("iterations: 5\n  nfe", "iterations: 9\n  nfe"))
    train(resumed)
    a, b = weights(runs / "whole/run", 9), weights(tmp_path / "broken/run", 9)
    gains = [
        {
            row["iteration"]: row["gate/gain"]
            for row in metrics_file.read(folder / "run")
            if "gate/gain" in row
        }
        for folder in (runs / "whole", tmp_path / "broken")
    ]  # a candidate may be refused: its weights are then gone
    assert gains[0] != gains[1] or a["stages"] != b["stages"]


# -- the critic that the policy is saved with ------------------------------------------------------


def offline(folder, **sections):
    """A run of the offline stage alone: criticise 1, improve 2 and 3."""
    folder.mkdir()
    method = {"stage": "offline", "offline": {"episodes": 0, **sections.pop("offline", {})}}
    raw = experiment(folder, method=method, **sections)
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_a_finished_run_that_is_trained_again_keeps_its_critic(tmp_path):
    folder = train(offline(tmp_path / "it")).folder
    assert genpolicy.load(folder).parts.keys() == {"best_of"}, "control: it had one"
    train(folder / "config.yaml")
    assert genpolicy.load(folder).parts.keys() == {"best_of"}


def test_a_run_from_a_policy_whose_critic_is_another_resumes(tmp_path):
    """A policy that was saved with a critic of two members goes on with one of four."""
    saved = train(offline(tmp_path / "two")).folder / "policy"
    policy, four = {"name": "mlp", "pretrained": str(saved)}, {"members": 4}
    whole = train(offline(tmp_path / "whole", policy=policy, offline=four)).folder
    broken = offline(tmp_path / "broken", policy=policy, offline=four, budget={"iterations": 2})
    folder = train(broken).folder
    resumed = folder / "config.yaml"
    resumed.write_text(resumed.read_text().replace("iterations: 2\n  nfe", "iterations: 9\n  nfe"))
    train(resumed)
    a, b = weights(whole, 3), weights(folder, 3)
    assert a["parts"]["best_of"]["weights.0"].shape[0] == 4
    assert same_state(a["parts"], b["parts"])["best_of"]
    assert largest_difference(a["parameters"], b["parameters"]) == 0

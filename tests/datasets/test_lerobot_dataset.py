"""Reading equals LeRobot's own reader at every frame, with its padding; unreadable data is said."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from genpolicy.config import errors, leaves
from genpolicy.config.origin import PERSON
from genpolicy.datasets import lerobot_dataset
from genpolicy.datasets._lerobot_import import quiet
from genpolicy.datasets.lerobot_dataset import STATISTICS, LeRobotDataset

with quiet():
    from lerobot.datasets.lerobot_dataset import LeRobotDataset as Theirs

ROOT = Path(__file__).parents[2]
STATE, GRID, CAMERA = "observation.state", "observation.grid", "observation.images.top"
LENGTHS, SUCCESSES = (5, 9, 7, 6), (True, False, True, True)
FEATURES = {
    STATE: {"dtype": "float32", "shape": (3,), "names": None},
    GRID: {"dtype": "float32", "shape": (2, 2), "names": None},
    CAMERA: {"dtype": "image", "shape": (4, 6, 3), "names": ["height", "width", "channels"]},
    "action": {"dtype": "float32", "shape": (2,), "names": None},
    "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
    "next.success": {"dtype": "bool", "shape": (1,), "names": None},
}
HISTORY, OFFSETS = 3, range(-1, 5)


def record(root: Path, features=FEATURES, lengths=LENGTHS, finalize: bool = True) -> Theirs:
    """Random episodes, through LeRobot alone."""
    draw = np.random.default_rng(0)
    theirs = Theirs.create("local/x", fps=10, root=root, features=dict(features), use_videos=False)
    for episode, length in enumerate(lengths):
        for h in range(length):
            frame = {
                n: draw.standard_normal(f["shape"], np.float32)
                for n, f in features.items()
                if n != CAMERA
            }
            if CAMERA in features:
                frame[CAMERA] = draw.integers(0, 256, (4, 6, 3), np.uint8)
            if "next.success" in features:
                frame["next.success"] = np.array([SUCCESSES[episode] and h == length - 1])
            theirs.add_frame({**frame, "task": f"do {episode % 2}"})
        theirs.save_episode()
    if finalize:
        theirs.finalize()
    return theirs


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "set"
    record(root)
    return root


@pytest.mark.parametrize("kept", [0, 2**30])
@pytest.mark.parametrize("episodes", [None, [3, 1]])
def test_every_row_equals_lerobots(root: Path, episodes: list[int] | None, kept: int, monkeypatch):
    monkeypatch.setattr(lerobot_dataset, "KEPT", kept)
    past = [j / 10 for j in range(1 - HISTORY, 1)]
    deltas = {STATE: past, GRID: past, CAMERA: past, "action": [j / 10 for j in OFFSETS]}
    with quiet():
        theirs = Theirs("local/x", root=root, episodes=episodes, delta_timestamps=deltas)
    ours = LeRobotDataset(str(root), episodes=episodes)
    assert len(ours) == len(theirs) == sum(LENGTHS[e] for e in episodes or range(4))
    context, actions, pad = ours.rows(torch.arange(len(ours)), HISTORY, OFFSETS)
    for f in range(len(theirs)):
        item = theirs[f]
        assert context.prompts[f] == item["task"]
        for name in (STATE, GRID, CAMERA):
            assert torch.equal(context.observation[name][f], item[name])
        assert torch.equal(actions[f], item["action"])
        assert torch.equal(pad[f], item["action_is_pad"])
        assert int(ours.episode[f]) == item["episode_index"]
        assert ours.columns["next.reward"][f, 0] == item["next.reward"]
    assert context.observation[CAMERA].shape == (len(ours), HISTORY, 3, 4, 6)
    assert {name: ours.shapes[name] for name in (STATE, GRID, CAMERA, "action")} == {
        STATE: (3,),
        GRID: (2, 2),
        CAMERA: (3, 4, 6),
        "action": (2,),
    }


@pytest.mark.parametrize(("kept", "times"), [(0, 2), (2**30, 1)])
def test_pictures_that_fit_are_decoded_once(root: Path, monkeypatch, kept: int, times: int):
    monkeypatch.setattr(lerobot_dataset, "KEPT", kept)
    ours, asked = LeRobotDataset(str(root), episodes=[1]), []
    theirs = ours._theirs
    monkeypatch.setattr(
        ours,
        "_theirs",
        type("Counted", (), {"__getitem__": lambda _, f: asked.append(f) or theirs[f]})(),
    )
    every = [ours.rows(torch.arange(9), 2, range(1))[0].observation[CAMERA] for _ in range(2)]
    assert torch.equal(*every)
    assert len(asked) == 9 * times


def test_reading_over_a_border_would_be_wrong(root: Path):
    """The negative control of the test above: neighbours in the table are not the episode's."""
    ours = LeRobotDataset(str(root))
    border = torch.tensor([LENGTHS[0]])  # the first frame of the second episode
    context, _, pad = ours.rows(border, 2, range(-1, 1))
    naive = ours.columns[STATE][border[:, None] + torch.arange(-1, 1)]
    assert not torch.equal(context.observation[STATE], naive)
    assert torch.equal(context.observation[STATE][:, 0], context.observation[STATE][:, 1])
    assert pad.tolist() == [[True, False]]


def test_statistics_are_of_the_selected_episodes(root: Path):
    theirs = json.loads((root / "meta" / "stats.json").read_text())
    ours, some = LeRobotDataset(str(root)).stats, LeRobotDataset(str(root), episodes=[1, 2])
    assert all(set(stats) == set(STATISTICS) for stats in ours.values())
    for name in (STATE, "action", CAMERA):  # of a matrix, LeRobot's are of its columns
        for kind in (
            "min",
            "max",
            "mean",
            "std",
        ):  # LeRobot's quantiles are averages over the episodes
            torch.testing.assert_close(
                ours[name][kind], torch.tensor(theirs[name][kind]), rtol=1e-5, atol=1e-5
            )
        for kind in ("mean", "std"):
            assert not torch.equal(some.stats[name][kind], ours[name][kind])
    assert ours[GRID]["mean"].shape == (2, 2)
    own = LeRobotDataset(str(root)).columns["action"][LENGTHS[0] : sum(LENGTHS[:3])]
    torch.testing.assert_close(some.stats["action"]["mean"], own.mean(0))
    torch.testing.assert_close(some.stats["action"]["q99"], own.quantile(0.99, dim=0))


def test_choice_of_episodes(root: Path):
    def chosen(**settings) -> list[int]:
        return LeRobotDataset(str(root), **settings).episode.unique().tolist()

    assert chosen() == [0, 1, 2, 3]
    assert chosen(episodes=2) == [0, 1]
    assert chosen(episodes=2, success_only=True) == [0, 2]
    assert chosen(episodes=[3, 1], success_only=True) == [3]


def test_a_single_number_is_a_vector_of_one(tmp_path: Path):
    record(tmp_path / "set", {"action": {"dtype": "float32", "shape": (1,), "names": None}}, (4,))
    ours = LeRobotDataset(str(tmp_path / "set"))
    assert ours.shapes == {"action": (1,)}
    assert ours.rows(torch.tensor([0, 3]), 1, range(2))[1].shape == (2, 2, 1)


def test_vectors_are_read_fast_and_without_lerobot(tmp_path: Path):
    vectors = {name: FEATURES[name] for name in (STATE, "action", "next.reward")}
    record(tmp_path / "set", vectors, (100,) * 4)
    code = (
        "import sys, time, torch, pandas, pyarrow.parquet\n"
        "from genpolicy.datasets.lerobot_dataset import LeRobotDataset\n"
        "begun = time.process_time()\n"
        f"data = LeRobotDataset({str(tmp_path / 'set')!r})\n"
        "data.rows(torch.arange(400), 2, range(8))\n"
        "print(time.process_time() - begun, 'lerobot' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    seconds, lerobot = done.stdout.split()
    assert float(seconds) < 0.5
    assert lerobot == "False"


def sentence(**settings) -> str:
    with pytest.raises(errors.ConfigError) as caught:
        leaves.make("datasets", {"name": "lerobot_dataset", **settings}, PERSON)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_was_not_finalised_is_refused(tmp_path: Path):
    writing = record(tmp_path / "live", lengths=(3,), finalize=False)
    shutil.copytree(
        tmp_path / "live", tmp_path / "killed"
    )  # what a killed recording leaves on the disk
    writing.finalize()
    assert "finalize()" in sentence(root=str(tmp_path / "killed"))
    assert len(LeRobotDataset(str(tmp_path / "live"))) == 3


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "needs root"),
        ({"root": "nowhere"}, "nowhere does not exist"),
        ({"root": "."}, "meta/info.json"),
        ({"repo_id": "nobody/nothing"}, "nobody/nothing can't be read from the hub"),
        ({"episodes": 5}, "has 4 to choose from"),
        ({"episodes": [4]}, "episodes 0 to 3"),
        ({"episodes": [1], "success_only": True}, "no episode is left"),
        ({"episodes": "many"}, "a whole number or"),
    ],
)
def test_bad_settings_get_one_sentence(root: Path, monkeypatch, settings: dict, says: str):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    there = (
        {} if not settings or "root" in settings or "repo_id" in settings else {"root": str(root)}
    )
    assert says in sentence(**there, **settings)


def edited(root: Path, tmp_path: Path, **changes) -> str:
    """A copy of the data set with other keys in its info.json."""
    folder = tmp_path / "edited"
    shutil.copytree(root, folder)
    file = folder / "meta" / "info.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return str(folder)


def test_bad_data_sets_get_one_sentence(root: Path, tmp_path: Path):
    info = json.loads((root / "meta" / "info.json").read_text())
    assert "convert" in sentence(root=edited(root, tmp_path / "old", codebase_version="v2.1"))
    assert "incomplete" in sentence(root=edited(root, tmp_path / "short", total_frames=100))
    without = {name: feature for name, feature in info["features"].items() if name != "action"}
    says = sentence(root=edited(root, tmp_path / "still", features=without))
    assert "no feature 'action'" in says
    assert STATE in says
    renamed = {**info["features"], "observation.missing": info["features"][STATE]}
    assert "lacks observation.missing" in sentence(
        root=edited(root, tmp_path / "hole", features=renamed)
    )
    blind = {**info["features"], "observation.images.side": info["features"][CAMERA]}
    assert "stats/observation.images.side" in sentence(
        root=edited(root, tmp_path / "blind", features=blind)
    )
    (tmp_path / "cut" / "meta").mkdir(parents=True)
    (tmp_path / "cut" / "meta" / "info.json").write_text("{")
    assert "damaged" in sentence(root=str(tmp_path / "cut"))

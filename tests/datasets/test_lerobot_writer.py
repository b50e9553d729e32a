"""A recording is there whole or not at all, and LeRobot reads it."""

from pathlib import Path

import pytest
import torch

from genpolicy.config.errors import RenderError
from genpolicy.config.seal import unsealed
from genpolicy.datasets._lerobot_import import quiet
from genpolicy.datasets.lerobot_dataset import LeRobotDataset
from genpolicy.tasks.metaworld import MetaWorld
from tests.datasets.cart import CAMERA, STATE, Cart


def made_of(folder: Path) -> dict:
    """What a data set says about its making; its checksums are those of all its other files."""
    said = unsealed((folder / "meta" / "genpolicy.json").read_text())
    files = said.pop("files")
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(files) == there - {"meta/genpolicy.json"}
    return said


def test_lerobot_reads_what_was_written(tmp_path: Path, capfd):
    task = Cart(camera=True)
    episodes = [task.demonstrate(seed, 0.02) for seed in range(2)]
    made = {"seed": 0}
    with LeRobotDataset.recording(tmp_path / "set", task, made) as keep:
        for episode in episodes:
            keep(episode)
        made["tried"] = 3
    with quiet():
        from lerobot.datasets.lerobot_dataset import LeRobotDataset as Theirs

        theirs = Theirs("local/set", root=tmp_path / "set")
        items = [theirs[f] for f in range(len(theirs))]
    actions = torch.cat([episode.actions for episode in episodes])
    assert torch.equal(torch.stack([item["action"] for item in items]), actions[:, 0])
    states = torch.cat([episode.observation[STATE] for episode in episodes])
    assert torch.equal(torch.stack([item[STATE] for item in items]), states)
    pictures = torch.cat([episode.observation[CAMERA] for episode in episodes])
    read = torch.stack([item[CAMERA] for item in items])
    assert (
        read - pictures.clamp(max=1)
    ).abs().max() <= 0.5 / 255 + 1e-6  # rounding down would miss by up to 1 / 255
    ends = torch.tensor([len(episode.actions) for episode in episodes]).cumsum(0) - 1
    assert (
        torch.stack([item["next.success"] for item in items]).nonzero()[:, 0].tolist()
        == ends.tolist()
    )
    assert {item["task"] for item in items} == {task.instruction}
    assert theirs.fps == task.fps
    assert made_of(tmp_path / "set") == {
        "seed": 0,
        "tried": 3,
    }
    ours = LeRobotDataset(str(tmp_path / "set"), success_only=True)
    assert torch.equal(
        ours.columns["next.reward"][:, 0], torch.cat([episode.rewards for episode in episodes])
    )
    assert "torchcodec" not in (said := "".join(capfd.readouterr()))
    assert "examples/s" not in said


@pytest.mark.parametrize(
    ("see", "name"), [("pixels", "observation.images.top"), ("points", "observation.points")]
)
def test_what_a_robot_saw_is_read_as_it_was(tmp_path: Path, see: str, name: str):
    """Pictures to the byte, clouds to the bit."""
    task = MetaWorld("button-press-topdown-v3", see=see)  # type: ignore[arg-type]
    try:
        episode = task.demonstrate(0, 0.1)
    except RenderError:
        return  # this machine has no way to draw
    with LeRobotDataset.recording(tmp_path / "set", task, {}) as keep:
        keep(episode)
    ours = LeRobotDataset(str(tmp_path / "set"))
    assert {n: shape for n, shape in ours.shapes.items() if n != "action"} == task.shapes
    read = ours.rows(torch.arange(len(ours)), 1, range(1))[0].observation
    for each in task.shapes:
        assert torch.equal(read[each][:, 0], episode.observation[each])
    assert episode.observation[name].std() > 0.05
    assert episode.observation[name].flatten(1).unique(dim=0).shape[0] > 10


def test_an_interrupted_recording_leaves_nothing(tmp_path: Path):
    task = Cart()

    def interrupted():
        with LeRobotDataset.recording(tmp_path / "set", task, {}) as keep:
            keep(task.demonstrate(0, 0.0))
            assert any(tmp_path.iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not any(tmp_path.iterdir())


def test_an_existing_folder_is_refused(tmp_path: Path):
    with (
        pytest.raises(FileExistsError, match="exists already"),
        LeRobotDataset.recording(tmp_path, Cart(), {}),
    ):
        pass
    assert tmp_path.is_dir()

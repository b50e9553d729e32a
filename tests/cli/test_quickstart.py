"""The quickstart's verb on a fraction of its work: what it says, writes and goes on from."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from genpolicy.cli import quickstart_pictures, quickstart_robot
from genpolicy.cli.main import main
from genpolicy.config import shipped

torch.set_num_threads(1)


@pytest.fixture
def small(tmp_path: Path, monkeypatch) -> Path:
    """The shipped configuration with one small iteration,
    and one picture of each held-out caption.
    """
    raw = yaml.safe_load(shipped.configs()["quickstart"].read_text())
    raw["method"] |= {"groups": 2, "group": 2}
    raw |= {"budget": {"iterations": 1}, "optimizer": {"lr": 1e-3}}
    raw["eval"] |= {"samples": 4, "every": 0}
    (tmp_path / "quickstart.yaml").write_text(yaml.safe_dump(raw))
    monkeypatch.setattr(quickstart_pictures, "CONFIG", str(tmp_path / "quickstart.yaml"))
    monkeypatch.setattr(quickstart_pictures, "PER_CAPTION", 2)
    return tmp_path


def test_quickstart(small: Path, capsys):
    out = small / "out" / "pictures"
    start = ["quickstart", "--world", "pictures", "--out", str(out.parent)]
    assert main(start) == 0
    text = capsys.readouterr().out
    assert "no picture of the 88 captions" in text
    assert "1 iterations of 4 pictures" in text
    assert "176 pictures of 88 held-out captions" in text
    assert all(str(out / "figures" / name) in text for name in ("before_after.png", "curves.png"))
    found = json.loads((out / "quickstart.json").read_text())
    assert found["n"] == 176
    assert 0.2 < found["before"]["value"] < 0.7
    low, high = found["difference"]["ci95"]
    assert low <= found["difference"]["value"] <= high
    assert found["difference"]["value"] == pytest.approx(
        found["after"]["value"] - found["before"]["value"]
    )
    assert found["before"]["diversity"] > 0
    assert min(Image.open(out / "figures" / "before_after.png").size) > 300
    capsys.readouterr()

    assert main(start) == 0  # again: goes on, finds nothing to do, measures the same
    assert "Going on with the run" in capsys.readouterr().out
    assert json.loads((out / "quickstart.json").read_text()) == found

    assert main([*start, "--seed", "1"]) == 2
    assert "choose another --out" in capsys.readouterr().err


def test_the_final_noise_is_fresh():
    """Neither training (iterations from 1) nor its evaluations (their own seed) draw from it,
    for any seed in use.
    """
    config = yaml.safe_load(shipped.configs()["quickstart"].read_text())
    assert "seed" not in config["eval"]
    assert not set(range(1000)) & {
        quickstart_pictures.FRESH + seed - 1_000_003 for seed in range(1000)
    }
    assert quickstart_pictures.PER_CAPTION * 88 >= 512


@pytest.fixture
def small_robot(tmp_path: Path, monkeypatch) -> Path:
    """The robot's half with two iterations of two short episodes."""
    raw = yaml.safe_load(shipped.configs()["quickstart_robot"].read_text())
    raw["method"] |= {"episodes": 2, "epochs": 1, "warm_up": 0}
    raw |= {"budget": {"iterations": 2}, "environments": 2}
    raw["task"]["limit"] = 12
    raw["eval"] |= {"episodes": 2, "every": 0}
    (tmp_path / "quickstart_robot.yaml").write_text(yaml.safe_dump(raw))
    monkeypatch.setattr(quickstart_robot, "CONFIG", str(tmp_path / "quickstart_robot.yaml"))
    monkeypatch.setattr(quickstart_robot, "EPISODES", 4)
    return tmp_path


def test_robot_half(small_robot: Path, capsys):
    out = small_robot / "out" / "robot"
    start = ["quickstart", "--world", "robot", "--out", str(out.parent)]
    assert main(start) == 0
    text = capsys.readouterr().out
    assert "2 iterations of about" in text
    assert "Success in 4 episodes" in text
    found = json.loads((out / "quickstart.json").read_text())
    assert found["n"] == 4
    assert found["difference"]["value"] == pytest.approx(
        found["after"]["value"] - found["as cloned"]["value"]
    )
    assert main(start) == 0
    assert "Going on with the run" in capsys.readouterr().out
    assert json.loads((out / "quickstart.json").read_text()) == found


def test_the_robots_final_starts_are_fresh():
    """No seed in use meets the starts of the runs' evaluations, of the demonstrations,
    or of another seed's.
    """
    first = {quickstart_robot.FRESH_STARTS + 1000 * seed for seed in range(1000)}
    assert min(first) > 1_000_003 + 10_000
    assert quickstart_robot.EPISODES <= 1000

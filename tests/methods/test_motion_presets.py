"""Every preset of the motion world takes one iteration on the embedded video model."""

from pathlib import Path

import datasets
import pytest

from genpolicy.cli.main import main
from genpolicy.config import parse, shipped
from genpolicy.training.experiment import train

SMALL = {
    "flow_grpo": {"groups": 2, "group": 2, "updates": 1},
    "grpo_guard": {"groups": 2, "group": 2, "updates": 1},
    "diffusion_nft": {"groups": 2, "group": 2, "updates": 1, "times": 1},
    "b2_diffurl": {"groups": 2, "group": 2, "updates": 1},
    "find": {"groups": 2, "group": 4, "minibatch": 8},
    "seppo": {"samples": 2, "updates": 1},
    "diffusion_dpo": {"groups": 2, "group": 4, "updates": 1, "epochs": 1, "renew": 1},
}
"""Settings of each method that make its iteration a small one."""


def small(name: str, folder: Path) -> dict:
    """A preset with a small iteration, in a folder."""
    raw = parse.read_yaml(f"motion_{name}")
    raw["method"] |= SMALL[name]
    raw["budget"] = {"iterations": 1}
    raw["eval"] |= {"every": 0, "samples": 2}
    raw["output"] = str(folder / "run")
    return raw


def test_every_preset_is_tried_here():
    shipped_presets = {name for name in shipped.configs() if name.startswith("motion_")}
    assert {f"motion_{name}" for name in SMALL} == shipped_presets


@pytest.mark.parametrize("name", sorted(set(SMALL) - {"seppo"}))
def test_a_preset_takes_one_iteration(name: str, tmp_path: Path):
    result = train(parse.parse(small(name, tmp_path)))
    assert result.summary["iterations"] == 1
    assert (tmp_path / "run" / "samples" / "1" / "grid.gif").is_file()


def test_seppo_learns_from_the_videos_that_the_model_drew(tmp_path: Path, monkeypatch):
    """The pairs are drawn as the preset's first lines say."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    asked = ["--prompts", "assets/motion-wan/captions_train.txt", "--reward", "motion_dense"]
    few = ["--groups", "2", "--members", "4", "--steps", "8"]
    pairs = str(tmp_path / "pairs")
    assert main(["pairs", "assets/motion-wan", "--out", pairs, *asked, *few]) == 0
    raw = small("seppo", tmp_path)
    raw["data"]["root"] = pairs
    result = train(parse.parse(raw))
    assert result.summary["iterations"] == 1

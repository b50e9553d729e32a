"""Every preset of the motion world takes one iteration on an untrained video model of its kind."""

import sys
from pathlib import Path

import datasets
import pytest

from genpolicy.cli.main import main
from genpolicy.config import parse, shipped
from genpolicy.training.experiment import train

ASSETS = Path(__file__).parents[2] / "assets"
SMALL = {
    "flow_grpo": {"groups": 2, "group": 2, "updates": 1},
    "grpo_guard": {"groups": 2, "group": 2, "updates": 1},
    "diffusion_nft": {"groups": 2, "group": 2, "updates": 1, "times": 1},
    "b2_diffurl": {"groups": 2, "group": 2, "updates": 1},
    "find": {"groups": 2, "group": 2, "minibatch": 4},
    "seppo": {"samples": 2, "updates": 1},
    "diffusion_dpo": {"groups": 2, "group": 2, "updates": 1, "epochs": 1, "renew": 1},
}
"""Settings of each method that make its iteration a small one."""
TELLS_APART = "tests.toy:brightness"
"""A reward under which no two videos of an untrained model are alike."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What assets/make_motion_model.py writes, before its training."""
    sys.path.insert(0, str(ASSETS))
    try:
        import make_motion_model
    finally:
        sys.path.remove(str(ASSETS))
    folder = tmp_path_factory.mktemp("model")
    make_motion_model.write(make_motion_model.new_pipeline(), folder)
    return folder


def small(name: str, model: Path, folder: Path) -> dict:
    """A preset with a small iteration on a model, in a folder."""
    raw = parse.read_yaml(f"motion_{name}")
    raw["policy"]["pretrained"] = str(model)
    raw["task"]["prompts"] = raw["eval"]["prompts"] = str(model / "captions_train.txt")
    raw["reward"][TELLS_APART] = 1.0
    raw["method"] |= SMALL[name]
    raw["budget"] = {"iterations": 1}
    raw["eval"] |= {"every": 0, "samples": 2}
    raw["output"] = str(folder / "run")
    return raw


def test_every_preset_is_tried_here():
    presets = {name for name in shipped.configs() if name.startswith("motion_")}
    assert {f"motion_{name}" for name in SMALL} == presets


@pytest.mark.parametrize("name", sorted(set(SMALL) - {"seppo"}))
def test_a_preset_takes_one_iteration(name: str, model: Path, tmp_path: Path):
    result = train(parse.parse(small(name, model, tmp_path)))
    assert result.summary["iterations"] == 1
    assert (tmp_path / "run" / "samples" / "1" / "grid.gif").is_file()


def test_seppo_learns_from_the_videos_that_the_model_drew(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The pairs are drawn as the preset's first lines say, and read in its data section."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    raw = small("seppo", model, tmp_path)
    raw["data"]["root"] = str(tmp_path / "pairs")
    asked = ["--prompts", raw["task"]["prompts"], "--reward", TELLS_APART]
    few = ["--groups", "2", "--members", "2", "--steps", "8"]
    assert main(["pairs", str(model), "--out", raw["data"]["root"], *asked, *few]) == 0
    assert train(parse.parse(raw)).summary["iterations"] == 1

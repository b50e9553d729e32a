"""Every debug YAML runs through the CLI, and its policy can be drawn from."""

import json
from pathlib import Path

import pytest
import torch

from genpolicy.cli.main import main
from genpolicy.config import shipped

torch.set_num_threads(1)


DEBUG = sorted(name for name in shipped.configs() if name.startswith("debug/"))
ROBOTS = [name for name in DEBUG if "metaworld" in name]


@pytest.mark.parametrize("name", ROBOTS)
def test_debug_config_trains_and_acts(tmp_path: Path, name: str):
    run = tmp_path / "run"
    assert main(["train", name, f"--output={run}"]) == 0
    assert json.loads((run / "summary.json").read_text())["env_steps"] > 0
    assert main(["evaluate", str(run), "--episodes", "2", "--gifs", "0"]) == 0
    assert json.loads((run / "eval.json").read_text())["n"] == 2


@pytest.mark.parametrize("name", sorted(set(DEBUG) - set(ROBOTS)))
def test_debug_config_trains_and_draws(tmp_path: Path, name: str):
    run = tmp_path / "run"
    assert main(["train", name, f"--output={run}"]) == 0
    assert json.loads((run / "summary.json").read_text())["iterations"] == 2
    text = "a red circle left of a blue square"
    assert (
        main(["sample", str(run), "--prompts", text, "--out", str(tmp_path / "out"), "--n", "2"])
        == 0
    )
    assert (tmp_path / "out" / "000_01.png").is_file()

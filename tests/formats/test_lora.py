"""The exported LoRA is the policy's own, and what has none is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from genpolicy.cli.main import main
from genpolicy.config.schema import ChainConfig
from genpolicy.models._diffusers_lora import WEIGHTS
from genpolicy.models.diffusers_pipeline import DiffusersPipeline
from genpolicy.policy.files import save_policy
from genpolicy.policy.sampler import make_policy
from tests import tiny


def test_the_lora_is_written_alone_and_loads_in_diffusers(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    tiny.build("sd15").save_pretrained(tmp_path / "base")
    section = {"name": "diffusers_pipeline", "pretrained": str(tmp_path / "base"), "device": "cpu"}
    section |= {"call": tiny.CALL["sd15"], "lora": {"rank": 2, "alpha": 4}}
    model = DiffusersPipeline(**{k: v for k, v in section.items() if k != "name"})
    sampler = ChainConfig(steps=2, kernel={"name": "ddim", "eta": 0.0})
    save_policy(make_policy(model, sampler), section, sampler, tmp_path / "policy")
    words = ["export", str(tmp_path / "policy"), "--format", "lora", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    assert main(words) == 2  # it may be somebody's own
    assert [file.name for file in (tmp_path / "out").iterdir()] == [WEIGHTS]
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("policy", "out"))
    assert all(torch.allclose(ours[key], theirs[key]) for key in ours)
    tiny.build("sd15").load_lora_weights(tmp_path / "out", weight_name=WEIGHTS)


def test_a_policy_without_a_lora_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", "assets/assembly-clone", "--format", "lora", "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "has no LoRA" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

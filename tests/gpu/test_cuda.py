"""Tests that need a CUDA device."""

import pytest
import torch

from genpolicy.config import parse
from genpolicy.training.experiment import train
from tests import tiny
from tests.models.test_lora_run import lines, raw

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_on_the_device_replays_and_reports_its_memory(tmp_path, precision):
    tiny.sd3().save_pretrained(tmp_path / "sd3")
    experiment = raw(tmp_path / "sd3", tmp_path / "work")
    experiment["policy"] |= {"precision": precision, "device": "cuda"}
    result = train(parse.parse(experiment))
    assert result.summary["replay_gap"] < 1e-4
    assert lines(result)[-1]["memory/peak_gb"] > 0


def test_running_out_of_memory_halves_the_micro_batch_and_leaves_the_update_alone(tmp_path):
    tiny.sd3().save_pretrained(tmp_path / "sd3")
    weights = []
    for name, limit in (("whole", 1.0), ("tight", 0.01)):
        experiment = raw(
            tmp_path / "sd3",
            tmp_path / name,
            method={"name": "flow_grpo", "groups": 2, "group": 128, "updates": 1},
        )
        experiment["policy"] |= {"device": "cuda"}
        torch.cuda.set_per_process_memory_fraction(limit)
        try:
            folder = train(parse.parse(experiment)).folder
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        weights.append(
            torch.load(folder / "checkpoints/3/state.pt", weights_only=True)["parameters"]
        )
    assert max(float((a - b).abs().max()) for a, b in zip(*weights, strict=True)) < 1e-4

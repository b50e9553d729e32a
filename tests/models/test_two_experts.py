"""Wan 2.2: of its two experts the one of the noisier times learns, and the other is frozen."""

from pathlib import Path

import pytest
import torch

from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.contracts.task import Context
from genpolicy.models.diffusers_pipeline import DiffusersPipeline
from genpolicy.models.toy import Toy
from genpolicy.training.experiment import train
from genpolicy.training.requirements import expert_remark
from tests import tiny
from tests.models.test_lora_run import raw

BOUNDARY = 0.9


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wan22")
    second = tiny.wan_transformer().requires_grad_(False).eval()
    tiny.wan(boundary_ratio=BOUNDARY, transformer_2=second).save_pretrained(folder)
    return folder


def experiment(pipeline: Path, folder: Path, **sections) -> dict:
    made = raw(pipeline, folder, reward={"tests.toy:brightness": 1.0}, **sections)
    made["policy"]["call"] = tiny.CALL["wan"]
    made["budget"] = {"iterations": 1}
    return made


def test_a_window_in_which_the_second_expert_denoises_is_refused(pipeline, tmp_path):
    """The default window is nearly the whole chain."""
    said = r"below noise time 0.9 a second network .* step 2 .* is at 0.833: end .* \[0, 2\]"
    with pytest.raises(ConfigError, match=said):
        train(parse.parse(experiment(pipeline, tmp_path)))
    assert not (tmp_path / "run").exists()
    late = {"steps": 4, "kernel": {"name": "sde", "a": 0.7}, "window": [2, 3]}
    with pytest.raises(ConfigError, match=r"begin chain.window in the noisier steps"):
        train(parse.parse(experiment(pipeline, tmp_path, chain=late)))


def test_the_window_that_the_sentence_names_trains(pipeline, tmp_path, capsys):
    """And the run says that the second expert stays as it is."""
    chain = {"steps": 4, "kernel": {"name": "sde", "a": 0.7}, "window": [0, 2]}
    result = train(parse.parse(experiment(pipeline, tmp_path, chain=chain)))
    assert result.summary["iterations"] == 1
    said = capsys.readouterr()
    assert (
        "only the one of noise times from 0.9 on learns; below, the second" in said.out + said.err
    )


def test_a_pipeline_of_one_denoiser_has_nothing_to_say():
    assert expert_remark(Toy()) is None


def test_imitation_draws_the_times_at_which_what_learns_denoises(pipeline):
    model = DiffusersPipeline(str(pipeline), call=tiny.CALL["wan"], lora={"rank": 4})
    whole = DiffusersPipeline(str(pipeline), call=tiny.CALL["wan"], lora={"rank": 4})
    whole.learns_from = 0.0
    uniform = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    times, others = model.times(uniform), whole.times(uniform)
    assert float(times.min()) >= BOUNDARY
    kept = others[others >= BOUNDARY]
    assert len(kept) < len(others), "control"
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(
        times.quantile(quantiles), kept.quantile(quantiles), rtol=1e-3, atol=0
    )
    t = times[:2]
    x, condition = torch.randn(2, *model.event_shape), model.encode(Context(["a", "a"]))
    assert model.denoise(x, t, condition).x0.requires_grad
    below = torch.full((2,), 0.5, dtype=torch.float64)
    assert not model.denoise(x, below, condition).x0.requires_grad, "control"

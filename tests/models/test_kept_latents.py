"""Latents on disk: a VAE runs once per picture, and what is looked up is what would be encoded."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from genpolicy.cli.main import main
from genpolicy.config import parse
from genpolicy.contracts.model import EncodingModel
from genpolicy.contracts.task import Context
from genpolicy.models._diffusers_vae import Vae
from genpolicy.models._kept_latents import KeptLatents
from genpolicy.models.diffusers_pipeline import DiffusersPipeline
from genpolicy.models.toy import Toy
from genpolicy.rollout.examples import examples, paired
from genpolicy.training.experiment import train
from tests import toy
from tests.methods.test_bc import captioned
from tests.models import test_diffusers_pipeline as pipelines
from tests.models.test_events import outputs


@pytest.fixture(scope="module")
def model() -> DiffusersPipeline:
    return pipelines.load("sd3")


def counted(monkeypatch: pytest.MonkeyPatch, model: DiffusersPipeline) -> list[int]:
    """The rows of every call of the VAE from now on."""
    rows: list[int] = []
    encode = model.pipeline.vae.encode

    def noted(pixels: Tensor):
        rows.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(model.pipeline.vae, "encode", noted)
    return rows


@pytest.fixture(autouse=True)
def _forgetful(model: DiffusersPipeline):
    yield
    model._vae.kept = None


class Twins:
    """Five random pairs as a data set."""

    def __init__(self) -> None:
        self.sides = outputs("sd3", 10).view(2, 5, 3, *outputs("sd3").shape[-2:])

    def __len__(self) -> int:
        return 5

    def pictures(self, index: Tensor):
        return Context([f"{row}" for row in index.tolist()]), self.sides[0, index]

    def pairs(self, index: Tensor):
        return *self.pictures(index), self.sides[1, index]


def test_the_second_epoch_runs_no_vae(tmp_path, monkeypatch, model):
    data, epoch = Twins(), torch.arange(5).split(2)
    assert isinstance(model, EncodingModel)
    assert not isinstance(Toy(), EncodingModel), "an event of the toy is no network's"
    before = [paired(data, model, index)[1:] for index in epoch]
    rows = counted(monkeypatch, model)
    for index in epoch:
        paired(data, model, index)
    assert sum(rows) == 10, "control: without keeping every epoch runs it"
    model.keep(tmp_path)
    rows.clear()
    first = [paired(data, model, index)[1:] for index in epoch]
    assert rows == [1] * 10
    rows.clear()
    second = [paired(data, model, index)[1:] for index in epoch]
    alone = examples(data, model, torch.arange(5))[1]
    assert rows == []
    for one, two, plain in zip(first, second, before, strict=True):
        for side in range(2):
            assert torch.equal(one[side], two[side])
            torch.testing.assert_close(one[side], plain[side], rtol=1e-4, atol=1e-5)
    assert torch.equal(alone, torch.cat([one[0] for one in first])), "cloning finds them too"


def test_what_is_kept_is_no_function_of_what_it_was_first_learned_beside(tmp_path, model):
    made = outputs("sd3", 6)
    model.keep(tmp_path / "together")
    together = model.event(made)
    model.keep(tmp_path / "alone")
    alone = torch.cat([model.event(made[row : row + 1]) for row in (5, 4, 3, 2, 1, 0)]).flip(0)
    assert torch.equal(together, alone)


def test_the_same_picture_twice_is_encoded_once(tmp_path, monkeypatch, model):
    made = outputs("sd3", 2)
    model.keep(tmp_path)
    rows = counted(monkeypatch, model)
    event = model.event(made[[0, 1, 0]])
    assert rows == [1, 1]
    assert torch.equal(event[0], event[2])
    assert not torch.equal(event[0], event[1])


def test_a_changed_picture_or_vae_is_encoded_anew(tmp_path, monkeypatch, model):
    made = outputs("sd3", 1)
    model.keep(tmp_path)
    event = model.event(made)
    rows = counted(monkeypatch, model)
    model.event(made)
    assert rows == [], "control: nothing has changed"
    model.event(made.index_put((torch.tensor(0),) * 4, torch.tensor(0.123)))
    assert rows == [1]
    weight = next(model.pipeline.vae.encoder.parameters())
    with torch.no_grad():
        weight[0] += 0.5
    try:
        model.keep(tmp_path)
        changed = model.event(made)
    finally:
        with torch.no_grad():
            weight[0] -= 0.5
    assert rows == [1, 1]
    assert not torch.equal(changed, event)
    with pytest.raises(ValueError, match=r"set policy\.call to their height, width"):
        model.event(torch.rand(1, 3, 2 * made.shape[-2], made.shape[-1]))


def test_another_scale_of_the_same_vae_is_another_encoder(tmp_path):
    """The scale is no weight: the pipeline's own tail has it."""
    found = set()
    for factor in (1.5, 3.0):
        one = pipelines.load("sd3")
        one.pipeline.vae.register_to_config(scaling_factor=factor)
        one.keep(tmp_path)
        found.add(one._vae.kept.encoder)
    again = pipelines.load("sd3")
    again.keep(tmp_path)
    assert len(found) == 2
    assert again._vae.kept.encoder in found, "control: the same pipeline, loaded once more"


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", ["a byte", "cut short", "empty", "no file", "another's"])
def test_a_damaged_entry_is_not_trusted_and_mended(tmp_path, monkeypatch, model, damage):
    made = outputs("sd3", 2)
    model.keep(tmp_path)
    event = model.event(made)
    first, second = entries(tmp_path)
    whole = first.read_bytes()
    if damage == "another's":
        shutil.copy(second, first)
    elif damage == "no file":
        first.unlink()
    else:
        flipped = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
        first.write_bytes({"a byte": flipped, "cut short": whole[:-5], "empty": b""}[damage])
    rows = counted(monkeypatch, model)
    assert torch.equal(model.event(made), event)
    assert rows == [1]
    assert first.read_bytes() == whole
    assert torch.equal(model.event(made), event)
    assert rows == [1]
    assert entries(tmp_path) == [first, second]


def test_a_full_disk_is_an_error_of_the_system_and_leaves_nothing(tmp_path):
    """...which the command line says in one sentence."""
    resource = pytest.importorskip("resource")  # a limit of the size of files stands for the disk
    kept = KeptLatents(tmp_path, "", (64, 64))
    made, event = torch.rand(1, 3, 8, 8), torch.rand(1, 64, 64)
    own = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, own[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            kept(made, lambda _: event)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, own)
    assert entries(tmp_path) == []
    assert torch.equal(kept(made, lambda _: event), event)  # control
    assert len(entries(tmp_path)) == 1


SHAPES = Path(__file__).parents[2] / "assets" / "shapes-sd3"


def experiment(folder: Path, updates: int, **sections) -> dict:
    """Cloning of six pictures by the shipped pipeline."""
    (folder / "pictures").mkdir(parents=True)
    lines, drawn = [], np.random.default_rng(0)
    for number in range(6):
        name = f"{number}.png"
        pixels = drawn.integers(0, 256, (32, 32, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / name)
        lines.append(json.dumps({"file_name": name, "text": f"a red circle {number}"}))
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    where = {"root": str(folder / "pictures"), "height": 32, "width": 32}
    return toy.experiment(
        folder,
        policy={"name": "diffusers_pipeline", "pretrained": str(SHAPES), "train": "full"},
        reward={"jpeg_compressibility": 1.0},
        data={"name": "captioned_pictures", **where},
        method={"name": "bc", "batch": 8, "updates": updates},
        budget={"iterations": 2},
        eval={"every": 0, "samples": 2, "select": None},
        **sections,
    )


def test_a_run_keeps_them_in_its_folder_and_its_plan_keeps_none(tmp_path, monkeypatch, capsys):
    raw = experiment(tmp_path, updates=4)
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(raw))
    before = entries(tmp_path)
    assert main(["train", str(tmp_path / "experiment.yaml"), "--plan"]) == 0
    assert entries(tmp_path) == before
    rows: list[int] = []
    encoded = Vae._encode

    def noted(self, made):
        rows.append(len(made))
        return encoded(self, made)

    monkeypatch.setattr(Vae, "_encode", noted)
    folder = train(parse.parse(raw)).folder
    assert len(entries(folder / "latents")) == 6
    assert rows == [1] * 7, "each once, and the first one before any work, to see that it fits"
    drawn = 2 * 4 * 8
    assert drawn > 10 * 6, "control: the run has drawn them many times"


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["bc/loss"] for line in lines if "bc/loss" in line]


def test_a_run_that_is_resumed_without_them_goes_on_to_the_same_numbers(tmp_path):
    whole = train(parse.parse(experiment(tmp_path / "whole", updates=1))).folder
    raw = experiment(tmp_path / "half", updates=1)
    half = train(parse.parse({**raw, "budget": {"iterations": 1}})).folder
    shutil.rmtree(half / "latents")
    train(half / "config.yaml", ["--budget.iterations=2"])
    assert len(losses(whole)) == 2
    assert losses(half) == losses(whole)


def test_a_run_on_the_toy_keeps_none(tmp_path):
    data = captioned(tmp_path / "pictures")
    raw = toy.experiment(
        tmp_path,
        data=data,
        method={"name": "bc", "batch": 8, "updates": 2},
        budget={"iterations": 1},
        eval={"every": 0, "samples": 4},
    )
    assert not (train(parse.parse(raw)).folder / "latents").exists()

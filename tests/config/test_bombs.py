"""Files that are made to be slow or to break the reader: one sentence, at once."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from genpolicy.cli.main import main
from genpolicy.config import documents, parse
from genpolicy.config.errors import ConfigError
from genpolicy.datasets.captioned_pictures import CaptionedPictures
from genpolicy.datasets.lerobot_dataset import LeRobotDataset
from genpolicy.models.diffusers_pipeline import DiffusersPipeline
from genpolicy.models.lerobot_diffusion import LeRobotDiffusion
from genpolicy.models.mlp import MLP
from genpolicy.policy.files import load, saved
from tests.toy import experiment

SECONDS = 20.0
"""CPU time within which a text is refused, imports of libraries included; a bomb takes for ever."""
DEEP = "[" * 5000 + "]" * 5000
DIGITS = "7" * 5000
ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
YAMLS = {
    "aliases": (ALIASES, "more than 100000 values"),
    "itself": ("seed: &a [*a]\n", "anchor a refers to itself"),
    "deep": (f"seed: {DEEP}\n", "more than 100 deep"),
    "aliases in a row": (
        "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 300)),
        "more than 100 deep",
    ),
    "digits": (f"seed: {DIGITS}\n", "a number of 5000 digits"),
    "hexadecimal digits": (f"seed: 0x{DIGITS}\n", "a number of 5002 digits"),
    "more than 64 bits": (f"seed: {2**64}\n", "does not fit into 64 bits"),
    "no date": ("seed: 2001-99-99\n", "month must be in 1..12"),
    "no number": ("seed: !!int words\n", "invalid literal"),
    "a class": ("seed: !!python/object/apply:os.system [true]\n", "could not determine"),
}
JSONS = {
    "deep": (DEEP, "more than 100 deep"),
    "a little deep": ("[" * 200 + "]" * 200, "more than 100 deep"),
    "digits": (DIGITS, "a number of 5000 digits"),
    "more than 64 bits": (f'{{"chain": {2**64}}}', "does not fit into 64 bits"),
}


def sentence(call: Callable[[], object]) -> str:
    """What `ConfigError` or `ValueError` says, in one short line, at once."""
    started = time.process_time()
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is what the tests look at)
        call()
    assert time.process_time() - started < SECONDS
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 800
    return said


@pytest.mark.parametrize(("text", "said"), YAMLS.values(), ids=YAMLS)
def test_a_yaml_that_is_a_bomb_is_one_sentence(tmp_path: Path, text: str, said: str):
    file = tmp_path / "bomb.yaml"
    file.write_text(text)
    found = sentence(lambda: parse.load(file))
    assert said in found
    assert str(file) in found


@pytest.mark.parametrize("bomb", [DEEP, DIGITS, "&a [*a]", str(2**64)], ids=lambda text: text[:8])
def test_an_override_that_is_a_bomb_is_one_sentence(tmp_path: Path, capsys, bomb: str):
    started = time.process_time()
    assert main(["train", "quickstart", f"--seed={bomb}", f"--output={tmp_path / 'run'}"]) == 2
    assert time.process_time() - started < SECONDS
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "override --seed: its value is not readable YAML" in error


def test_anchors_are_read_as_people_use_them(tmp_path: Path):
    """Control: merged sections, a shared list, and a large file without aliases."""
    file = tmp_path / "anchors.yaml"
    file.write_text(
        "base: &base {steps: 4, guidance: 2.0}\nchain: {<<: *base, steps: 8}\n"
        "betas: &betas [0.9, 0.95]\nother: [*betas, *betas]\n"
        f"episodes: [{', '.join(map(str, range(5000)))}]\nlargest: {2**64 - 1}\nlr: 1e-4\n"
    )
    found = parse.read_yaml(file)
    assert found["chain"] == {"steps": 8, "guidance": 2.0}
    assert found["other"] == [[0.9, 0.95]] * 2
    assert found["episodes"] == list(range(5000))
    assert (found["largest"], found["lr"]) == (2**64 - 1, 1e-4)


def test_a_long_value_is_not_repeated_whole(tmp_path: Path):
    raw = experiment(tmp_path, seed=list(range(20_000)))
    assert "seed is [0, 1, 2" in sentence(lambda: parse.parse(raw))


@pytest.mark.parametrize(("text", "said"), JSONS.values(), ids=JSONS)
def test_a_json_that_is_a_bomb_is_one_sentence(text: str, said: str):
    found = sentence(lambda: documents.json_value(text, "a file"))
    assert said in found
    assert found.startswith("a file is not readable JSON")


def _policy(folder: Path) -> object:
    return load(folder)


def _mlp(folder: Path) -> object:
    (folder / "mlp.safetensors").write_bytes(b"")
    return MLP(pretrained=str(folder))


def _lerobot(folder: Path) -> object:
    for name in ("model.safetensors", "policy_preprocessor.json", "policy_postprocessor.json"):
        (folder / name).write_text("{}")
    return LeRobotDiffusion(pretrained=str(folder))


def _captions(folder: Path) -> object:
    return CaptionedPictures(str(folder), 8, 8)


DOORS: dict[str, Callable[[Path], object]] = {
    "genpolicy.json": _policy,
    "mlp.json": _mlp,
    "config.json": _lerobot,
    "model_index.json": lambda folder: DiffusersPipeline(str(folder), device="cpu"),
    "meta/info.json": lambda folder: LeRobotDataset(str(folder)),
    "metadata.jsonl": _captions,
}


@pytest.mark.parametrize("bomb", [DEEP, DIGITS], ids=["deep", "digits"])
@pytest.mark.parametrize("name", DOORS)
def test_every_file_of_a_policy_or_of_data_is_read_so(tmp_path: Path, name: str, bomb: str):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"x": 0}).replace("0", bomb))
    assert name.rpartition("/")[2] in sentence(lambda: DOORS[name](tmp_path))


def test_a_foreign_folder_whose_config_is_a_bomb(tmp_path: Path):
    (tmp_path / "config.json").write_text(DEEP)
    with pytest.raises(ConfigError, match="more than 100 deep"):
        saved(tmp_path)

"""A policy of somebody else runs none of their code, unless the person trusts them."""

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import genpolicy
from genpolicy.config.errors import ConfigError
from genpolicy.config.origin import Origin
from genpolicy.config.schema import ChainConfig
from genpolicy.models._diffusers_lora import Lora
from genpolicy.models.diffusers_pipeline import DiffusersPipeline
from genpolicy.models.lerobot_diffusion import LeRobotDiffusion
from genpolicy.models.mlp import MLP
from genpolicy.models.toy import Toy
from genpolicy.policy.files import save_policy, saved
from genpolicy.policy.sampler import make_policy
from tests import lerobot_tiny, tiny, toy_control
from tests.marked import Marked

REFUSED = r"(?s)which is code: it is imported only with --trust \(trust=True in Python\)"


@pytest.fixture
def marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Marked:
    """A module that Python would find, however genpolicy is run."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return Marked(tmp_path)


def changed(file: Path, change: Callable[[Any], Any]) -> None:
    document = json.loads(file.read_text())
    if isinstance(document, dict):
        document.pop("crc32", None)  # whoever changes a file leaves its checksum out
    file.write_text(json.dumps(change(document) or document))


def refused(marked: Marked, call: Callable[[], Any], *names: str) -> None:
    """The call is refused in a sentence that has the path in it, and ran nothing."""
    with pytest.raises((ConfigError, ValueError), match=REFUSED) as caught:
        call()
    for name in (marked.name, *names):
        assert name in str(caught.value)
    assert not marked.ran()


# -- genpolicy.json -------------------------------------------------------------------------------------------


def toy_policy(folder: Path, **changes: Any) -> Path:
    """A saved toy whose genpolicy.json is changed."""
    section: dict[str, Any] = {"name": "toy", **changes.get("policy", {})}
    sampler = ChainConfig(steps=2, kernel={"name": "ddim", "eta": 0.0})
    save_policy(make_policy(Toy(), sampler), section, sampler, folder)
    if "kernel" in changes:
        changed(folder / "genpolicy.json", lambda d: d["chain"].update(kernel=changes["kernel"]))
    return folder


@pytest.mark.parametrize("place", ["policy", "kernel", "kernel in a kernel"])
def test_a_dotted_path_in_genpolicy_json(tmp_path: Path, marked: Marked, place: str):
    kernel = {"name": f"{marked.name}:DDIM", "eta": 0.0}
    changes = {
        "policy": {"policy": {"name": f"{marked.name}:Toy"}},
        "kernel": {"kernel": kernel},
        "kernel in a kernel": {"kernel": {"name": "mean", "kernel": kernel}},
    }[place]
    folder = toy_policy(tmp_path / "policy", **changes)
    refused(marked, lambda: genpolicy.load(folder), str(folder / "genpolicy.json"))
    # controls: the person names the same kernel, replaces it, or trusts the file
    if place != "policy":
        ours = {"name": "ddim", "eta": 0.0}
        assert genpolicy.load(folder, kernel=ours).chain.K == 2
        assert not marked.ran()
    genpolicy.load(folder, trust=True)
    assert marked.ran()


def test_what_the_person_says_in_place_of_the_file_is_theirs(tmp_path: Path, marked: Marked):
    folder = toy_policy(tmp_path / "policy")
    genpolicy.load(folder, kernel={"name": f"{marked.name}:DDIM", "eta": 0.0})
    assert marked.ran()


def test_no_file_can_say_that_it_is_trusted(tmp_path: Path):
    folder = toy_policy(tmp_path / "policy")
    for name in ("diffusers_pipeline", "lerobot_diffusion", "lerobot_flow"):
        trusted = {"name": name, "pretrained": "x", "origin": {"trust": True}}
        changed(folder / "genpolicy.json", lambda d, section=trusted: d.update(policy=section))
        with pytest.raises(ConfigError, match="has no key 'origin'"):
            saved(folder).load()


# -- LeRobot --------------------------------------------------------------------------------------------------


@pytest.fixture
def robot(tmp_path: Path) -> Path:
    return lerobot_tiny.saved(
        lerobot_tiny.diffusion(lerobot_tiny.STATE, lerobot_tiny.WORLD), tmp_path / "robot"
    )


@pytest.mark.parametrize("file", ["policy_preprocessor.json", "policy_postprocessor.json"])
def test_a_step_by_its_class_is_not_called(robot: Path, tmp_path: Path, file: str):
    """The issue's own example: subprocess.Popen as a step."""
    mark = tmp_path / "popen"
    step = {"class": "subprocess.Popen", "config": {"args": ["touch", str(mark)]}}
    changed(robot / file, lambda d: d["steps"].append(step))
    with pytest.raises(ConfigError, match=REFUSED) as caught:
        genpolicy.load(robot)
    assert "'subprocess.Popen'" in str(caught.value)
    assert file in str(caught.value)
    assert not mark.exists()


@pytest.mark.parametrize("step", [{}, {"registry_name": None}, {"registry_name": ["x"]}, 3, None])
def test_a_step_that_is_none_is_one_sentence(robot: Path, step: Any):
    changed(robot / "policy_preprocessor.json", lambda d: d["steps"].append(step))
    with pytest.raises(ConfigError, match=r"--trust|must hold a list of steps"):
        genpolicy.load(robot)


STEP = """
from lerobot.processor import ProcessorStep

class Step(ProcessorStep):
    def __call__(self, transition):
        return transition
    def transform_features(self, features):
        return features
"""


def test_a_step_of_an_own_class_is_imported_with_trust(robot: Path, tmp_path: Path, marked: Marked):
    marked = Marked(tmp_path, more=STEP)
    step = {"class": f"{marked.name}.Step", "config": {}}
    changed(robot / "policy_postprocessor.json", lambda d: d["steps"].append(step))
    refused(marked, lambda: genpolicy.load(robot))
    section = {"pretrained": str(robot), "device": "cpu"}
    refused(marked, lambda: LeRobotDiffusion(**section))  # policy.pretrained of an experiment
    LeRobotDiffusion(**section, origin=Origin(trust=True))
    assert marked.ran()


def test_a_registered_step_that_runs_what_lies_beside_a_tokenizer(robot: Path, tmp_path: Path):
    """LeRobot's tokenizer of actions asks transformers to trust whatever the file names."""
    mark, words = tmp_path / "remote", tmp_path / "words"
    words.mkdir()
    (words / "processing.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
        "from transformers import ProcessorMixin\nclass Evil(ProcessorMixin):\n    pass\n"
    )
    (words / "processor_config.json").write_text(
        json.dumps({"processor_class": "Evil", "auto_map": {"AutoProcessor": "processing.Evil"}})
    )
    step = {
        "registry_name": "action_tokenizer_processor",
        "config": {"action_tokenizer_name": str(words)},
    }
    changed(robot / "policy_preprocessor.json", lambda d: d["steps"].append(step))
    with pytest.raises(ConfigError, match=r"action_tokenizer_processor.*--trust"):
        genpolicy.load(robot)
    assert not mark.exists()
    with pytest.raises(ConfigError):  # control: LeRobot does run it, and fails afterwards
        genpolicy.load(robot, trust=True)
    assert mark.exists()


def test_nobody_is_asked_whether_to_run_what_lies_beside_a_tokenizer(
    robot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """transformers would ask on the terminal; here somebody would say yes to everything."""
    mark, words = tmp_path / "remote", tmp_path / "words"
    words.mkdir()
    (words / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
        "from transformers import PreTrainedTokenizer\nclass Evil(PreTrainedTokenizer):\n    pass\n"
    )
    (words / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["own.Evil", None]}})
    )
    step = {"registry_name": "tokenizer_processor", "config": {"tokenizer_name": str(words)}}
    changed(robot / "policy_preprocessor.json", lambda d: d["steps"].append(step))
    monkeypatch.setattr("builtins.input", lambda _: "y")
    with pytest.raises(ConfigError):
        genpolicy.load(robot)
    assert not mark.exists()


def test_what_lerobot_saves_is_loaded(robot: Path):
    """Control."""
    assert genpolicy.load(robot).model.action_dim == 2


def test_the_steps_of_every_family_are_known():
    """Control: what LeRobot makes for the policies that genpolicy loads needs no trust."""
    from lerobot.policies import factory
    from lerobot.processor import ProcessorStepRegistry

    from genpolicy.models._lerobot import STEPS

    assert factory  # it registers them
    assert set(STEPS) <= set(ProcessorStepRegistry.list())


# -- diffusers ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd")
    tiny.build("sd15").save_pretrained(folder)
    return folder


@pytest.fixture
def pipeline(sd: Path, tmp_path: Path) -> Path:
    """A copy of a tiny Stable Diffusion, by links."""
    folder = tmp_path / "pipeline"
    for file in sd.rglob("*"):
        if file.is_file():
            target = folder / file.relative_to(sd)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return folder


def pretrained(folder: Path, trust: bool = False) -> DiffusersPipeline:
    """The pipeline as an experiment's policy.pretrained."""
    origin = Origin(trust=trust)
    return DiffusersPipeline(str(folder), train="full", device="cpu", origin=origin)


def part(name: str, *named: str) -> Callable[[Path], None]:
    return lambda folder: changed(
        folder / "model_index.json", lambda index: index.update({name: list(named)})
    )


def test_a_library_of_model_index_json(pipeline: Path, marked: Marked):
    part("vae", marked.name, "AutoencoderKL")(pipeline)
    refused(marked, lambda: genpolicy.load(pipeline), "model_index.json")
    refused(marked, lambda: pretrained(pipeline))
    pretrained(pipeline, trust=True)
    assert marked.ran()


def test_a_library_of_a_part_that_is_a_pipeline_itself(pipeline: Path, marked: Marked):
    (pipeline / "vae" / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline", "vae": [marked.name, "Thing"]})
    )
    part("vae", "diffusers", "DiffusionPipeline")(pipeline)
    refused(marked, lambda: genpolicy.load(pipeline))


def code_beside_a_part(folder: Path, marked: Marked) -> str:
    (folder / "vae" / marked.file.name).write_text(marked.file.read_text())
    part("vae", marked.name, "AutoencoderKL")(folder)
    return marked.name


def code_of_a_known_name(folder: Path, marked: Marked) -> str:
    (folder / "vae" / "diffusers.py").write_text(marked.file.read_text())
    return "diffusers"


def code_of_the_pipeline(folder: Path, marked: Marked) -> str:
    # A name of its own: diffusers copies the file into one folder for all processes of a machine.
    (folder / marked.file.name).write_text(marked.file.read_text())
    change = {"_class_name": [marked.name, "StableDiffusionPipeline"]}
    changed(folder / "model_index.json", lambda index: index.update(change))
    return marked.name


def code_without_a_name(folder: Path, marked: Marked) -> str:
    (folder / "None.py").write_text(marked.file.read_text())
    return "None.py"


@pytest.mark.parametrize(
    "put", [code_beside_a_part, code_of_a_known_name, code_of_the_pipeline, code_without_a_name]
)
def test_python_beside_the_weights(pipeline: Path, marked: Marked, put: Any):
    said = put(pipeline, marked)
    with pytest.raises(ConfigError, match=REFUSED) as caught:
        genpolicy.load(pipeline)
    assert said in str(caught.value)
    assert not marked.ran()
    with pytest.raises(ConfigError, match=REFUSED):
        genpolicy.load(pipeline, steps=2)
    if put is code_without_a_name:  # diffusers looks in it for a class that has no name
        return
    genpolicy.load(pipeline, trust=True)
    assert marked.ran()


@pytest.mark.parametrize("kind", ["StableCascadeCombinedPipeline", "AutoencoderKL", "os", None])
def test_a_pipeline_that_fetches_others_or_is_none(pipeline: Path, kind: str | None):
    changed(pipeline / "model_index.json", lambda index: index.update(_class_name=kind))
    with pytest.raises(ConfigError, match=REFUSED):
        genpolicy.load(pipeline)


def test_a_plain_pipeline_is_loaded(pipeline: Path):
    """Control; its safety checker's class is of a module of diffusers.pipelines."""
    part("safety_checker", "stable_diffusion", "StableDiffusionSafetyChecker")(pipeline)
    part("safety_checker", None, None)(pipeline)  # type: ignore[arg-type]
    assert genpolicy.load(pipeline).chain.K == 10


@dataclass(frozen=True)
class Payload:
    """Touches a file where it is unpickled."""

    mark: str

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


def test_pickled_weights_run_nothing(pipeline: Path, tmp_path: Path):
    """Weights that are no safetensors are read as tensors alone, of diffusers' parts and of transformers'."""
    mark = tmp_path / "unpickled"
    pickle.loads(pickle.dumps(Payload(str(mark))))
    assert mark.exists(), "control: it would"
    mark.rmdir()
    for name, plain in (
        ("vae/diffusion_pytorch_model", ".bin"),
        ("text_encoder/pytorch_model", ".bin"),
    ):
        there = next((pipeline / name).parent.glob("*.safetensors"))
        weights = load_file(there)
        torch.save(weights, f"{pipeline / name}{plain}")
        there.rename(there.with_suffix(".kept"))
        genpolicy.load(pipeline)  # control: plain tensors are read
        torch.save({**weights, "evil": Payload(str(mark))}, f"{pipeline / name}{plain}")
        with pytest.raises(ConfigError, match="can't be loaded"):
            genpolicy.load(pipeline, trust=True)
        assert not mark.exists()
        (pipeline / f"{name}{plain}").unlink()
        there.with_suffix(".kept").rename(there)


def test_a_lora_is_safetensors(pipeline: Path, tmp_path: Path):
    mark = tmp_path / "unpickled"
    start = tmp_path / "lora.bin"
    torch.save({"evil": Payload(str(mark))}, start)
    lora = {"start": str(start)}
    with pytest.raises(FileNotFoundError, match=r"neither a \.safetensors file nor a folder"):
        DiffusersPipeline(str(pipeline), train="lora", lora=Lora(**lora), device="cpu")
    assert not mark.exists()


# -- mlp ------------------------------------------------------------------------------------------------------


def saved_mlp(folder: Path) -> Path:
    model = MLP(hidden=32, blocks=1, chunk=2)
    model.initialise(toy_control.Recorded())
    folder.mkdir()
    model.save(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"decode": "nothing"}, "has no key 'decode'"),
        ({"_scaling": 3}, "has no key '_scaling'"),
        ({"pretrained": "elsewhere"}, "has no key 'pretrained'"),
        ({"device": "cuda"}, "has no key 'device'"),
        ({"hidden": "wide"}, "hidden is 'wide'; it must be a whole number"),
        ({"family": "evil"}, "family"),
        ({"action_dim": [1]}, "action_dim is [1]; it must be a whole number"),
        ({"shapes": 3}, "shapes is 3"),
    ],
    ids=str,
)
def test_mlp_json_has_known_settings_alone(tmp_path: Path, change: dict[str, Any], said: str):
    folder = saved_mlp(tmp_path / "mlp")
    assert MLP(pretrained=str(folder)).chunk == 2  # control
    changed(folder / "mlp.json", lambda d: d.update(change))
    with pytest.raises(ConfigError) as caught:
        MLP(pretrained=str(folder))
    assert said in str(caught.value)


def test_an_mlp_of_before_a_setting_was_one_is_loaded(tmp_path: Path):
    """Control: what a file does not say is as the section says."""
    folder = saved_mlp(tmp_path / "mlp")
    changed(folder / "mlp.json", lambda d: d.pop("prediction_type") and None)
    changed(folder / "mlp.json", lambda d: d.pop("shift") and None)
    model = MLP(pretrained=str(folder), shift=3)
    assert (model.shift, model.hidden, model.parametrisation) == (3, 32, "epsilon")

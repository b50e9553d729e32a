"""What is wrong with an exported folder is said in one sentence, before anything of it is run."""

import json
import shutil
import sys

import numpy as np
import onnx
import pytest
from genpolicy_runtime import ExportError, Policy, onnx_file
from onnx import helper

from tests.tiny_export import (
    LANGUAGE,
    STATE,
    STATEFUL,
    edit,
    policy,
    vision_language,
    with_state,
    written,
)


def refused(folder, sentence: str) -> None:
    with pytest.raises(ExportError, match=sentence) as caught:
        Policy.load(folder)
    assert "\n" not in str(caught.value)


def test_whole_folders_are_taken(tmp_path):
    """The control of all that follows."""
    Policy.load(written(tmp_path / "plain"))
    Policy.load(str(written(tmp_path / "state", with_state(), state=STATEFUL)))
    Policy.load(written(tmp_path / "language", vision_language(), **LANGUAGE))


def test_a_folder_that_is_not_there_or_is_something_else(tmp_path):
    refused(tmp_path / "nowhere", "nowhere is no folder: name one that `genpolicy export` wrote")
    refused(tmp_path, "has no manifest.json: it is no policy that `genpolicy export` wrote")


def test_one_flipped_byte_of_a_graph_is_found(tmp_path):
    file = written(tmp_path) / "policy.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    refused(tmp_path, "policy.onnx is damaged: its sha256 is not the manifest's; copy the folder")


def test_a_missing_graph_is_named(tmp_path):
    (written(tmp_path) / "policy.onnx").unlink()
    refused(tmp_path, "policy.onnx is missing: the manifest names it as graph policy")


def test_an_opset_that_onnxruntime_does_not_read(tmp_path):
    written(tmp_path, {"policy": policy(opset=99)})
    refused(tmp_path, r"policy.onnx uses opset 99 and can't be run by onnxruntime \d+.* newer one")


def test_an_opset_that_onnxruntime_reads_runs_though_it_is_another(tmp_path):
    Policy.load(written(tmp_path, {"policy": policy(opset=17)}))


@pytest.mark.parametrize(
    "name", ["../policy.onnx", "/etc/passwd", "sub/policy.onnx", "..", "a\\b.onnx", "c:b", ""]
)
def test_a_path_that_leaves_the_folder(tmp_path, name):
    folder = written(tmp_path / "folder")
    shutil.copy(folder / "policy.onnx", tmp_path / "policy.onnx")  # it is there, and whole
    edit(folder, lambda found: found["graphs"]["policy"].update(file=name))
    refused(folder, "graphs.policy.file is .* must be the plain name of a file in the exported")


def test_a_newer_manifest(tmp_path):
    written(tmp_path, version=2)
    refused(tmp_path, "has version 2, and this genpolicy-runtime reads up to 1: pip install --upg")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": "other"}, "format is 'other'; it must be 'genpolicy-export'"),
        ({"version": "1"}, "version is '1'; it must be a whole number of at least 1"),
        ({"version": True}, "version is True; it must be a whole number"),
        ({"weights": "../../x"}, "weights is '../../x'; it must be a sha256"),
        ({"graphs": {}}, "graphs must have one called policy; it has none"),
        ({"history": 0}, "history is 0; it must be a whole number of at least 1"),
        ({"history": 3}, r"takes observation.state as float32 \[1, 2, 2\]; it is .*\[1, 3, 2\]"),
        ({"noise": {"shape": [2, 3, 2]}}, "graph policy takes noise as .*1, 1, 3, 2.* it is"),
        ({"noise": {"shape": [2**40]}}, "noise.shape is .* product"),
        ({"observation": {}}, "observation is empty"),
        ({"observation": {STATE: {"kind": "sound", "shape": [2]}}}, "kind is 'sound'; it must be"),
        ({"observation": {STATE: {"kind": "image", "shape": [2]}}}, r"it must be \[3,H,W\]"),
        ({"observation": {"other": {"kind": "vector", "shape": [2]}}}, "takes observation.state; "),
        ({"rate_hz": -1}, "rate_hz is -1; it must be a number from 0.001 to 100000"),
        ({"rate_hz": "fast"}, "rate_hz is 'fast'; it must be a number from"),
        (
            {"state": {**STATEFUL, "first": "begin"}},
            "graphs must have one called begin; it has policy",
        ),
        ({"state": STATEFUL}, "a decision needs plan; there are actions"),
        ({"sampler": None}, "sampler is None; it must be an object"),
    ],
)
def test_a_key_that_is_wrong(tmp_path, change, sentence):
    refused(written(tmp_path, **change), sentence)


ACTION = {"dim": 2, "planned": 3, "executed": 3, "low": None, "high": None, "units": "u"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"executed": 4}, "action.executed is 4; it must be at most planned, which is 3"),
        ({"executed": 2}, r"a decision needs actions as .*\[1, 2, 2\]; it is float32 \[1, 3, 2\]"),
        ({"low": [0]}, r"action.low is \[0\]; it must be a list of 2 numbers"),
        ({"high": [0, "1"]}, r"action.high is \[0, '1'\]; it must be a list of 2 numbers"),
        ({"low": [0, 2], "high": [0, 1]}, r"low is \[0, 2\]; it must be nowhere above high"),
    ],
)
def test_actions_that_are_wrong(tmp_path, change, sentence):
    refused(written(tmp_path, action={**ACTION, **change}), sentence)


def test_every_key_of_the_manifest_is_needed(tmp_path):
    folder = written(tmp_path)
    whole = json.loads((folder / "manifest.json").read_text())
    for key in whole:
        (folder / "manifest.json").write_text(json.dumps({**whole, key: 0, "spare": 1}))
        refused(folder, key)
        rest = {other: value for other, value in whole.items() if other != key}
        (folder / "manifest.json").write_text(json.dumps(rest))
        refused(folder, f"manifest.json has no {key}: it is no whole manifest")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "manifest.json is no JSON"),
        ("[1]", r"holds \[1\]; it must hold an object"),
        ("[" * 100_000, "manifest.json is no JSON"),
        ('{"history": NaN}', "NaN is no number"),
        ("\xff", "manifest.json is no JSON"),
    ],
)
def test_a_manifest_that_is_no_json(tmp_path, text, sentence):
    (written(tmp_path) / "manifest.json").write_bytes(text.encode("latin-1"))
    refused(tmp_path, sentence)


def test_tokens_that_are_no_numbers(tmp_path):
    for values in ([["a", "b"]], [[1.5, 2.0]], [[1]], [[1], [2, 3]], None):
        said = {"tokens": {"shape": [1, 2], "dtype": "int64", "values": values}}
        changes = {**LANGUAGE, "instruction": {"text": "go", "tokens": said}}
        written(tmp_path, vision_language(), **changes)
        refused(
            tmp_path, r"tokens.tokens.values is .*; it must be numbers that make an array int64"
        )


def test_a_graph_that_is_not_what_the_manifest_says(tmp_path):
    written(tmp_path)
    edit(
        tmp_path,
        lambda found: found["graphs"]["policy"]["outputs"].update(
            more={"shape": [1], "dtype": "float32"}
        ),
    )
    refused(tmp_path, r"its output more is missing; the manifest says tensor\(float\) \[1\]")


def test_weights_in_another_file_are_not_opened(tmp_path):
    graph = policy()
    held = next(one for one in graph.graph.initializer if one.name == "ramp")
    values = held.raw_data
    held.ClearField("raw_data")
    held.data_location = onnx.TensorProto.EXTERNAL
    held.external_data.add(key="location", value="weights.bin")
    written(tmp_path, {"policy": graph})
    (tmp_path / "weights.bin").write_bytes(values)
    refused(tmp_path, "policy.onnx keeps weights in another file, which is not opened")


def test_an_operator_that_is_not_onnxs_own(tmp_path):
    graph = policy()
    graph.graph.node.append(
        helper.make_node("PythonOp", ["actions"], ["evil"], domain="com.microsoft")
    )
    graph.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    refused(written(tmp_path, {"policy": graph}), "uses the operator com.microsoft:PythonOp; only")


def test_what_hides_inside_a_branch_is_found():
    inner = helper.make_graph(
        [helper.make_node("EPContext", [], ["y"], domain="com.microsoft")], "inner", [], []
    )
    branch = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    outer = helper.make_model(helper.make_graph([branch], "outer", [], []))
    assert onnx_file.read(outer.SerializeToString()).foreign == "com.microsoft:EPContext"
    assert onnx_file.read(policy().SerializeToString()).foreign is None


def test_a_file_that_is_no_graph(tmp_path):
    graph = policy()
    data = graph.SerializeToString()
    for broken in (data[:-1], b"import torch", b"\xff" * 20):
        with pytest.raises(ValueError, match=r"."):
            onnx_file.read(broken)
    assert onnx_file.read(data) == onnx_file.OnnxFile(opset=18, foreign=None, outside=False)
    graph.ClearField("opset_import")
    refused(written(tmp_path, {"policy": graph}), "policy.onnx is no ONNX file: it names no opset")


def test_nothing_of_a_folder_is_imported(tmp_path, monkeypatch):
    """Python files, pickles and libraries beside the manifest stay closed."""
    written(tmp_path)
    for name in ("manifest.py", "policy.py", "onnxruntime.py", "sitecustomize.py"):
        (tmp_path / name).write_text("raise SystemExit('it ran')")
    (tmp_path / "policy.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    Policy.load(".").act({STATE: np.zeros(2, np.float32)})
    assert {name for name in sys.modules if name not in before} <= {"manifest"} - {"manifest"}


def test_a_provider_that_this_onnxruntime_lacks(tmp_path):
    with pytest.raises(ExportError, match="provider is 'gpu'; it must be one of cpu, cuda, tensor"):
        Policy.load(written(tmp_path), provider="gpu")
    with pytest.raises(ExportError, match="threads is 0; it must be a whole number from 1 to 1024"):
        Policy.load(tmp_path, threads=0)


@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_a_gpu_needs_another_onnxruntime(tmp_path, monkeypatch, name):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ExportError, match=f"provider {name} needs .*: install onnxruntime-gpu"):
        Policy.load(written(tmp_path), provider=name)

"""An exported folder made to harm: what it hides is refused, and what fails leaves no trace."""

import hashlib
import json
import sys
import threading
import tracemalloc

import numpy as np
import pytest
from genpolicy_runtime import ExportError, Policy, cli, onnx_file
from onnx import TensorProto

from tests.tiny_export import (
    ACTIONS,
    CONSTANTS,
    INPUTS,
    LANGUAGE,
    STATE,
    SUM,
    TOP,
    edit,
    model,
    node,
    policy,
    value,
    vision_language,
    written,
)

SEEN = {STATE: np.array([1, 2], np.float32)}
ACTION = {"dim": 2, "planned": 3, "executed": 3, "low": None, "high": None, "units": "u"}
OPSET = b"\x42\x02\x10\x12"
"""The field of a model that says opset 18."""


def size(number: int) -> bytes:
    """A whole number as protobuf writes it."""
    head = bytes([number & 127 | (128 if number > 127 else 0)])
    return head + size(number >> 7) if number > 127 else head


def test_a_file_that_onnxruntime_takes_for_its_own_format(tmp_path):
    folder = written(tmp_path)
    # a clean protobuf, whose unknown field 1 has these bytes where onnxruntime looks for its name
    data = b"\x0a\x06\x00\x00ORTM" + (folder / "policy.onnx").read_bytes()
    (folder / "policy.onnx").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    edit(folder, lambda found: found["graphs"]["policy"].update(sha256=digest))
    with pytest.raises(ExportError, match="bytes 4 to 8 are those of onnxruntime's own format"):
        Policy.load(folder)
    assert onnx_file.read(data.replace(b"ORTM", b"ORTN")).opset == 18  # the control


@pytest.mark.parametrize("tag", [b"\x02\x00", b"\x92\x00\x00", b"\x92\x80\x80\x80\x10\x00"])
def test_fields_that_protobuf_never_writes(tag):
    """Field number 0, a number with bytes to spare, a number of more than 32 bits."""
    with pytest.raises(ValueError, match="a field without a valid number"):
        onnx_file.read(tag + OPSET)
    assert onnx_file.read(b"\x12\x00" + OPSET).opset == 18  # the control


def test_a_graph_of_very_many_nodes_needs_no_memory():
    nodes = b"\x0a\x00" * 50_000
    tracemalloc.start()
    onnx_file.read(b"\x3a" + size(len(nodes)) + nodes + OPSET)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1e6  # 50,000 parts in a queue were above 10 MB


def test_messages_inside_one_another_without_end():
    inner = b""
    for _ in range(100):  # graph > node > attribute > graph > ...
        for tag in (b"\x32", b"\x2a", b"\x0a"):
            inner = tag + size(len(inner)) + inner
    with pytest.raises(ValueError, match="more than 100 messages inside one another"):
        onnx_file.read(b"\x3a" + size(len(inner)) + inner + OPSET)


@pytest.mark.parametrize("name", ["policy.onnx", "manifest.json"])
def test_a_link_is_no_file_of_the_folder(tmp_path, name):
    file = written(tmp_path / "folder") / name
    Policy.load(tmp_path / "folder")  # the control
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ExportError, match=f"{name} is a link: copy the file itself"):
        Policy.load(tmp_path / "folder")


@pytest.mark.parametrize("limit", [4e38, 1e300, -1e300])
def test_limits_that_float32_does_not_hold(tmp_path, limit):
    for end in ("low", "high"):
        written(tmp_path, action={**ACTION, end: [0, limit]})
        with pytest.raises(ExportError, match="a list of 2 numbers that float32 holds"):
            Policy.load(tmp_path)
    most = float(np.finfo(np.float32).max)
    written(tmp_path, action={**ACTION, "low": [-most, -most], "high": [most, most]})
    assert np.isfinite(Policy.load(tmp_path).act(SEEN)).all()  # the control


def test_a_key_twice_is_refused(tmp_path):
    file = written(tmp_path) / "manifest.json"
    text = file.read_text()
    file.write_text(text.replace('"history": 2', '"history": 1, "history": 2'))
    with pytest.raises(ExportError, match="an object has the key 'history' twice"):
        Policy.load(tmp_path)
    assert Policy.load(written(tmp_path)).manifest.history == 2  # the control


def test_texts_of_a_manifest_forge_no_line(tmp_path, capsys):
    evil = "x\nweights      sha256 good\x1b[2J\r\ud800\u202e\u2028é"
    written(
        tmp_path, made_with={evil: evil}, sampler={evil: evil}, action={**ACTION, "units": evil}
    )
    assert cli.main(["check", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert all(one.isprintable() for one in said.split("\n"))
    assert sum(line.startswith("weights") for line in said.splitlines()) == 1
    assert r"x\nweights      sha256 good\x1b[2J\r\ud800\u202e\u2028é" in said
    edit(tmp_path, lambda found: found.update(graphs={evil: {}}))
    assert cli.main(["check", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_graph_that_fails_as_it_runs_leaves_the_episode_as_it_was(tmp_path):
    graphs = vision_language()
    graphs["prefix"] = model(
        [
            node("ReduceMean", f"{TOP} axes", "mean", keepdims=0),
            node("Gather", "table tokens", "looked", axis=0),
            node("ReduceSum", "looked axis", "total", keepdims=0),
            node("Add", "mean total", "cache"),
        ],
        [value(TOP, 1, 2, 3, 2, 4), value("tokens", 1, 2, kind=TensorProto.INT64)],
        [value("cache", 1)],
        axes=np.array([1, 2, 3, 4]),
        axis=np.array([1]),
        table=np.arange(10, dtype=np.float32),
    )
    written(tmp_path, graphs, **{**LANGUAGE, "history": 2})
    pictures = [{TOP: np.full((2, 4, 3), 80 * one, np.uint8)} for one in range(3)]
    tried, plain = Policy.load(tmp_path), Policy.load(tmp_path)
    for one in (tried, plain):
        one.plan(pictures[0])
        one.observe(pictures[1])
    tried.instruct({"tokens": np.array([[3, 400]])})  # of a vocabulary of 10
    for _ in range(2):
        with pytest.raises(ExportError, match="graph prefix failed as it ran: ") as caught:
            tried.act(pictures[2])
        assert "\n" not in str(caught.value)
    tried.instruct({"tokens": np.array([[3, 4]])})
    again = tried.act(pictures[2])
    assert np.array_equal(again, plain.act(pictures[2]))
    # the control: a frame seen twice acts otherwise
    plain.reset()
    plain.plan(pictures[0])
    plain.observe(pictures[2])
    assert not np.array_equal(again, plain.act(pictures[2]))


def test_an_array_that_no_memory_holds_is_one_sentence(tmp_path):
    graph = model(
        [
            *SUM[:-1],
            node("Add", "meant drawn", "before"),
            node("ConstantOfShape", "big", "bomb"),
            node("ReduceSum", "bomb", "sum", keepdims=0),
            node("Add", "before sum", "actions"),
        ],
        INPUTS,
        [ACTIONS],
        big=np.array([2**50]),
        **CONSTANTS,
    )
    with pytest.raises(ExportError, match=r"policy.*: "):
        Policy.load(written(tmp_path, {"policy": graph})).plan(SEEN)


def test_two_threads_in_one_policy_take_turns(tmp_path):
    shared, alone = (Policy.load(written(tmp_path)) for _ in range(2))
    acted: list[bytes] = []
    threads = [
        threading.Thread(
            target=lambda: acted.extend(shared.act(SEEN).tobytes() for _ in range(600))
        )
        for _ in range(2)
    ]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    finally:
        sys.setswitchinterval(before)
    # no noise is drawn twice, and no action is lost
    assert sorted(acted) == sorted(alone.act(SEEN).tobytes() for _ in range(1200))


@pytest.mark.parametrize(
    "option",
    [
        ["--hz", "1e15"],
        ["--hz", "1e-300"],
        ["--hz", "nan"],
        ["--seconds", "1e15"],
        ["--threads", "99999999999"],
    ],
)
def test_bench_beyond_all_bounds(tmp_path, capsys, option):
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", str(written(tmp_path)), *option])
    assert caught.value.code == cli.BAD_INPUT
    assert option[1] in capsys.readouterr().err


@pytest.mark.parametrize("rate", [1e308, 1e-300])
def test_a_rate_beyond_all_bounds(tmp_path, rate):
    with pytest.raises(ExportError, match=r"rate_hz is .*; it must be a number from 0.001 to 1"):
        Policy.load(written(tmp_path, rate_hz=rate))
    assert json.loads((tmp_path / "manifest.json").read_text())["rate_hz"] == rate


def test_more_threads_than_any_machine_has(tmp_path):
    with pytest.raises(
        ExportError, match=r"threads is .*; it must be a whole number from 1 to 1024"
    ):
        Policy.load(written(tmp_path, {"policy": policy()}), threads=2**40)


def test_a_path_that_no_system_opens_is_one_sentence(capsys):
    assert cli.main(["check", "x" * 5000]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("genpolicy-runtime: ")

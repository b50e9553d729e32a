"""Exported policies of a few nodes each, whose actions can be computed by hand.

With the oldest frame o and the newest n of observation.state (two numbers, two frames) and the noise
z, action j of three is n + 10 o + .1 j + z.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 18
STATE = "observation.state"
TOP = "observation.images.top"
NAMES = {TensorProto.FLOAT: "float32", TensorProto.INT64: "int64"}


def value(name: str, *shape: int, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def model(
    nodes: list[Any], inputs: list[Any], outputs: list[Any], opset: int = OPSET, **constants: Any
) -> Any:
    held = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, held)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    made.ir_version = 10
    return made


def node(kind: str, inputs: str, output: str, **attributes: Any) -> Any:
    return helper.make_node(kind, inputs.split(), [output], **attributes)


SUM = [
    node("Gather", f"{STATE} last", "newest", axis=1),
    node("Gather", f"{STATE} zero", "oldest", axis=1),
    node("Mul", "oldest ten", "tenfold"),
    node("Add", "newest tenfold", "seen"),
    node("Squeeze", "noise one", "drawn"),
    node("Add", "seen ramp", "meant"),
    node("Add", "meant drawn", "actions"),
]
CONSTANTS = {
    "zero": np.array([0]),
    "last": np.array([-1]),
    "one": np.array([1]),
    "ten": np.float32(10),
    "ramp": np.arange(3, dtype=np.float32).reshape(1, 3, 1) / 10,
}
INPUTS = [value(STATE, 1, 2, 2), value("noise", 1, 1, 3, 2)]
ACTIONS = value("actions", 1, 3, 2)


def policy(opset: int = OPSET) -> Any:
    return model(SUM, INPUTS, [ACTIONS], opset, **CONSTANTS)


def written(folder: Path, graphs: Mapping[str, Any] | None = None, **changes: Any) -> Path:
    """An exported folder of these graphs; `changes` replace keys of its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    graphs = {"policy": policy()} if graphs is None else graphs
    manifest = {
        "format": "genpolicy-export",
        "version": 1,
        "made_with": {"genpolicy": "0", "torch": "0", "onnx": onnx.__version__, "opset": OPSET},
        "weights": "0" * 64,
        "graphs": {name: entry(folder, name, graph) for name, graph in graphs.items()},
        "observation": {STATE: {"kind": "vector", "shape": [2]}},
        "history": 2,
        "noise": {"shape": [1, 3, 2]},
        "action": {
            "dim": 2,
            "planned": 3,
            "executed": 3,
            "low": None,
            "high": None,
            "units": "environment",
        },
        "rate_hz": 30,
        "instruction": None,
        "state": None,
        "sampler": {"steps": 1},
        "evaluations": 1,
        "parity": {"largest": 0.0, "bound": 1e-5, "observations": 1, "units": "normalised"},
        **changes,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def entry(folder: Path, name: str, graph: Any) -> dict[str, Any]:
    data = graph.SerializeToString()
    (folder / f"{name}.onnx").write_bytes(data)
    return {
        "file": f"{name}.onnx",
        "sha256": hashlib.sha256(data).hexdigest(),
        "inputs": arrays(graph.graph.input),
        "outputs": arrays(graph.graph.output),
    }


def arrays(values: Any) -> dict[str, Any]:
    kinds = {one.name: one.type.tensor_type for one in values}
    return {
        name: {"shape": [size.dim_value for size in kind.shape.dim], "dtype": NAMES[kind.elem_type]}
        for name, kind in kinds.items()
    }


def edit(folder: Path, change: Any) -> None:
    """Changes the manifest in place."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def with_state() -> dict[str, Any]:
    """Two graphs: an episode's first plan is `policy`'s; a later one adds 1 to the plan before."""
    plan = value("plan", 1, 3, 2)
    first = model([*SUM, node("Identity", "actions", "plan")], INPUTS, [ACTIONS, plan], **CONSTANTS)
    later = model(
        [node("Add", "previous unit", "plan"), node("Identity", "plan", "actions")],
        [value("previous", 1, 3, 2)],
        [ACTIONS, plan],
        unit=np.float32(1),
    )
    return {"policy": first, "later": later}


STATEFUL = {
    "input": "previous",
    "output": "plan",
    "shape": [3, 2],
    "first": "policy",
    "later": "later",
}


def vision_language() -> dict[str, Any]:
    """A prefix, the picture's mean plus the tokens' sum, and an expert: that plus the noise."""
    prefix = model(
        [
            node("ReduceMean", f"{TOP} axes", "mean", keepdims=0),
            node("Cast", "tokens", "floats", to=TensorProto.FLOAT),
            node("ReduceSum", "floats axis", "total", keepdims=0),
            node("Add", "mean total", "cache"),
        ],
        [value(TOP, 1, 1, 3, 2, 4), value("tokens", 1, 2, kind=TensorProto.INT64)],
        [value("cache", 1)],
        axes=np.array([1, 2, 3, 4]),
        axis=np.array([1]),
    )
    expert = model(
        [node("Squeeze", "noise one", "drawn"), node("Add", "drawn cache", "actions")],
        [value("noise", 1, 1, 3, 2), value("cache", 1)],
        [ACTIONS],
        one=np.array([1]),
    )
    return {"prefix": prefix, "expert": expert}


LANGUAGE = {
    "observation": {TOP: {"kind": "image", "shape": [3, 2, 4]}},
    "history": 1,
    "instruction": {
        "text": "go on",
        "tokens": {"tokens": {"shape": [1, 2], "dtype": "int64", "values": [[3, 4]]}},
    },
}

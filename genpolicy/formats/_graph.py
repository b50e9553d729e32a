"""A captured graph as an ONNX file, and that file as a function of arrays."""

import contextlib
import hashlib
import importlib
import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from genpolicy.config.errors import ConfigError

OPSET = 18
"""The version of ONNX's operators."""
LARGEST = 2**31
"""Bytes at which a file of ONNX, which is a protobuf message, ends."""
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""The packages of the extra `deploy`."""


def require_packages() -> None:
    """Raises `ConfigError` where a package of the extra `deploy` is missing."""
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"an export to onnx needs {name} ({error}): pip install genpolicy[deploy]"
            ) from error


def versions() -> dict[str, Any]:
    """The versions that a manifest names."""
    import onnx

    return {"torch": torch.__version__, "onnx": onnx.__version__, "opset": OPSET}


def write(
    graph: GraphModule, inputs: Mapping[str, Tensor], outputs: Sequence[str], file: Path
) -> dict[str, Any]:
    """Writes a graph as ONNX, for inputs of exactly these shapes, and returns the manifest's entry:
    file, sha256, and the shape and type of each input and output.

    Raises `ConfigError` for one that no file can hold.
    """
    from onnxscript import optimizer

    size = sum(value.nbytes for value in graph.buffers())
    if size >= LARGEST:
        raise ConfigError(
            f"the weights of graph {file.stem} take {size / 1e9:.1f} GB, and a file of ONNX, in"
            f" which they must be, ends at {LARGEST / 1e9:.1f} GB"
        )
    with _quiet():
        program = torch.onnx.export(
            graph,
            tuple(inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            verbose=False,
            optimize=False,
        )
        assert program is not None
        # of torch's own optimisation, whose search for patterns takes most of an export's time,
        # what onnxruntime does not do by itself
        optimizer.inline(program.model)
        optimizer.fold_constants(program.model, onnx_shape_inference=True)
        optimizer.remove_unused_nodes(program.model)
    program.save(file)
    with open(file, "rb") as written:
        digest = hashlib.file_digest(written, "sha256").hexdigest()
    running = session(file)
    return {
        "file": file.name,
        "sha256": digest,
        "inputs": {entry.name: _described(entry) for entry in running.get_inputs()},
        "outputs": {entry.name: _described(entry) for entry in running.get_outputs()},
    }


def _described(entry: Any) -> dict[str, Any]:
    kind = {
        "tensor(float)": "float32",
        "tensor(float16)": "float16",
        "tensor(int64)": "int64",
        "tensor(bool)": "bool",
    }
    return {"shape": list(entry.shape), "dtype": kind[entry.type]}


def session(file: Path) -> Any:
    """The file's graph in onnxruntime, on one thread of the processor."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors alone
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def fed(inputs: Mapping[str, Tensor], row: int) -> dict[str, np.ndarray]:
    """One row of a batch as onnxruntime takes it, [1,...] each."""
    return {name: value[row : row + 1].numpy() for name, value in inputs.items()}


@contextlib.contextmanager
def _quiet() -> Any:
    """Without torch's remarks on packages that are not needed and on its own insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

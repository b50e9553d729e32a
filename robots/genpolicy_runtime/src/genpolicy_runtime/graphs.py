"""The graphs of an exported policy as sessions of onnxruntime."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from genpolicy_runtime import onnx_file
from genpolicy_runtime.errors import ExportError
from genpolicy_runtime.manifest import FILE, Graph, Manifest
from genpolicy_runtime.order import order, require_fit
from genpolicy_runtime.providers import PROVIDERS, providers

ONNX_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int64": "tensor(int64)",
    "int32": "tensor(int32)",
    "bool": "tensor(bool)",
}
"""Our names of numbers, and onnxruntime's."""


class Graphs:
    """The sessions of a policy; several policies may share them, because they keep no state."""

    def __init__(self, folder: Path, manifest: Manifest, provider: str, threads: int) -> None:
        require_fit(folder / FILE, manifest)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what goes wrong comes as an exception
        # else onnxruntime guesses from the bytes, and its own format has not been searched
        options.add_session_config_entry("session.load_model_format", "ONNX")
        where = providers(provider, manifest.weights)
        sessions = {
            graph.name: _session(folder / graph.file, graph, options, where)
            for graph in manifest.graphs.values()
        }
        # (graph, session) in their order, of a later and of a first decision
        self._orders = [
            [(one, sessions[one.name]) for one in order(manifest, first)] for first in (False, True)
        ]
        for session in sessions.values():
            begun = session.get_providers()[0]
            if begun != PROVIDERS[provider]:
                raise ExportError(
                    f"onnxruntime could not begin with provider {provider} and fell back on"
                    f" {begun}: libraries that it needs are missing, or do not fit this machine's"
                    " driver"
                )

    def run(self, given: Mapping[str, np.ndarray], first: bool) -> dict[str, np.ndarray]:
        """The last graph's outputs by name, for the arrays that the runtime gives.

        first: this is an episode's first decision. Raises `ExportError` where onnxruntime fails.
        """
        known = dict(given)
        outputs: dict[str, np.ndarray] = {}
        for graph, session in self._orders[first]:
            feed = {
                name: np.ascontiguousarray(known[name], dtype=array.dtype)
                for name, array in graph.inputs.items()
            }
            names = list(graph.outputs)
            try:
                values: Any = session.run(names, feed)
            except Exception as error:  # onnxruntime raises a dozen types that have no common one
                reason = " ".join(str(error).split())
                raise ExportError(f"graph {graph.name} failed as it ran: {reason}") from None
            outputs = dict(zip(names, values, strict=True))
            known.update(outputs)
        return outputs


def _session(
    file: Path, graph: Graph, options: Any, where: list[tuple[str, dict[str, Any]]]
) -> onnxruntime.InferenceSession:
    """The session of a graph, made from the very bytes that were checked."""
    if not file.is_file():
        raise ExportError(f"{file} is missing: the manifest names it as graph {graph.name}")
    if file.is_symlink():
        raise ExportError(f"{file} is a link: copy the file itself into the folder")
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != graph.sha256:
        raise ExportError(
            f"{file} is damaged: its sha256 is not the manifest's; copy the folder again"
        )
    opset = _require_own(file, data)
    try:
        session = onnxruntime.InferenceSession(data, options, providers=where)
    except Exception as error:  # onnxruntime raises a dozen types that have no common one
        reason = " ".join(str(error).split())
        raise ExportError(
            f"{file} uses opset {opset} and can't be run by onnxruntime {onnxruntime.__version__};"
            f" a newer one may: {reason}"
        ) from None
    _require_same(file, "input", graph.inputs, session.get_inputs())
    _require_same(file, "output", graph.outputs, session.get_outputs())
    return session


def _require_own(file: Path, data: bytes) -> int:
    """Raises `ExportError` where a graph uses more than itself and ONNX's operators; returns its
    opset.
    """
    try:
        found = onnx_file.read(data)
    except ValueError as error:
        raise ExportError(f"{file} is no ONNX file: {error}") from None
    if found.outside:
        raise ExportError(
            f"{file} keeps weights in another file, which is not opened: all must be in the graph"
        )
    if found.foreign is not None:
        raise ExportError(
            f"{file} uses the operator {found.foreign}; only ONNX's own operators are run"
        )
    return found.opset


def _require_same(file: Path, what: str, said: Mapping[str, Any], has: Sequence[Any]) -> None:
    """Raises `ExportError` unless a graph's inputs or outputs are those of the manifest."""
    there = {one.name: f"{one.type} {list(one.shape)}" for one in has}
    named = {name: f"{ONNX_TYPES[one.dtype]} {list(one.shape)}" for name, one in said.items()}
    for name in (*named, *there):
        if there.get(name) != named.get(name):
            raise ExportError(
                f"{file}: its {what} {name} is {there.get(name, 'missing')};"
                f" the manifest says {named.get(name, 'nothing of it')}"
            )

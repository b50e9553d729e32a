"""The manifest of an exported policy: data, read and checked before anything else is opened."""

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genpolicy_runtime.errors import ExportError
from genpolicy_runtime.fields import Fields

FILE = "manifest.json"
FORMAT = "genpolicy-export"
VERSION = 1
"""The newest version of the format that is read."""
DTYPES = ("float32", "float16", "int64", "int32", "bool")
"""Numbers that a graph's inputs and outputs may have."""
RATES = (1e-3, 1e5)
"""The least and the largest rate, in Hz."""
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""The name of a file beside the manifest: no folder is in it."""
CHECKSUM = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Array:
    """An input or an output of a graph."""

    shape: tuple[int, ...]
    dtype: str  # one of `DTYPES`

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Graph:
    """A graph's file, and what goes in and comes out, by name."""

    name: str
    file: str  # beside the manifest
    sha256: str  # of the file, hexadecimal
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


@dataclass(frozen=True)
class Observed:
    """One frame of an observation."""

    kind: str  # "vector" or "image"
    shape: tuple[int, ...]  # [D], or [3,H,W]


@dataclass(frozen=True)
class Action:
    """The actions of one decision: ``planned`` T of them, of which ``executed`` are carried out."""

    dim: int  # D
    planned: int
    executed: int
    # the limits that actions are clipped to, [D], infinite where there is none; None: not known
    low: tuple[float, ...] | None
    high: tuple[float, ...] | None
    units: str


@dataclass(frozen=True)
class Instruction:
    """The instruction of a policy of vision and language, as it was exported."""

    text: str
    tokens: Mapping[str, np.ndarray]  # by the graph's input; none where it is a constant of it


@dataclass(frozen=True)
class State:
    """The plan that a decision leaves to the next one."""

    input: str
    output: str
    shape: tuple[int, ...]  # [T,D]
    first: str  # graph of an episode's first decision
    later: str  # graph of the others


@dataclass(frozen=True)
class Manifest:
    """An exported policy, in data. Shapes have no batch dimension."""

    made_with: Mapping[str, Any]
    weights: str  # sha256 of the policy's weights
    graphs: Mapping[str, Graph]
    observation: Mapping[str, Observed]
    history: int  # frames that the policy sees, one per tick
    noise: tuple[int, ...]  # [draws,T,D]
    action: Action
    rate_hz: float | None  # of the task that it was trained for
    instruction: Instruction | None
    state: State | None
    sampler: Mapping[str, Any]
    evaluations: float  # of the network, per decision
    parity: Mapping[str, Any]


def read(folder: Path) -> Manifest:
    """Returns the manifest of an exported folder; raises `ExportError`."""
    if not folder.is_dir():
        raise ExportError(f"{folder} is no folder: name one that `genpolicy export` wrote")
    if not (folder / FILE).is_file():
        raise ExportError(f"{folder} has no {FILE}: it is no policy that `genpolicy export` wrote")
    if (folder / FILE).is_symlink():
        raise ExportError(f"{folder / FILE} is a link: copy the file itself into the folder")
    found = Fields.read(folder / FILE)
    if found.value("format") != FORMAT:
        raise found.wrong("format", repr(FORMAT))
    version = found.integer("version")
    if version > VERSION:
        raise ExportError(
            f"{folder / FILE} has version {version}, and this genpolicy-runtime reads up to"
            f" {VERSION}: pip install --upgrade genpolicy-runtime"
        )
    named = found.fields("graphs")
    return Manifest(
        made_with=found.fields("made_with").values,
        weights=_checksum(found, "weights"),
        graphs={name: _graph(name, named.fields(name)) for name in named.values},
        observation=_observation(found.fields("observation")),
        history=found.integer("history"),
        noise=found.fields("noise").shape("shape", least=0),
        action=_action(found.fields("action")),
        rate_hz=None if found.none("rate_hz") else found.between("rate_hz", *RATES),
        instruction=None if found.none("instruction") else _said(found.fields("instruction")),
        state=None if found.none("state") else _state(found.fields("state")),
        sampler=found.fields("sampler").values,
        evaluations=found.positive("evaluations"),
        parity=found.fields("parity").values,
    )


def _graph(name: str, found: Fields) -> Graph:
    file = found.text("file")
    if not PLAIN.fullmatch(file):
        raise found.wrong("file", "the plain name of a file in the exported folder itself")
    inputs, outputs = (_arrays(found.fields(key)) for key in ("inputs", "outputs"))
    return Graph(name, file, _checksum(found, "sha256"), inputs, outputs)


def _arrays(found: Fields) -> dict[str, Array]:
    return {name: _array(found.fields(name)) for name in found.values}


def _array(found: Fields) -> Array:
    return Array(found.shape("shape", least=0), found.one_of("dtype", DTYPES))


def _checksum(found: Fields, key: str) -> str:
    if not CHECKSUM.fullmatch(found.text(key)):
        raise found.wrong(key, "a sha256 of 64 hexadecimal digits")
    return found.text(key)


def _observation(found: Fields) -> dict[str, Observed]:
    if not found.values:
        raise ExportError(f"{found.file}: observation is empty: a policy that acts sees something")
    seen: dict[str, Observed] = {}
    for name in found.values:
        one = found.fields(name)
        seen[name] = Observed(one.one_of("kind", ("vector", "image")), one.shape("shape"))
        image = seen[name].kind == "image"
        if len(seen[name].shape) != (3 if image else 1) or (image and seen[name].shape[0] != 3):
            raise one.wrong("shape", "[3,H,W]" if image else "[D]")
    return seen


def _action(found: Fields) -> Action:
    dim, planned, executed = (found.integer(key) for key in ("dim", "planned", "executed"))
    if executed > planned:
        raise found.wrong("executed", f"at most planned, which is {planned}")
    low = None if found.none("low") else found.limits("low", dim, -math.inf)
    high = None if found.none("high") else found.limits("high", dim, math.inf)
    if low is not None and high is not None and any(map(operator.gt, low, high)):
        raise found.wrong("low", f"nowhere above high, which is {list(high)}")
    return Action(dim, planned, executed, low, high, found.text("units"))


def _said(found: Fields) -> Instruction:
    named, tokens = found.fields("tokens"), {}
    for name in named.values:
        one = named.fields(name)
        array, values = _array(one), one.value("values")
        try:
            tokens[name] = np.array(values).astype(array.dtype, casting="same_kind")
            tokens[name] = tokens[name].reshape(array.shape)
        except (TypeError, ValueError, OverflowError):
            raise one.wrong("values", f"numbers that make an array {array}") from None
    return Instruction(found.text("text"), tokens)


def _state(found: Fields) -> State:
    return State(
        input=found.text("input"),
        output=found.text("output"),
        shape=found.shape("shape"),
        first=found.text("first"),
        later=found.text("later"),
    )

"""Reads from an ONNX file, before onnxruntime does, what decides whether it may be run: its opset,
the operators that are not ONNX's own, and the files that it would open.

An ONNX file is a protobuf message: fields of (number, wire type) and a value, nested.
"""

from collections.abc import Iterator
from dataclasses import dataclass

STANDARD = ("", "ai.onnx")
"""The names of the set of operators that is ONNX's own."""

PARTS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 8: "opset", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {
        5: "tensor",
        6: "graph",
        10: "tensor",
        11: "graph",
        22: "sparse",
        23: "sparse",
    },
    "sparse": {1: "tensor", 2: "tensor"},
}
"""The messages that are looked into: a message's name -> field number -> the message there."""

NODE_DOMAIN, NODE_OPERATOR = 7, 4
OPSET_DOMAIN, OPSET_VERSION = 1, 2
TENSOR_FILE, TENSOR_PLACE = 13, 14
"""Field numbers: of a tensor, the entries that name its file, and whether it lies in one."""


@dataclass(frozen=True)
class OnnxFile:
    """The facts of an ONNX file.

    opset: version of ONNX's operators that it uses. foreign: its first
    operator that is not ONNX's own, "domain:name"; None where there is none. outside: True where a
    tensor lies in another file.
    """

    opset: int
    foreign: str | None
    outside: bool


NAMES = {("node", NODE_DOMAIN), ("node", NODE_OPERATOR), ("opset", OPSET_DOMAIN)}
"""The texts that are read: (message, field number)."""
NUMBERS = {("opset", OPSET_VERSION), ("tensor", TENSOR_PLACE)}
"""The whole numbers that are read: (message, field number)."""

OWN_FORMAT = b"ORTM"
"""Bytes 4 to 8 of a file that onnxruntime takes for one of its own format, which is no ONNX."""
DEEPEST = 100
"""Messages inside one another, at most: as deep as protobuf itself goes."""


def read(data: bytes) -> OnnxFile:
    """Returns the facts of an ONNX file; raises `ValueError` where it is none."""
    if data[4:8] == OWN_FORMAT:
        raise ValueError("its bytes 4 to 8 are those of onnxruntime's own format")
    opset, foreign, outside = 0, None, False
    for kind, found in _messages("model", memoryview(data), DEEPEST):
        if kind == "opset" and found.get(OPSET_DOMAIN, "") in STANDARD:
            opset = max(opset, int(found.get(OPSET_VERSION, 0)))
        if kind == "node" and found.get(NODE_DOMAIN, "") not in STANDARD:
            foreign = foreign or f"{found[NODE_DOMAIN]}:{found.get(NODE_OPERATOR, '')}"
        if kind == "tensor" and (TENSOR_FILE in found or found.get(TENSOR_PLACE, 0) != 0):
            outside = True
    if opset == 0:
        raise ValueError("it names no opset")
    return OnnxFile(opset, foreign, outside)


def _messages(
    kind: str, message: memoryview, depth: int
) -> Iterator[tuple[str, "dict[int, str | int]"]]:
    """A message and those in it, the innermost first: its name, and what is read of it by field
    number. No more of them is in memory than lie inside one another, ``depth`` at most.
    """
    if depth == 0:
        raise ValueError(f"it has more than {DEEPEST} messages inside one another")
    parts = PARTS.get(kind, {})
    found: dict[int, str | int] = {}
    for field, value in _fields(message):
        if isinstance(value, int):
            if (kind, field) in NUMBERS:
                found[field] = value
        elif field in parts:
            yield from _messages(parts[field], value, depth - 1)
        elif (kind, field) in NAMES:
            found[field] = bytes(value).decode("utf-8")
        elif kind == "tensor" and field == TENSOR_FILE:
            found[field] = "a file"
    yield kind, found


def _fields(message: memoryview) -> Iterator[tuple[int, "memoryview | int"]]:
    """The fields of a message in their order: a number, or the bytes of a text or of a message."""
    place = 0
    while place < len(message):
        begun = place
        tag, place = _varint(message, place)
        # what protobuf never writes, and another reader may take for something else
        if tag < 8 or tag >= 2**32 or (place > begun + 1 and message[place - 1] == 0):
            raise ValueError("it has a field without a valid number")
        wire = tag & 7
        if wire == 0:
            value, place = _varint(message, place)
            yield tag >> 3, value
            continue
        size, start = {1: (8, place), 5: (4, place)}.get(wire, (0, place))
        if wire == 2:
            size, start = _varint(message, place)
        elif size == 0:
            raise ValueError(f"it has wire type {wire}")
        place = start + size
        if place > len(message):
            raise ValueError("it has a field that is longer than the file")
        if wire == 2:
            yield tag >> 3, message[start:place]


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """A whole number of up to ten bytes, seven bits each, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(message):
            raise ValueError("it has a number that the file's end cuts")
        byte = message[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("it has a number of more than ten bytes")

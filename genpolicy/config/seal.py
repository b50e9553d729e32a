"""Checksums: a JSON object that tells when one of its bytes has changed, and digests of files."""

import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genpolicy.config.documents import json_value

SEAL = re.compile(r',\s*"crc32": (\d+)\s*}\s*$')
"""The last key of a sealed object: the CRC-32 of all bytes before its comma."""

MARK = re.compile(r"# crc32: (\d+)\s*$")
"""The last line of a marked YAML: the CRC-32 of all bytes before it."""


def sealed(data: Mapping[str, Any], indent: int | None = None) -> str:
    """A JSON object of at least one key, with its checksum "crc32" as the last key."""
    body = json.dumps(data, indent=indent).removesuffix("}").rstrip()
    between = " " if indent is None else "\n" + " " * indent
    end = "" if indent is None else "\n"
    return f'{body},{between}"crc32": {zlib.crc32(body.encode())}{end}}}'


def unsealed(text: str) -> dict[str, Any]:
    """The object of a text, without its checksum; one that was written without is read as it is.

    Raises `ValueError` where a byte has changed, and for a text that is no JSON object.
    """
    found = SEAL.search(text)
    if found is not None:
        body = text[: found.start()]
        if zlib.crc32(body.encode()) != int(found[1]):
            raise ValueError("its checksum crc32 does not fit what it says")
        text = f"{body}}}"
    data = json_value(text, "it")
    if not isinstance(data, dict):
        raise ValueError("it is no JSON object")
    return data


def marked(text: str) -> str:
    """A YAML with its checksum in a comment at the end."""
    return f"{text}# crc32: {zlib.crc32(text.encode())}\n"


def edited(text: str) -> bool:
    """True where the checksum of a YAML (`marked`) does not fit it any more, or is gone."""
    found = MARK.search(text)
    return found is None or zlib.crc32(text[: found.start()].encode()) != int(found[1])


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in a folder and its folders, by path relative to it, in order."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _digest(path) for path in files}


def changed(folder: Path, known: Mapping[str, str]) -> str:
    """The first file whose digest is not the ``known`` one any more, as "PATH is missing" or "PATH
    is not as it was written"; empty where all are as they were.
    """
    for name, digest in known.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if _digest(path) != digest:
            return f"{path} is not as it was written"
    return ""


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

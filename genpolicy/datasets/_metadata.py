"""Reads metadata.jsonl of a folder of pictures, as the hub's tools write it: a JSON object per
line, with names of files relative to the folder and a caption.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from genpolicy.config.documents import json_value

METADATA = "metadata.jsonl"


def entries(
    folder: Path, files: Sequence[str], caption: str
) -> Iterator[tuple[int, list[Path], str]]:
    """The number of each line that is not empty, from 1, the files that it names by the keys
    ``files``, and its caption.

    Raises `ValueError` with the line's number for one that has no such keys, or names a file that
    is not there or outside of the folder.
    """
    metadata = folder / METADATA
    try:
        text = metadata.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{metadata} is no UTF-8 text: {error}") from None
    home = folder.resolve()
    # JSON's own line ends only: captions may contain other separators of lines
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        *names, told = _values(line, [*files, caption], place(folder, number))
        found = [folder / name for name in names]
        for name, file in zip(names, found, strict=True):
            if not file.resolve().is_relative_to(home) or not file.is_file():
                raise ValueError(f"{place(folder, number)}: there is no file {name} in {folder}")
        yield number, found, told


def place(folder: Path, number: int) -> str:
    """A line of a folder's metadata, in words."""
    return f"{folder / METADATA}, line {number}"


def _values(line: str, keys: Sequence[str], where: str) -> list[str]:
    """The texts that a line has by these keys."""
    told = f"{', '.join(keys[:-1])} and {keys[-1]}"
    try:
        entry = json_value(line, where)
        values = [entry[key] for key in keys]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{where}: it must be a JSON object with {told}") from None
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"{where}: {told} must be text")
    return values

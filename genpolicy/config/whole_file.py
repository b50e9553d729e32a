"""Writes files whole: each is written beside its place and renamed, so that nobody, and no later
run after a kill, reads half of one.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STAGED = ".staged."
"""The beginning of the name of a file that is being written."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path of the same suffix in the same folder, which is made; the file written there
    takes the place of ``path`` when the block ends, and is dropped where the block raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f"{STAGED}{path.name}")
    try:
        yield staged
        # the contents reach the disk before the name does: a power cut leaves no empty file
        with open(staged, "rb+") as file:  # Windows syncs no file that can't be written
            os.fsync(file.fileno())
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8."""
    with replacing(path) as staged:
        staged.write_text(text, encoding="utf-8")

"""Writes files whole: each is written beside its place and renamed, so that nobody, and no later
run after a kill, reads half of one.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path of the same suffix in the same folder, which is made; the file written there
    takes the place of ``path`` when the block ends, and is dropped where the block raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".staged.{path.name}")
    try:
        yield staged
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8."""
    with replacing(path) as staged:
        staged.write_text(text, encoding="utf-8")

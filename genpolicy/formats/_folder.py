"""The folder of an export: it appears whole or not at all, and takes the place of an older export
alone.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from genpolicy.config.errors import ConfigError


@contextmanager
def fresh(out: Path, ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Gives an empty folder beside ``out``, which takes its place when the block ends, and is
    dropped where the block raises.

    ours: True for a folder that is an older export, which is replaced. Raises `ConfigError` where
    ``out`` is anything else.
    """
    require_free(out, ours)
    staged = out.with_name(f"{out.name}.staged")
    aside = out.with_name(f"{out.name}.old")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        yield staged
        if out.exists():
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(out, aside)
        os.rename(staged, out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    shutil.rmtree(aside, ignore_errors=True)


def require_free(out: Path, ours: Callable[[Path], bool]) -> None:
    """Raises `ConfigError` where ``out`` is there and no older export (``ours``)."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not ours(out)):
        raise ConfigError(f"--out {out} exists and is no older export: name another folder")

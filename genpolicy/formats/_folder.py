"""The folder of an export: it appears whole or not at all, and takes the place of an older export
alone.
"""

import os
import tempfile
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
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    # names that nobody else has: what lies beside is not ours to remove
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as beside:
        staged = Path(beside) / "staged"
        staged.mkdir()
        yield staged
        if out.exists():
            require_free(out, ours)  # it may have come while the export was written
            os.rename(out, Path(beside) / "old")
        os.rename(staged, out)


def require_free(out: Path, ours: Callable[[Path], bool]) -> None:
    """Raises `ConfigError` where ``out`` is there and no older export (``ours``). A path through
    folders that are not there yet (new/../there) is looked at where it leads.
    """
    out = out.resolve()
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not ours(out)):
        raise ConfigError(f"--out {out} exists and is no older export: name another folder")

"""Writes pairs of pictures or videos as parquet files, whole or not at all."""

import io
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from genpolicy.config.seal import digests, sealed
from genpolicy.datasets._lerobot_import import arrow, quiet
from genpolicy.datasets._pair_files import CAPTION, FIRST, LABEL, SECOND

MADE = "genpolicy.json"
"""The file that says how pairs of ours were made."""
SHARD = 2**28
"""Bytes of pictures after which another file is begun."""
TOGETHER = 100
"""Rows of a row group, as `datasets` has them for pictures: so many are in memory."""


@contextmanager
def recording(
    out: Path, made: Mapping[str, Any]
) -> Iterator[Callable[[str, Tensor, Tensor, bool], None]]:
    """A data set of pairs that is being written to the new folder ``out``: hand it captions, each
    with the preferred picture and the other one, Float[3,H,W] in [0,1] (or videos Float[F,3,H,W]),
    and True where the preferred one is to stand first.

    Leaving it makes the finished folder appear, with ``made`` and the checksums of its files in
    genpolicy.json; leaving it by an exception leaves nothing behind. ``made`` may be completed
    until then. Raises `FileExistsError` if ``out`` exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already: choose another folder, or delete it")
    staged = out.with_name(f".{out.name}.staged")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        with quiet():
            shards = _Shards(staged, _schema())
            try:
                yield shards.add
            finally:
                shards.close()
        told = sealed({**made, "files": digests(staged)}, indent=2)
        (staged / MADE).write_text(told + "\n", encoding="utf-8")
        staged.rename(out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _schema() -> Any:
    """The columns as Arrow says them, with what tells `datasets` and the hub which are pictures."""
    from datasets import Features, Image, Value

    return Features(
        {
            FIRST: Image(),
            SECOND: Image(),
            LABEL: Value("float64"),
            "label_1": Value("float64"),
            CAPTION: Value("string"),
        }
    ).arrow_schema


@dataclass
class _Shards:
    """Files of at most `SHARD` bytes and a row group, each closed before the next is begun."""

    folder: Path
    schema: Any
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _writer: Any = None
    _bytes: int = 0  # of the pictures in the file that is open
    _count: int = 0  # of files

    def add(self, caption: str, preferred: Tensor, other: Tensor, first: bool) -> None:
        """Adds one pair, whose preferred picture stands first or second."""
        pictures = [_encoded(picture) for picture in (preferred, other)]
        stored = [{"bytes": content, "path": None} for content in pictures]
        if not first:
            stored.reverse()
        label = float(first)
        self._rows.append(
            dict(zip(self.schema.names, (*stored, label, 1 - label, caption), strict=True))
        )
        self._bytes += sum(map(len, pictures))
        if self._bytes >= SHARD:
            self.close()
        elif len(self._rows) == TOGETHER:
            self._flush()

    def close(self) -> None:
        """Closes the file that is open."""
        self._flush()
        if self._writer is not None:
            self._writer.close()
        self._writer, self._bytes = None, 0

    def _flush(self) -> None:
        """Writes the rows that wait as one row group."""
        if not self._rows:
            return
        if self._writer is None:
            self._writer = arrow().parquet.ParquetWriter(
                self.folder / f"train-{self._count:05d}.parquet",
                self.schema,
                write_page_checksum=True,
            )
            self._count += 1
        self._writer.write_table(arrow().Table.from_pylist(self._rows, schema=self.schema))
        self._rows.clear()


def _encoded(picture: Tensor) -> bytes:
    """A picture Float[3,H,W] in [0,1] as a PNG, a video Float[F,3,H,W] as a TIFF of its frames:
    rounded to bytes and without further loss. (Pillow joins equal frames in its other formats.)
    """
    pixels = (picture.clamp(0, 1) * 255).round().byte().movedim(-3, -1).numpy()
    file = io.BytesIO()
    if pixels.ndim == 3:
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()
    first, *others = [Image.fromarray(frame) for frame in pixels]
    first.save(file, "TIFF", save_all=True, append_images=others, compression="tiff_adobe_deflate")
    return file.getvalue()

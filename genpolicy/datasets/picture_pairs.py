"""Pairs of pictures, or of videos, one of which was preferred, in parquet files as Pick-a-Pic has
them.

Their columns are jpg_0 and jpg_1 (the files of two pictures), caption, and label_0: 1 where the
first is preferred, 0 where the second is, .5 where none is. Other columns are not read. A video is
a file of several pictures (TIFF, as `genpolicy pairs` writes it).
"""

import glob
import io
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from genpolicy.contracts.task import Context
from genpolicy.datasets._lerobot_import import arrow, quiet
from genpolicy.datasets._pair_files import (
    CAPTION,
    COLUMNS,
    FIRST,
    SECOND,
    PairFiles,
    pair_files,
)
from genpolicy.datasets._pair_writer import recording
from genpolicy.datasets._pictures import read, read_frames, require_pixels, stacked

COPIED = 100
"""Rows that are copied together from the parquet files."""


@dataclass(eq=False)
class PicturePairs:
    """The pairs of a folder of parquet files, as `genpolicy.contracts.dataset.Pairs`, in the order
    of the files' names and of the rows in them; ties are left out.

    Hugging Face's `datasets` copies them once to its cache, uncompressed, from where rows are read
    without the rest. A picture of another size is scaled to cover ``height`` x ``width`` and cut
    around its middle.
    """

    root: str  # the folder
    height: int  # pixels
    width: int  # pixels
    frames: int | None = None  # of each video; None: pictures
    # what the names of its files begin with (train-00000-of-00645.parquet); None: the only one
    split: str | None = None
    ties: int = field(init=False)  # rows that were left out
    _files: PairFiles = field(init=False, repr=False)
    _table: Any = field(init=False, repr=False)
    _rows: Tensor = field(init=False, repr=False)  # of the files, without the ties [R]

    def __post_init__(self) -> None:
        require_pixels(self.height, self.width)
        if self.frames is not None and self.frames < 1:
            raise ValueError(f"frames is {self.frames}; it must be at least 1, or null of pictures")
        with quiet():
            self._files = pair_files(Path(self.root), self.split)
        self._table = _mapped(self._files)  # with the library's bar: it may copy for long
        decided = self._files.labels != 0.5
        self._rows = decided.nonzero().flatten()
        self.ties = int((~decided).sum())
        if not len(self._rows):
            raise ValueError(f"all {self.ties} pairs in {self.root} are ties")

    @staticmethod
    def recording(
        out: Path, made: Mapping[str, Any]
    ) -> AbstractContextManager[Callable[[str, Tensor, Tensor, bool], None]]:
        """A new folder of pairs that is being written: see
        `genpolicy.datasets._pair_writer.recording`.
        """
        return recording(out, made)

    def __len__(self) -> int:
        """The number of pairs, without ties."""
        return len(self._rows)

    def pictures(self, index: Tensor) -> tuple[Context, Tensor]:
        """The captions and the preferred pictures Float[B,3,H,W] in [0,1] of the rows ``index``
        [B]; with ``frames`` F videos Float[B,F,3,H,W].
        """
        rows = self._rows[index]
        found = self._found(rows)
        return Context(found[CAPTION]), self._read(found, rows, preferred=True)

    def pairs(self, index: Tensor) -> tuple[Context, Tensor, Tensor]:
        """See `genpolicy.contracts.dataset.Pairs`."""
        rows = self._rows[index]
        found = self._found(rows)
        preferred = self._read(found, rows, preferred=True)
        return Context(found[CAPTION]), preferred, self._read(found, rows, preferred=False)

    def _found(self, rows: Tensor) -> dict[str, list[Any]]:
        """The columns of the files' rows, as they are stored."""
        if not len(rows):
            return {name: [] for name in COLUMNS}
        return self._table[rows.tolist()].to_pydict()

    def _read(self, found: dict[str, list[Any]], rows: Tensor, preferred: bool) -> Tensor:
        """One side of the pairs, as `pictures` has them. Raises `ValueError` for a picture that is
        missing or can't be read, and names its row.
        """
        pictures = []
        for number, row in enumerate(rows.tolist()):
            first = (self._files.labels[row] == 1) == preferred
            name = FIRST if first else SECOND
            stored = found[name][number]
            content = stored["bytes"] if isinstance(stored, dict) else stored
            where = f"{self._files.place(row)}: {name}"
            if not content:
                raise ValueError(f"{where} has no picture in the file")
            file, size = io.BytesIO(content), (self.height, self.width)
            pictures.append(
                read(file, *size, where)
                if self.frames is None
                else read_frames(file, *size, where, self.frames)
            )
        frames = () if self.frames is None else (self.frames,)
        return stacked(pictures, (*frames, 3, self.height, self.width))


def _mapped(files: PairFiles) -> Any:
    """The rows of parquet files as a table that is mapped into memory, not read. To copy them takes
    the memory of a row group, once.

    The pictures are bytes to it, and nothing is decoded: paths that stand beside them, which may
    lead anywhere, are not followed.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError
    from pyarrow.dataset import ParquetFragmentScanOptions

    scan = ParquetFragmentScanOptions(
        use_buffered_stream=True, pre_buffer=False, page_checksum_verification=True
    )
    names: list[Any] = [glob.escape(str(file.absolute())) for file in files.files]
    try:
        table = datasets.Dataset.from_parquet(
            names,
            features=datasets.Features.from_arrow_schema(files.schema),
            columns=list(COLUMNS),
            fragment_scan_options=scan,
            batch_size=COPIED,
        )
    except DatasetGenerationError as error:
        raise ValueError(f"{files.files[0].parent} can't be read: {error.__cause__}") from None
    arrow().default_memory_pool().release_unused()  # a row group, while it was copied
    return table.with_format("arrow")

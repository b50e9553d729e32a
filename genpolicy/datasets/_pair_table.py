"""Pairs of pictures as the rows of parquet files, mapped into memory."""

import glob
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genpolicy.datasets._lerobot_import import arrow, quiet
from genpolicy.datasets._pair_files import CAPTION, COLUMNS, FIRST, SECOND, PairFiles, pair_files

COPIED = 100
"""Rows that are copied together from the parquet files."""


class PairTable:
    """The rows of a folder's parquet files. labels [R]: Float64.

    Raises `ValueError` and `FileNotFoundError` as `pair_files` does, and for the first row that is
    no tie and has no picture.
    """

    def __init__(self, folder: Path, split: str | None) -> None:
        with quiet():
            self._files = pair_files(folder, split)
        self.labels: Tensor = self._files.labels
        self._table = _mapped(self._files)  # with the library's bar: it may copy for long
        for side in (0, 1):
            self._require_contents(side)

    def place(self, row: int, side: int) -> str:
        """A picture of a row, in words."""
        return f"{self._files.place(row)}: {(FIRST, SECOND)[side]}"

    def read(self, rows: Sequence[int]) -> tuple[list[str], list[tuple[io.BytesIO, io.BytesIO]]]:
        """The captions of the rows, and the files of both their pictures."""
        found = self._table[rows].to_pydict()
        sides = zip(found[FIRST], found[SECOND], strict=True)
        return found[CAPTION], [(_file(first), _file(second)) for first, second in sides]

    def _require_contents(self, side: int) -> None:
        """Raises `ValueError` for the first row, no tie, without this picture; its length tells,
        and it is not read.
        """
        compute = arrow().compute
        stored = self._table.data.column((FIRST, SECOND)[side])
        if arrow().types.is_struct(stored.type):
            stored = compute.struct_field(stored, "bytes")
        lengths = compute.fill_null(compute.binary_length(stored), 0).to_numpy()
        missing = (torch.from_numpy(lengths == 0) & (self.labels != 0.5)).nonzero().flatten()
        if len(missing):
            raise ValueError(f"{self.place(int(missing[0]), side)} has no picture in the file")


def _file(stored: Any) -> io.BytesIO:
    """A picture's bytes as a file; as the hub's Image feature has them, or alone."""
    content = stored["bytes"] if isinstance(stored, dict) else stored
    return io.BytesIO(content or b"")


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

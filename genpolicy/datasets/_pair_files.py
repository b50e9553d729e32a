"""The parquet files of pairs of pictures: their columns, and the labels and captions of their rows,
which are read without the pictures.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genpolicy.datasets._lerobot_import import arrow

FIRST, SECOND, LABEL, CAPTION = "jpg_0", "jpg_1", "label_0", "caption"
COLUMNS = (FIRST, SECOND, LABEL, CAPTION)
LABELS = (1.0, 0.0, 0.5)
"""The first picture is preferred, the second, none of them."""
BATCH = 1024
"""Rows of labels and captions that are looked at together."""


@dataclass(frozen=True, eq=False)
class PairFiles:
    """Files whose rows are numbered one file after the other.

    starts [files]: the number of each file's first row. labels [R]: Float64, of all rows.
    schema: of `COLUMNS`, as Arrow says it.
    """

    files: Sequence[Path]
    starts: Tensor
    labels: Tensor
    schema: Any

    def place(self, row: int) -> str:
        """The file of a row and its number there, in words."""
        file = int(torch.bucketize(row, self.starts, right=True)) - 1
        return _place(self.files[file], row - int(self.starts[file]))


def pair_files(folder: Path, split: str | None) -> PairFiles:
    """The files of a folder, or those of one of its splits, in the order of their names.

    Raises `ValueError` and `FileNotFoundError` with one sentence for files that hold no such pairs,
    and for the first row whose label or caption is none.
    """
    files = _files(folder, split)
    schema = _schema(files[0])
    labels = []
    for file in files:
        if _schema(file) != schema:
            raise ValueError(f"{file} holds its columns {', '.join(COLUMNS)} not as {files[0]}")
        labels.append(_labels(file))
    counts = torch.tensor([len(one) for one in labels])
    if not counts.sum():
        raise ValueError(f"the parquet files in {folder} have no rows")
    every = torch.from_numpy(np.concatenate(labels))
    return PairFiles(files, counts.cumsum(0) - counts, every, schema)


def _files(folder: Path, split: str | None) -> list[Path]:
    """The files of a folder's split; None is its only one."""
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"{folder} is no folder of parquet files")
    splits = sorted({_split(file) for file in files})
    if split is None and len(splits) > 1:
        raise ValueError(f"{folder} holds several splits, {', '.join(splits)}: name one as split")
    if split is not None and split not in splits:
        raise ValueError(f"{folder} has no split {split!r}; valid are {', '.join(splits)}")
    return [file for file in files if split is None or _split(file) == split]


def _split(file: Path) -> str:
    """The name of a file's split, which is what stands before the numbers: train of
    train-00000-of-00645.parquet; empty where nothing does.
    """
    found = re.match(r"[A-Za-z_]*", file.stem)
    return found[0].strip("_") if found else ""


def _schema(file: Path) -> Any:
    """The kinds of a file's `COLUMNS`, of which every row is read; `ValueError` for others."""
    kinds = arrow().types
    try:
        schema = arrow().parquet.read_schema(file)
    except (arrow().ArrowException, OSError) as error:
        raise ValueError(f"{file} is no parquet file that can be read: {error}") from None
    missing = [name for name in COLUMNS if schema.get_field_index(name) < 0]
    if missing:
        raise ValueError(
            f"{file} has no {missing[0]}: pairs of pictures are the columns {', '.join(COLUMNS)}"
        )
    for name in (FIRST, SECOND):
        kind = schema.field(name).type
        if kinds.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if not (kinds.is_binary(kind) or kinds.is_large_binary(kind)):
            raise ValueError(f"{file}: {name} is {kind}, and must be the bytes of pictures")
    kind = schema.field(LABEL).type
    if not (kinds.is_floating(kind) or kinds.is_integer(kind)):
        raise ValueError(f"{file}: {LABEL} is {kind}, and must be a number")
    kind = schema.field(CAPTION).type
    if not (kinds.is_string(kind) or kinds.is_large_string(kind)):
        raise ValueError(f"{file}: {CAPTION} is {kind}, and must be text")
    return arrow().schema([schema.field(name).remove_metadata() for name in COLUMNS])


def _labels(file: Path) -> np.ndarray:
    """The labels of a file's rows, Float64, each of which is one of `LABELS` and has a caption."""
    found = [np.zeros(0)]
    first = 0
    try:
        with arrow().parquet.ParquetFile(file, page_checksum_verification=True) as opened:
            for batch in opened.iter_batches(BATCH, columns=[LABEL, CAPTION]):
                labels = batch.column(LABEL).to_pandas().to_numpy(dtype=float)
                _require_labels(labels, file, first)
                _require_captions(batch.column(CAPTION), file, first)
                found.append(labels)
                first += len(labels)
    except (arrow().ArrowException, OSError) as error:
        raise ValueError(f"{file} can't be read: {error}") from None
    return np.concatenate(found)


def _require_labels(labels: np.ndarray, file: Path, first: int) -> None:
    wrong = (~np.isin(labels, LABELS)).nonzero()[0]
    if len(wrong):
        row = int(wrong[0])
        told = "missing" if np.isnan(labels[row]) else f"{labels[row]:g}"
        raise ValueError(
            f"{_place(file, first + row)}: {LABEL} is {told}; it must be 1 where the first picture"
            " is preferred, 0 where the second is, .5 where none is"
        )


def _require_captions(captions: Any, file: Path, first: int) -> None:
    for row, caption in enumerate(captions):
        try:
            text = caption.as_py()
        except UnicodeDecodeError:
            told = f"{_place(file, first + row)}: its {CAPTION} is no UTF-8 text"
            raise ValueError(told) from None
        if text is None or not text.strip():
            raise ValueError(f"{_place(file, first + row)}: its {CAPTION} is empty")


def _place(file: Path, row: int) -> str:
    return f"{file}, row {row} (the first is 0)"

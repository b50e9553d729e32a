"""Pairs of pictures, or of videos, one of which was preferred: in parquet files as Pick-a-Pic has
them, or as files of a folder.

The columns of parquet files are jpg_0 and jpg_1 (the files of two pictures), caption, and label_0:
1 where the first is preferred, 0 where the second is, .5 where none is. Other columns are not read.
A folder of files has one metadata.jsonl, each line of which is {"chosen_file_name": "0.png",
"rejected_file_name": "1.png", "caption": "a red circle"}, file names relative to the folder. A
video is a file of several pictures (TIFF, as `genpolicy pairs` writes it).
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from genpolicy.contracts.task import Context
from genpolicy.datasets._metadata import METADATA
from genpolicy.datasets._pair_folder import PairFolder
from genpolicy.datasets._pair_table import PairTable
from genpolicy.datasets._pair_writer import recording
from genpolicy.datasets._pictures import read, read_frames, require_pixels, stacked


@dataclass(eq=False)
class PicturePairs:
    """The pairs of a folder, as `genpolicy.contracts.dataset.Pairs`, in the order of its
    metadata.jsonl, or of the parquet files' names and of the rows in them; ties are left out.

    Hugging Face's `datasets` copies parquet files once to its cache, uncompressed, from where rows
    are read without the rest. A picture of another size is scaled to cover ``height`` x ``width``
    and cut around its middle.
    """

    root: str  # the folder
    height: int  # pixels
    width: int  # pixels
    frames: int | None = None  # of each video; None: pictures
    # what the names of parquet files begin with (train-00000-of-00645.parquet); None: the only one
    split: str | None = None
    ties: int = field(init=False)  # rows that were left out
    _stored: PairFolder | PairTable = field(init=False, repr=False)
    _rows: Tensor = field(init=False, repr=False)  # of what is stored, without the ties [R]

    def __post_init__(self) -> None:
        require_pixels(self.height, self.width)
        if self.frames is not None and self.frames < 1:
            raise ValueError(f"frames is {self.frames}; it must be at least 1, or null of pictures")
        self._stored = _stored(Path(self.root), self.split)
        decided = self._stored.labels != 0.5
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
        context, preferred = self._read(index, (True,))
        return context, preferred

    def pairs(self, index: Tensor) -> tuple[Context, Tensor, Tensor]:
        """See `genpolicy.contracts.dataset.Pairs`."""
        context, preferred, other = self._read(index, (True, False))
        return context, preferred, other

    def _read(self, index: Tensor, asked: tuple[bool, ...]) -> tuple[Any, ...]:
        """The captions, and the preferred pictures (True) or the others (False), as `pictures` has
        them. Raises `ValueError` for a picture that can't be read, and names its row.
        """
        rows: list[int] = self._rows[index].tolist()
        captions, files = self._stored.read(rows) if rows else ([], [])
        frames, size = self.frames, (self.height, self.width)
        found = []
        for preferred in asked:
            pictures = []
            for row, pair in zip(rows, files, strict=True):
                side = int((self._stored.labels[row] == 1) != preferred)
                where = self._stored.place(row, side)
                pictures.append(
                    read(pair[side], *size, where)
                    if frames is None
                    else read_frames(pair[side], *size, where, frames)
                )
            found.append(stacked(pictures, (*(() if frames is None else (frames,)), 3, *size)))
        return Context(captions), *found


def _stored(folder: Path, split: str | None) -> PairFolder | PairTable:
    """The pairs of a folder's metadata.jsonl, or else of its parquet files."""
    if not (folder / METADATA).is_file():
        return PairTable(folder, split)
    if any(folder.glob("*.parquet")):
        raise ValueError(f"{folder} holds both {METADATA} and parquet files: keep one of them")
    if split is not None:
        raise ValueError(f"split is {split!r}, and {folder / METADATA} has none: leave it out")
    return PairFolder(folder)

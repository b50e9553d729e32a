"""Pairs of pictures as files of a folder, which its metadata.jsonl names."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from genpolicy.datasets._metadata import METADATA, entries, place

CHOSEN, REJECTED, CAPTION = "chosen_file_name", "rejected_file_name", "caption"


class PairFolder:
    """The pairs of a folder's metadata.jsonl, each with the picture that was chosen first. labels
    [R]: Float64, all 1.

    Raises `ValueError` with the line's number for one that names no pair or no caption.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lines: list[int] = []
        self._names: list[tuple[str, str]] = []  # relative to the folder
        self._captions: list[str] = []
        for number, files, caption in entries(folder, [CHOSEN, REJECTED], CAPTION):
            if not caption.strip():
                raise ValueError(f"{place(folder, number)}: its {CAPTION} is empty")
            chosen, rejected = (str(file.relative_to(folder)) for file in files)
            self._lines.append(number)
            self._names.append((chosen, rejected))
            self._captions.append(caption)
        if not self._lines:
            raise ValueError(f"{folder / METADATA} names no pair")
        self.labels: Tensor = torch.ones(len(self._lines), dtype=torch.float64)

    def place(self, row: int, side: int) -> str:
        """A picture of a row, in words."""
        return f"{place(self._folder, self._lines[row])}: {self._names[row][side]}"

    def read(self, rows: Sequence[int]) -> tuple[list[str], list[tuple[Path, Path]]]:
        """The captions of the rows, and the files of both their pictures."""
        found = [self._names[row] for row in rows]
        files = [(self._folder / chosen, self._folder / rejected) for chosen, rejected in found]
        return [self._captions[row] for row in rows], files

"""The files of a LeRobotDataset (v3): its description, and the tables of its parquet files, read
without importing lerobot.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genpolicy.config.documents import json_file
from genpolicy.config.seal import changed, unsealed
from genpolicy.datasets._lerobot_import import arrow

INFO = "meta/info.json"
MADE = "meta/genpolicy.json"
"""The file that says how a data set of ours was made, beside LeRobot's own."""


def read_info(folder: Path) -> dict[str, Any]:
    """Reads meta/info.json of a v3 data set."""
    if not folder.is_dir():
        raise FileNotFoundError(f"root {folder} does not exist")
    file = folder / INFO
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is no LeRobotDataset: it has no {INFO}")
    try:
        info = json_file(file)
        version = [
            info[key]
            for key in ("features", "fps", "total_frames", "total_episodes", "codebase_version")
        ][-1]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not version.startswith("v3."):
        raise ValueError(
            f"{folder} is a LeRobotDataset of version {version}; convert it to v3.0 with"
            " python -m lerobot.scripts.convert_dataset_v21_to_v30"
        )
    return info


def check_whole(folder: Path, info: Mapping[str, Any]) -> None:
    """Raises unless every frame and episode is in files that were closed (parquet writes its footer
    last), and where a file of a data set of ours is not as it was written.
    """
    for part, total in (("data", "total_frames"), ("meta/episodes", "total_episodes")):
        counts = [_count(file) for file in _files(folder / part)]
        if not counts or None in counts or sum(filter(None, counts)) != info[total]:
            raise ValueError(
                f"{folder} is incomplete: its recording was cut off before "
                f"LeRobotDataset.finalize(), so that {part} can't be read as {info[total]} "
                f"{total.removeprefix('total_')}; record it again"
            )
    if (folder / MADE).is_file():
        try:
            made = unsealed((folder / MADE).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{folder / MADE} is damaged: {error}") from None
        wrong = changed(folder, made.get("files", {}))
        if wrong:
            raise ValueError(
                f"{wrong}: the data set is damaged; put it back from a copy, or, if you have"
                f" changed it yourself, delete {folder / MADE}"
            )


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.parquet"))  # LeRobot's own order


def _count(file: Path) -> int | None:
    """The number of rows of a parquet file, None if it was never closed or its end is damaged."""
    try:
        return arrow().parquet.read_metadata(file).num_rows
    except (arrow().ArrowInvalid, OSError):
        return None


def read_table(folder: Path, columns: Sequence[str]) -> Any:
    """Reads these columns of all files as one pyarrow table. Raises with the names of those that
    are missing.
    """
    parquet = arrow().parquet
    files = _files(folder)
    have = parquet.read_schema(files[0]).names
    missing = [name for name in columns if name not in have]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}")
    return arrow().concat_tables(parquet.read_table(file, columns=list(columns)) for file in files)


def column_tensor(column: Any, shape: Iterable[int], rows: np.ndarray) -> Tensor:
    """Converts a column of numbers, or of (nested) lists of them, to fp32 [len(rows),*shape]."""
    array = column.combine_chunks()
    library = arrow()
    lists = (library.ListArray, library.LargeListArray, library.FixedSizeListArray)
    # a matrix is an extension type, whose storage is a list of lists
    while isinstance(array, (library.ExtensionArray, *lists)):
        array = array.flatten() if isinstance(array, lists) else array.storage
    values = array.to_numpy(zero_copy_only=False).astype(np.float32)
    return torch.from_numpy(values.reshape(len(column), *shape)[rows])

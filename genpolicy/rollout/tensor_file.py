"""Files of tensors, texts, lists and mappings: written whole, read with their checksums."""

import zipfile
from pathlib import Path
from typing import Any

import torch

from genpolicy.config.whole_file import replacing


def write(path: Path, value: Any) -> None:
    """Writes a whole file or none."""
    with replacing(path) as staged, open(staged, "wb") as file:
        torch.save(value, file)


def read(path: Path) -> Any:
    """Reads a file on the CPU. Raises `ValueError` for one that is cut short, of which a byte has
    changed, or that is not ours.

    torch writes a CRC-32 of every tensor, as a zip archive has it, but does not look at it when it
    reads.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            return torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # zipfile, zlib, pickle and torch each complain in types of their own
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from None
    raise ValueError(f"{path} is damaged: the checksum of {damaged} does not fit")

"""Pictures with captions: a folder of image files and one metadata.jsonl, as the hub's tools write.

Each line of metadata.jsonl is {"file_name": "0001.png", "text": "a red circle"}, file names
relative to the folder.
"""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from genpolicy.config.documents import json_value
from genpolicy.contracts.task import Context
from genpolicy.datasets._pictures import read, require_pixels, stacked

METADATA = "metadata.jsonl"


@dataclass(eq=False)
class CaptionedPictures:
    """The pictures of a folder, as `genpolicy.contracts.dataset.Pictures`.

    A picture of another size is scaled to cover ``height`` x ``width`` and cut around its middle.
    """

    root: str  # the folder
    height: int  # pixels
    width: int  # pixels
    captions: tuple[str, ...] = field(init=False)
    files: tuple[Path, ...] = field(init=False)

    def __post_init__(self) -> None:
        require_pixels(self.height, self.width)
        folder = Path(self.root)
        metadata = folder / METADATA
        if not metadata.is_file():
            raise FileNotFoundError(
                f"{self.root} is no folder of captioned pictures: no {METADATA}"
            )
        try:
            text = metadata.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{metadata} is no UTF-8 text: {error}") from None
        captions: list[str] = []
        files: list[Path] = []
        # JSON's own line ends only: captions may contain other separators of lines
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            name, caption = _entry(line, f"{metadata}, line {number}")
            file = folder / name
            if not file.resolve().is_relative_to(folder.resolve()) or not file.is_file():
                raise ValueError(f"{metadata}, line {number}: there is no file {name} in {folder}")
            captions.append(caption)
            files.append(file)
        if not files:
            raise ValueError(f"{metadata} names no picture")
        self.captions = tuple(captions)
        self.files = tuple(files)

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.files)

    def pictures(self, index: Tensor) -> tuple[Context, Tensor]:
        """The captions and the pictures Float[B,3,H,W] in [0,1] of the rows ``index`` [B]."""
        rows = index.tolist()
        found = [self.files[row] for row in rows]
        pictures = [read(file, self.height, self.width, str(file)) for file in found]
        captions = [self.captions[row] for row in rows]
        return Context(captions), stacked(pictures, (3, self.height, self.width))


def _entry(line: str, where: str) -> tuple[str, str]:
    """The file name and the caption of one line."""
    try:
        entry = json_value(line, where)
        name = entry["file_name"]
        caption = entry["text"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{where}: it must be a JSON object with file_name and text") from None
    if not isinstance(name, str) or not isinstance(caption, str):
        raise ValueError(f"{where}: file_name and text must be text")
    return name, caption

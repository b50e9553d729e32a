"""Pictures with captions: a folder of image files and one metadata.jsonl, as the hub's tools write.

Each line of metadata.jsonl is {"file_name": "0001.png", "text": "a red circle"}, file names
relative to the folder.
"""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from genpolicy.contracts.task import Context
from genpolicy.datasets._metadata import METADATA, entries
from genpolicy.datasets._pictures import read, require_pixels, stacked


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
        captions: list[str] = []
        files: list[Path] = []
        for _, (file,), caption in entries(folder, ["file_name"], "text"):
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

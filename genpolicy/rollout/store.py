"""Episodes on disk: each is written whole when it ends, so that what a robot has done is never
done, or counted, twice.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

FOLDER = "episodes"
"""The folder of episodes in a run's folder: episodes/ITERATION/GROUP-MEMBER-ORIGIN.pt."""


class EpisodeStore:
    """The episodes of one run, by iteration and name. A run that was killed while it collected
    plays only what is missing: an episode is a function of the weights, its seed and its noise, and
    those are the same again after a resume. Where they are not, because somebody has edited the
    experiment meanwhile, the name's last part tells: the origin.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER
        self.pinned: set[int] = set()  # iterations whose episodes are learned from for longer

    def read(self, iteration: int, name: str) -> dict[str, Any] | None:
        """Returns the episode that was written under this name, if there is one."""
        path = self._path(iteration, name)
        return torch.load(path, weights_only=True) if path.is_file() else None

    def write(self, iteration: int, name: str, episode: dict[str, Any]) -> None:
        """Write an episode (tensors, texts, and lists and mappings of them) by staging and one
        rename.
        """
        path = self._path(iteration, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_suffix(".staged")
        with open(staged, "wb") as file:
            torch.save(episode, file)
            file.flush()
            os.fsync(file.fileno())
        os.rename(staged, path)

    def forget_others(self, iteration: int, origin: str) -> None:
        """Delete an iteration's episodes of any other origin."""
        for path in (self.folder / str(iteration)).glob("*.pt"):
            if not path.stem.endswith(f"-{origin}"):
                path.unlink(missing_ok=True)

    def trim(self, iteration: int) -> None:
        """Delete the episodes up to this iteration, from which a run may be resumed, but for those
        that are pinned.
        """
        for folder in self.folder.glob("[0-9]*"):
            if int(folder.name) <= iteration and int(folder.name) not in self.pinned:
                shutil.rmtree(folder)

    def episodes(self, iteration: int) -> list[dict[str, Any]]:
        """All of an iteration, of whatever process, by group and member."""
        names = [path.stem for path in (self.folder / str(iteration)).glob("*.pt")]
        ordered = sorted(names, key=lambda name: [int(number) for number in name.split("-")[:2]])
        return [torch.load(self._path(iteration, name), weights_only=True) for name in ordered]

    def _path(self, iteration: int, name: str) -> Path:
        return self.folder / str(iteration) / f"{name}.pt"

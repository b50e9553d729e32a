"""A LeRobotDataset (v3) of recorded episodes, to learn from and to record.

Vectors are read into memory at once; pictures are decoded all together when the first row asks for
them, or, where they would not fit into memory, whenever a row asks. Vectors come straight from the
parquet files, without importing lerobot; pictures come from LeRobot's own reader.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genpolicy.contracts.dataset import frames
from genpolicy.contracts.task import Context, ControlTask, Demonstration
from genpolicy.datasets import _lerobot_files as files
from genpolicy.datasets._lerobot_import import quiet
from genpolicy.datasets._lerobot_writer import recording

CAMERA = ("image", "video")
TEXT = ("string", "language")
STATISTICS = ("min", "max", "mean", "std", "q01", "q99")
SUCCESS = "next.success"
KEPT = 2**30
"""Bytes of decoded pictures that are kept, at most."""
BOOKS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
"""Features that LeRobot adds to every data set."""


@dataclass(eq=False)
class LeRobotDataset:
    """The frames of a data set's episodes, in order; it fills `genpolicy.contracts.dataset.Dataset`
    and `genpolicy.contracts.dataset.DatasetWriter`.

    columns: every vector feature, name -> fp32 [F,*shape] of the F frames, "action", "next.reward"
    and "next.success" among them. episode [F]: the number of each frame's episode. stats: of
    exactly these episodes; of vectors over all their frames, of pictures as LeRobot sampled them
    while recording.
    """

    root: str | None = None  # the data set's folder
    repo_id: str | None = None  # its hub id instead, or where ``root`` is to be downloaded from
    # numbers of episodes, or a count of which the first ones are taken; None takes all
    episodes: int | list[int] | None = None
    # take only episodes in which "next.success" came true; a count is then among these
    success_only: bool = False

    def __post_init__(self) -> None:
        self._folder = self._find()
        info = files.read_info(self._folder)
        features: Mapping[str, Any] = info["features"]
        files.check_whole(self._folder, info)
        if "action" not in features:
            raise ValueError(
                f"{self._folder} has no feature 'action'; it has {', '.join(features)}"
            )
        self.fps = int(info["fps"])
        self.cameras = [name for name in features if features[name]["dtype"] in CAMERA]
        vectors = [
            name
            for name in features
            if features[name]["dtype"] not in CAMERA + TEXT and name not in BOOKS
        ]
        table = files.read_table(
            self._folder / "data", [*vectors, "index", "episode_index", "task_index"]
        )
        order = np.argsort(table["index"].to_numpy(), kind="stable")
        episode = table["episode_index"].to_numpy()[order]
        succeeded = table[SUCCESS].to_numpy()[order] if SUCCESS in vectors else None
        # rows of the files, in time
        self._place = order[np.isin(episode, self._chosen(episode, succeeded))]
        self.columns = {
            name: files.column_tensor(table[name], features[name]["shape"], self._place)
            for name in vectors
        }
        self.episode = torch.from_numpy(table["episode_index"].to_numpy()[self._place])
        self._task = table["task_index"].to_numpy()[self._place]
        lengths = self.episode.unique_consecutive(return_counts=True)[1]
        self._last = (lengths.cumsum(0) - 1).repeat_interleave(lengths)
        self._first = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        self._vectors = [name for name in vectors if name.startswith("observation.")]
        self.shapes = {
            name: _shape(features[name]) for name in (*self._vectors, *self.cameras, "action")
        }
        self.stats = {name: _statistics(self.columns[name]) for name in (*self._vectors, "action")}
        self.stats |= self._picture_stats()

    @staticmethod
    def recording(
        out: Path,
        task: ControlTask,
        made: Mapping[str, Any],
        columns: Mapping[str, Tensor] | None = None,
    ) -> AbstractContextManager[Callable[[Demonstration], None]]:
        """See `genpolicy.contracts.dataset.DatasetWriter`."""
        return recording(out, task, made, columns or {})

    def __len__(self) -> int:
        return len(self.episode)

    def rows(self, index: Tensor, history: int, actions: range) -> tuple[Context, Tensor, Tensor]:
        """See `genpolicy.contracts.dataset.Dataset`; pictures are [B,history,C,H,W] in [0,1]."""
        first, last = self._first[index], self._last[index]
        past, asked, outside = frames(index, first, last, history, actions)
        observation = {name: self.columns[name][past] for name in self._vectors}
        if self.cameras:
            observation |= self._pictures(past)
        prompts = [self._tasks[int(task)] for task in self._task[index.numpy()]]
        return Context(prompts, observation), self.columns["action"][asked], outside

    def _find(self) -> Path:
        if self.root is None and self.repo_id is None:
            raise ValueError("it needs root, a folder, or repo_id, a hub id")
        if self.root is not None and (
            self.repo_id is None or (Path(self.root) / files.INFO).is_file()
        ):
            return Path(self.root)
        with quiet():
            from lerobot.datasets.lerobot_dataset import LeRobotDataset as Theirs

            try:
                return Theirs(str(self.repo_id), root=self.root).root
            except Exception as error:  # LeRobot's, the hub's and the web client's share no class
                raise OSError(
                    f"{self.repo_id} can't be read from the hub (it is unreachable, gated, "
                    "misspelt or no LeRobotDataset v3); log in with a token (hf auth login) "
                    "or give root, a local folder"
                ) from error

    def _chosen(self, episode: np.ndarray, succeeded: np.ndarray | None) -> list[int]:
        there = np.unique(episode).tolist()
        kept = there
        if self.success_only:
            if succeeded is None:
                raise ValueError(
                    f"success_only needs the feature {SUCCESS!r}, "
                    f"which {self._folder} does not have"
                )
            kept = np.unique(episode[succeeded.astype(bool)]).tolist()
        if isinstance(self.episodes, list):
            for number in self.episodes:
                if number not in there:
                    raise ValueError(
                        f"episodes has {number}; "
                        f"{self._folder} has episodes {there[0]} to {there[-1]}"
                    )
            kept = [number for number in kept if number in self.episodes]
        elif self.episodes is not None:
            if not 1 <= self.episodes <= len(kept):
                raise ValueError(
                    f"episodes is {self.episodes}; {self._folder} has {len(kept)} to choose from"
                )
            kept = kept[: self.episodes]
        if not kept:
            raise ValueError(
                f"{self._folder}: no episode is left of {len(there)}; "
                "relax episodes or success_only"
            )
        return kept

    @cached_property
    def _tasks(self) -> dict[int, str]:
        """The instructions by number, which LeRobot keeps as the index of a pandas table."""
        import pandas

        tasks = pandas.read_parquet(self._folder / "meta" / "tasks.parquet")
        return {int(number): str(text) for text, number in tasks["task_index"].items()}

    @cached_property
    def _theirs(self) -> Any:
        with quiet():
            from lerobot.datasets.lerobot_dataset import LeRobotDataset as Theirs

            return Theirs(self.repo_id or "local/dataset", root=self._folder)

    def _pictures(self, frames: Tensor) -> dict[str, Tensor]:
        """The pictures of frames [B,history] of every camera, in [0,1]."""
        if sum(math.prod(self.shapes[name]) for name in self.cameras) * len(self) <= KEPT:
            return {name: pictures[frames] / 255 for name, pictures in self._kept.items()}
        distinct, where = frames.unique(return_inverse=True)
        return {name: pictures[where] / 255 for name, pictures in self._decoded(distinct).items()}

    @cached_property
    def _kept(self) -> dict[str, Tensor]:
        return self._decoded(torch.arange(len(self)))

    def _decoded(self, frames: Tensor) -> dict[str, Tensor]:
        """Decodes every camera's pictures of some frames as bytes, uint8 [n,C,H,W]: LeRobot's
        reader gives such bytes, over 255.
        """
        made = {
            name: torch.empty(len(frames), *self.shapes[name], dtype=torch.uint8)
            for name in self.cameras
        }
        for row, place in enumerate(self._place[frames.numpy()]):
            item = self._theirs[int(place)]
            for name, pictures in made.items():
                pictures[row] = (item[name] * 255).round()
        return made

    def _picture_stats(self) -> dict[str, dict[str, Tensor]]:
        if not self.cameras:
            return {}
        names = [
            f"stats/{camera}/{kind}" for camera in self.cameras for kind in (*STATISTICS, "count")
        ]
        table = files.read_table(self._folder / "meta" / "episodes", ["episode_index", *names])
        with quiet():
            from lerobot.datasets.compute_stats import aggregate_stats
        chosen = set(self.episode.tolist())
        episodes = [row for row in table.to_pylist() if row["episode_index"] in chosen]
        stats = aggregate_stats(
            [
                {
                    c: {k: np.array(row[f"stats/{c}/{k}"]) for k in (*STATISTICS, "count")}
                    for c in self.cameras
                }
                for row in episodes
            ]
        )
        return {
            c: {kind: torch.from_numpy(stats[c][kind]).float() for kind in STATISTICS}
            for c in self.cameras
        }


def _shape(feature: Mapping[str, Any]) -> tuple[int, ...]:
    """A feature's shape; of pictures [C,H,W], which is what LeRobot's reader returns however they
    were declared.
    """
    shape = tuple(feature["shape"])
    last = (feature.get("names") or [""])[-1] if feature["dtype"] in CAMERA else ""
    return (shape[2], *shape[:2]) if last in ("channel", "channels") else shape


def _statistics(values: Tensor) -> dict[str, Tensor]:
    """The statistics over the first dim of [F,*shape], in fp64; std is the population's, as
    LeRobot's.
    """
    wide = values.double().numpy()
    low, high = np.quantile(wide, [0.01, 0.99], axis=0)
    found = (wide.min(0), wide.max(0), wide.mean(0), wide.std(0), low, high)
    return {
        name: torch.as_tensor(value).float() for name, value in zip(STATISTICS, found, strict=True)
    }

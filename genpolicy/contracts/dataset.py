"""The contracts of data sets: recorded episodes, their writer, pictures with captions, and pairs of
pictures.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from genpolicy.contracts.task import Context, ControlTask, Demonstration


class Dataset(Protocol):
    """Recorded episodes, frame by frame.

    shapes: of the observations and of "action". stats: name -> {min, max, mean, std, q01, q99}
    Float[*shape]. columns: the vectors of every frame, Float[F,*shape]; "next.reward" and
    "next.success" where they were recorded. episode [F]: the number of each frame's episode; its
    frames stand together, in time.
    """

    shapes: Mapping[str, tuple[int, ...]]
    stats: Mapping[str, Mapping[str, Tensor]]
    fps: int
    columns: Mapping[str, Tensor]
    episode: Tensor

    def __len__(self) -> int:
        """The number of frames."""
        ...

    def rows(self, index: Tensor, history: int, actions: range) -> tuple[Context, Tensor, Tensor]:
        """The frames ``index`` [B] with their last ``history`` observations, the actions [B,T,D] at
        the offsets ``actions`` (relative to the frame), and which of those lie outside the episode,
        bool [B,T] (there the nearest action inside is repeated).
        """
        ...


def frames(
    index: Tensor, first: Tensor, last: Tensor, history: int, actions: range
) -> tuple[Tensor, Tensor, Tensor]:
    """The frames that `Dataset.rows` looks up for ``index`` [B], whose episodes reach from
    ``first`` to ``last`` [B]: those of the observations [B,history], those of the actions [B,T],
    and True for each action outside the episode, bool [B,T].
    """
    first, last = first[:, None], last[:, None]
    seen = index[:, None] + torch.arange(1 - history, 1)
    asked = index[:, None] + torch.tensor(actions)
    outside = (asked < first) | (asked > last)
    return seen.clamp(first, last), asked.clamp(first, last), outside


@runtime_checkable
class Pictures(Protocol):
    """Pictures with captions, one per row."""

    def __len__(self) -> int:
        """The number of pictures."""
        ...

    def pictures(self, index: Tensor) -> tuple[Context, Tensor]:
        """The captions and the pictures Float[B,3,H,W] in [0,1] (or videos Float[B,F,3,H,W]) of
        the rows ``index`` [B].
        """
        ...


@runtime_checkable
class Pairs(Pictures, Protocol):
    """Pairs of pictures with one caption each, one of which was preferred.

    As `Pictures` they are the captions with the preferred pictures.
    """

    def pairs(self, index: Tensor) -> tuple[Context, Tensor, Tensor]:
        """The captions, the preferred pictures and the others, each as `Pictures` has them, of the
        rows ``index`` [B].
        """
        ...


class DatasetWriter(Protocol):
    """A leaf of datasets/ that episodes can be recorded as."""

    def recording(
        self,
        out: Path,
        task: ControlTask,
        made: Mapping[str, Any],
        columns: Mapping[str, Tensor] | None = None,
    ) -> AbstractContextManager[Callable[[Demonstration], None]]:
        """A data set of ``task`` that is being written to the new folder ``out``: hand it episodes,
        one by one. columns: those that every episode has besides, each with the [L,*shape] of one.

        Leaving it makes the finished folder appear; leaving it by an exception leaves nothing
        behind. ``made`` says how the data set was made; it is written down at the end, and may be
        completed until then. Raises `FileExistsError` if ``out`` exists.
        """
        ...


@dataclass(eq=False)
class Merged:
    """The frames of ``parts``, one data set after the other, as a
    `genpolicy.contracts.dataset.Dataset`. Raises `ValueError` where they do not show the same
    things or were recorded at different rates.

    Statistics are those of all frames together (quantiles, which can't be had from the parts',
    their mean by frames). columns: what all parts have; what came of episodes is told part by part
    (`recordings`), because one that does not say it must not silence the others. names: what the
    parts are called, in words to the person.
    """

    parts: Sequence[Dataset]
    names: Sequence[str]

    def __post_init__(self) -> None:
        first = self.parts[0]
        for part in self.parts[1:]:
            if dict(part.shapes) != dict(first.shapes) or part.fps != first.fps:
                raise ValueError(
                    f"these data sets do not fit together: one has {_told(first)}, "
                    f"another {_told(part)}; record them alike"
                )
        self.shapes: Mapping[str, tuple[int, ...]] = first.shapes
        self.fps = first.fps
        counts = torch.tensor([len(part) for part in self.parts])
        self._first = counts.cumsum(0) - counts
        self._weight = counts.double() / counts.sum()
        names = [name for name in first.columns if all(name in part.columns for part in self.parts)]
        self.columns: Mapping[str, Tensor] = {
            n: torch.cat([part.columns[n] for part in self.parts]) for n in names
        }
        numbers, episodes = [], 0
        for part in self.parts:
            numbers.append(part.episode.unique_consecutive(return_inverse=True)[1] + episodes)
            episodes = int(numbers[-1].max()) + 1
        self.episode = torch.cat(numbers)
        self.stats: Mapping[str, Mapping[str, Tensor]] = {
            name: self._pooled(name) for name in first.stats
        }

    def __len__(self) -> int:
        return len(self.episode)

    def rows(self, index: Tensor, history: int, actions: range) -> tuple[Context, Tensor, Tensor]:
        """See `genpolicy.contracts.dataset.Dataset`."""
        owner = torch.bucketize(index, self._first, right=True) - 1
        found, order = [], []
        for number, part in enumerate(self.parts):
            mine = (owner == number).nonzero().flatten()
            if len(mine):
                found.append(part.rows(index[mine] - self._first[number], history, actions))
                order.append(mine)
        back = torch.cat(order).argsort()
        contexts, chunks, pads = zip(*found, strict=True)
        return Context.cat(contexts)[back], torch.cat(chunks)[back], torch.cat(pads)[back]

    def _pooled(self, name: str) -> dict[str, Tensor]:
        values = {
            kind: torch.stack([part.stats[name][kind] for part in self.parts])
            for kind in self.parts[0].stats[name]
        }
        weight = self._weight.to(values["mean"]).view(-1, *[1] * (values["mean"].ndim - 1))
        pooled = {kind: (weight * value).sum(0) for kind, value in values.items()}
        pooled["min"], pooled["max"] = values["min"].amin(0), values["max"].amax(0)
        square = (weight * (values["std"] ** 2 + values["mean"] ** 2)).sum(0)
        pooled["std"] = (square - pooled["mean"] ** 2).clamp_min(0).sqrt()
        return pooled


def recordings(data: Dataset, name: str) -> list[tuple[str, Dataset]]:
    """The data sets that a data set is made of, each with what it is called: the parts of a
    `Merged`, or itself, called ``name``.
    """
    if isinstance(data, Merged):
        return list(zip(data.names, data.parts, strict=True))
    return [(name, data)]


def _told(data: Dataset) -> str:
    shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in data.shapes.items())
    return f"{shapes} at {data.fps} frames a second"

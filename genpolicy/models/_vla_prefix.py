"""The observations and instructions of B rows, and their encoding by a vision-language model,
computed where and when it is needed and kept for the next time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

ROWS = 64
"""Rows that are encoded at once: a rollout has thousands, each with its images."""


@dataclass(frozen=True)
class Prefix:
    """The encoding that actions are said or denoised from, of B rows.

    layers: keys and values of each layer [B,heads,S,dim].
    valid: bool [B,S].
    summary: the mean of the last hidden states over the valid tokens [B,width].
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    valid: Tensor
    summary: Tensor

    def of(self, change: Callable[[Tensor], Tensor]) -> "Prefix":
        """Every tensor changed in the same way."""
        layers = tuple((change(keys), change(values)) for keys, values in self.layers)
        return Prefix(layers, change(self.valid), change(self.summary))

    def tensors(self) -> list[Tensor]:
        """All of them, in one order."""
        return [*(value for layer in self.layers for value in layer), self.valid, self.summary]

    def named(self) -> dict[str, Tensor]:
        """All of them, by name."""
        layers = {
            f"{number}.{kind}": value
            for number, layer in enumerate(self.layers)
            for kind, value in zip(("keys", "values"), layer, strict=True)
        }
        return {**layers, "valid": self.valid, "summary": self.summary}

    @classmethod
    def of_names(cls, tensors: Mapping[str, Tensor]) -> "Prefix":
        """The prefix whose tensors are `named` so."""
        layers = range((len(tensors) - 2) // 2)
        pairs = tuple((tensors[f"{n}.keys"], tensors[f"{n}.values"]) for n in layers)
        return cls(pairs, tensors["valid"], tensors["summary"])

    @classmethod
    def cat(cls, parts: Sequence["Prefix"]) -> "Prefix":
        """The rows of several, one after the other; shorter ones get tokens that do not count."""
        layers = tuple(
            (_cat([keys for keys, _ in layer], 2), _cat([values for _, values in layer], 2))
            for layer in zip(*(part.layers for part in parts), strict=True)
        )
        summary = torch.cat([part.summary for part in parts])
        return cls(layers, _cat([part.valid for part in parts], 1), summary)


class Store:
    """R rows as the policy's preprocessor made them, and the prefixes of those that were needed so
    far.

    ``mark`` says which weights they were computed with; where that changes, all are forgotten.
    """

    def __init__(self, batch: Mapping[str, Tensor]) -> None:
        self.batch = batch
        self.names = list(batch)
        self.count = len(next(iter(batch.values())))
        self._prefix: Prefix | None = None
        self._known = torch.zeros(self.count, dtype=torch.bool)
        self._mark: Tensor | None = None

    def value(self, name: str, rows: Tensor) -> Tensor:
        """One of the preprocessor's values, of some rows."""
        return self.batch[name][rows]

    def know(self, prefix: Prefix, mark: Tensor) -> None:
        """Takes the prefixes of all rows from elsewhere: nothing is encoded."""
        self._prefix, self._mark = prefix, mark
        self._known[:] = True

    @torch.no_grad()
    def prefix(
        self, rows: Tensor, encode: Callable[[Mapping[str, Tensor]], Prefix], mark: Tensor
    ) -> Prefix:
        """The prefixes of ``rows`` [b]; what is missing is encoded, `ROWS` at a time."""
        if self._mark is None or not torch.equal(mark, self._mark):
            self._known[:] = False
            self._prefix = None
            self._mark = mark
        missing = rows[~self._known[rows]].unique()
        for part in missing.split(ROWS) if len(missing) else ():
            made = encode({name: value[part] for name, value in self.batch.items()})
            if len(part) == self.count:
                self._prefix = made
            else:
                if self._prefix is None:
                    self._prefix = made.of(
                        lambda value: value.new_empty(self.count, *value.shape[1:])
                    )
                for kept, value in zip(self._prefix.tensors(), made.tensors(), strict=True):
                    kept[part] = value
            self._known[part] = True
        assert self._prefix is not None
        everything = torch.equal(rows, torch.arange(self.count))
        return self._prefix if everything else self._prefix.of(lambda value: value[rows])


class Joined:
    """Several stores as one, their rows one after the other: each keeps its own prefixes."""

    def __init__(self, parts: "Sequence[Store | Joined]") -> None:
        self.parts = parts
        self.ends = torch.tensor([part.count for part in parts]).cumsum(0)
        self.count = int(self.ends[-1])
        self.names: list[str] = parts[0].names

    def value(self, name: str, rows: Tensor) -> Tensor:
        """One of the preprocessor's values, of some rows; shorter texts are padded."""
        found, place = self._read(rows, lambda part, own: part.value(name, own))
        return (_cat(found, 1) if found[0].ndim == 2 else torch.cat(found))[place]

    def prefix(
        self, rows: Tensor, encode: Callable[[Mapping[str, Tensor]], Prefix], mark: Tensor
    ) -> Prefix:
        """The prefixes of ``rows`` [b]; each part encodes what it has not encoded yet."""
        found, place = self._read(rows, lambda part, own: part.prefix(own, encode, mark))
        return Prefix.cat(found).of(lambda value: value[place])

    def _read[T](
        self, rows: Tensor, read: "Callable[[Store | Joined, Tensor], T]"
    ) -> tuple[list[T], Tensor]:
        """The parts' answers for their own rows, part by part, and each row's place in them."""
        number = torch.bucketize(rows, self.ends, right=True)
        found = []
        for n in number.unique().tolist():
            part = self.parts[n]
            found.append(read(part, rows[number == n] - (self.ends[n] - part.count)))
        return found, number.argsort(stable=True).argsort()


@dataclass(frozen=True)
class Seen:
    """Rows of a store: the condition of a chain.

    keep: picked rows look into the same store, so that a prefix that was computed once is found
    again; otherwise they begin a store of their own.
    """

    store: Store | Joined
    rows: Tensor
    keep: bool

    @classmethod
    def all(cls, batch: Mapping[str, Tensor], keep: bool) -> "Seen":
        """All rows of a batch."""
        store = Store(batch)
        return cls(store, torch.arange(store.count), keep)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor | slice) -> "Seen":
        picked = self.rows[rows]
        if self.keep:
            return Seen(self.store, picked, keep=True)
        own, place = picked.unique(return_inverse=True)  # a row that is picked twice is read once
        return Seen(Store(Seen(self.store, own, keep=False).batch), place, keep=False)

    @classmethod
    def cat(cls, parts: Sequence["Seen"]) -> "Seen":
        """The rows of several, one after the other."""
        store = Joined([part.store for part in parts])
        begins = store.ends.tolist()
        rows = [part.rows + end - part.store.count for part, end in zip(parts, begins, strict=True)]
        return cls(store, torch.cat(rows), parts[0].keep)

    def value(self, name: str) -> Tensor:
        """One of the preprocessor's values, of these rows."""
        return self.store.value(name, self.rows)

    @property
    def batch(self) -> dict[str, Tensor]:
        """The rows as the preprocessor made them."""
        return {name: self.value(name) for name in self.store.names}


def _cat(values: Sequence[Tensor], dim: int) -> Tensor:
    """Joins the rows of values, which are filled with zeros up to the longest along ``dim``."""
    most = max(value.shape[dim] for value in values)
    behind = [0, 0] * (values[0].ndim - 1 - dim)
    filled = [functional.pad(value, [*behind, 0, most - value.shape[dim]]) for value in values]
    return torch.cat(filled)

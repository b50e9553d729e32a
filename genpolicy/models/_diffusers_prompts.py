"""Prompts as a condition, and their embeddings: encoded once per distinct prompt, stacked per
batch.

New prompts are encoded `TOGETHER` at a time, always so many (blank ones fill up): a prompt's
embedding must not depend on which others were new beside it, or a resumed run would not repeat the
uninterrupted one. The last bits of a row may depend on how many rows there are; that they depend on
neither its place nor its company is tried out once for each model, and where they do, or where the
pipeline cuts all prompts to the longest one, prompts are encoded alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

CACHED_BYTES = 4 * 2**30
"""Embeddings kept, oldest dropped first and encoded again if asked for. SD3: 2.7 MB per prompt
in bf16.
"""
STACKED_BATCHES = 4
"""Batches of rows kept stacked: a chain asks for the same rows (and their negatives) at every step.
"""

TOGETHER = 8
"""Prompts encoded at once. On one CPU thread eight prompts of the tiny pipelines and of shapes-sd3
take about a fifth of the time of eight alone; most of it is what a call costs.
"""
OTHER = "a word"
"""Company in the trial: longer than a blank prompt, and short enough for any pipeline."""

Entry = tuple[Tensor | None, ...]
"""The answer of ``encode_prompt`` for one prompt or for several, in its order; None for what only
guidance needs.
"""


@dataclass(frozen=True)
class Prompts:
    """A condition: B prompts, read as negatives or not. The embeddings stay with the model."""

    prompts: tuple[str, ...]
    negative: bool = False

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: Tensor | slice) -> "Prompts":
        if isinstance(rows, slice):
            return replace(self, prompts=self.prompts[rows])
        index = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        return replace(self, prompts=tuple(self.prompts[i] for i in index.tolist()))

    @classmethod
    def cat(cls, parts: Sequence["Prompts"]) -> "Prompts":
        """See `genpolicy.chain.values.Rows`; all parts are negatives, or none is."""
        prompts = tuple(prompt for part in parts for prompt in part.prompts)
        return cls(prompts, parts[0].negative)


class Embeddings:
    """The cache. ``positive`` encodes some prompts, ``negative`` the one negative prompt that all
    rows share.

    Entries live at ``home`` (the CPU where memory is short) and are stacked on ``device``.
    """

    def __init__(
        self,
        positive: Callable[[list[str]], Entry],
        negative: Callable[[], Entry],
        device: torch.device,
        home: torch.device,
    ) -> None:
        self._positive = positive
        self._negative = negative
        self._device = device
        self._home = home
        self._entries: dict[str | None, Entry] = {}  # None: the negative
        self._size = 0  # their bytes
        self._stacked: dict[Prompts, Entry] = {}

    def entry(self, prompt: str | None) -> Entry:
        """The entry of one prompt, or of the negative one (None)."""
        if prompt not in self._entries and prompt is not None:
            self._add([prompt])
        elif prompt not in self._entries:
            self._keep(None, self._negative())
        return self._entries[prompt]

    def encode(self, prompts: Sequence[str]) -> Prompts:
        """Encode what is not there yet."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._entries]
        for first in range(0, len(missing), TOGETHER):
            self._add(missing[first : first + TOGETHER])
        return Prompts(tuple(prompts))

    def _add(self, prompts: list[str]) -> None:
        """Encode and keep at most `TOGETHER` prompts."""
        if self._have_rows is None:
            entries = [self._positive([prompt]) for prompt in prompts]
        else:
            together = self._positive(prompts + [""] * (TOGETHER - len(prompts)))
            entries = [_row(together, place, self._have_rows) for place in range(len(prompts))]
        for prompt, entry in zip(prompts, entries, strict=True):
            self._keep(prompt, entry)

    def _keep(self, prompt: str | None, entry: Entry) -> None:
        self._entries[prompt] = tuple(None if v is None else v.to(self._home) for v in entry)
        self._size += _bytes(self._entries[prompt])
        while self._size > CACHED_BYTES and len(self._entries) > 1:
            self._size -= _bytes(self._entries.pop(next(iter(self._entries))))

    @cached_property
    def _have_rows(self) -> tuple[bool, ...] | None:
        """The trial: which of the tensors of an entry have a row for each prompt (Flux's text ids
        have not), or None where prompts must be encoded alone.
        """
        others = [OTHER] * (TOGETHER - 1)
        alone = self._positive([""])
        asked = {0: ["", *others], TOGETHER - 1: [*others, ""], 1: [""] * TOGETHER}
        found = {place: self._positive(prompts) for place, prompts in asked.items()}
        have = tuple(
            a is not None and b is not None and (len(a), len(b)) == (1, TOGETHER)
            for a, b in zip(alone, found[0], strict=True)
        )
        first, *more = (_row(entry, place, have) for place, entry in found.items())
        same = all(_equal(first, other) for other in more)
        return have if same else None

    def rows(self, condition: Prompts) -> Entry:
        """The answer of ``encode_prompt`` for these B rows."""
        if condition not in self._stacked:
            asked = [None if condition.negative else prompt for prompt in condition.prompts]
            places = {prompt: i for i, prompt in enumerate(dict.fromkeys(asked))}
            entries = [self.entry(prompt) for prompt in places]
            index = torch.tensor([places[prompt] for prompt in asked], device=self._device)
            while len(self._stacked) >= STACKED_BATCHES:
                self._stacked.pop(next(iter(self._stacked)))
            self._stacked[condition] = tuple(
                self._stack(values, index) for values in zip(*entries, strict=True)
            )
        return self._stacked[condition]

    def _stack(self, values: tuple[Tensor | None, ...], index: Tensor) -> Tensor | None:
        tensors = [v for v in values if v is not None]
        if not tensors:
            return None
        if len(tensors[0]) != 1:
            return tensors[0].to(self._device)  # not per row (Flux's text ids): shared
        if any(v.shape != tensors[0].shape for v in tensors):
            raise ValueError(
                "this pipeline embeds prompts in different lengths, which can't share a batch here"
            )
        return torch.cat(tensors).to(self._device)[index]


def _row(entry: Entry, place: int, have_rows: tuple[bool, ...]) -> Entry:
    """The entry of one prompt of several; what has no rows is shared by all."""
    return tuple(
        value[place : place + 1].clone() if value is not None and has else value
        for value, has in zip(entry, have_rows, strict=True)
    )


def _equal(one: Entry, other: Entry) -> bool:
    """Returns whether two entries are the same bit for bit."""
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(one, other, strict=True)
    )


def _bytes(entry: Entry) -> int:
    return sum(v.nbytes for v in entry if v is not None)

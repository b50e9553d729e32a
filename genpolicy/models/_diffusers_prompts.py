"""Prompts as a condition, and their embeddings: encoded once per distinct prompt, stacked per
batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CACHED_BYTES = 4 * 2**30
"""Embeddings kept, oldest dropped first and encoded again if asked for. SD3: 2.7 MB a prompt in
bf16.
"""
STACKED_BATCHES = 4
"""Batches of rows kept stacked: a chain asks for the same rows (and their negatives) at every step.
"""

Entry = tuple[Tensor | None, ...]
"""What ``encode_prompt`` returned for one prompt, in its order; None for what only guidance needs.
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


class Embeddings:
    """The cache. ``positive`` encodes one prompt, ``negative`` the one negative prompt that all
    rows share.

    Entries live at ``home`` (the CPU where memory is short) and are stacked on ``device``.
    """

    def __init__(
        self,
        positive: Callable[[str], Entry],
        negative: Callable[[], Entry],
        device: torch.device,
        home: torch.device,
    ) -> None:
        self._positive, self._negative = positive, negative
        self._device, self._home = device, home
        self._entries: dict[str | None, Entry] = {}  # None: the negative
        self._stacked: dict[Prompts, Entry] = {}

    def entry(self, prompt: str | None) -> Entry:
        """The entry of one prompt, or of the negative one (None)."""
        if prompt not in self._entries:
            entry = self._negative() if prompt is None else self._positive(prompt)
            self._entries[prompt] = tuple(None if v is None else v.to(self._home) for v in entry)
            size = sum(_bytes(e) for e in self._entries.values())
            while size > CACHED_BYTES and len(self._entries) > 1:
                size -= _bytes(self._entries.pop(next(iter(self._entries))))
        return self._entries[prompt]

    def encode(self, prompts: Sequence[str]) -> Prompts:
        """Encode what is not there yet."""
        for prompt in dict.fromkeys(prompts):
            self.entry(prompt)
        return Prompts(tuple(prompts))

    def rows(self, condition: Prompts) -> Entry:
        """What ``encode_prompt`` returns for these B rows."""
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


def _bytes(entry: Entry) -> int:
    return sum(v.nbytes for v in entry if v is not None)

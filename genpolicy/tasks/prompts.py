"""Prompts as a task: horizon 1, the outputs are judged by the run's reward alone."""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from genpolicy.contracts.task import Context, read_prompts


@dataclass
class Prompts:
    """A file of prompts, and the order they are asked in.

    Episode n is the prompt at n mod P of epoch n // P: a pure function, so that any number of
    processes asks the same.
    """

    prompts: str  # the file, with one prompt per line
    # "shuffled" asks every prompt once per epoch, each epoch in its own order; or "sequential"
    order: str = "shuffled"
    lines: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        if self.order not in ("shuffled", "sequential"):
            raise ValueError(f"order is {self.order!r}; valid are 'shuffled', 'sequential'")
        self.lines = read_prompts(self.prompts)

    def reset(self, episodes: range) -> Context:
        return Context([self._prompt(n) for n in episodes])

    def _prompt(self, episode: int) -> str:
        epoch, place = divmod(episode, len(self.lines))
        if self.order == "shuffled":
            place = _order(epoch, len(self.lines))[place]
        return self.lines[place]


@lru_cache(maxsize=4)
def _order(epoch: int, count: int) -> tuple[int, ...]:
    return tuple(np.random.Generator(np.random.Philox(key=epoch)).permutation(count).tolist())

"""The random numbers of a run: each a pure function of its purpose, the seed and the iteration."""

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from genpolicy.chain import Noise


@dataclass(frozen=True)
class Draws:
    """Draws by purpose, so that no two purposes share a stream, whatever the seed.

    The purpose comes first in every key and all keys have the same length: a key that ends in 0 is
    the stream of the same key without it.
    """

    seed: int

    def generator(self, purpose: str, iteration: int, number: int) -> np.random.Generator:
        """A generator for draws that all processes make alike."""
        return np.random.default_rng([_hashed(purpose), self.seed % 2**64, iteration, number])

    def window(self, iteration: int, whole: range, size: int | None) -> tuple[int, int]:
        """``size`` consecutive steps of the ``whole`` window, or all of it."""
        if size is None:
            return whole.start, whole.stop
        drawn = self.generator("window", iteration, 0).integers(len(whole) - size + 1)
        start = whole.start + int(drawn)
        return start, start + size

    def noise(self, purpose: str, iteration: int, place: Tensor, number: int) -> Noise:
        """Noise of the rows ``place`` [B]."""
        seed = _hashed(f"{purpose} {self.seed} {number}")
        return Noise(seed, iteration, place, torch.zeros_like(place))


def _hashed(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())

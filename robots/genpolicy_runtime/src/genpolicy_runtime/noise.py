"""Noise as a pure function of a seed and of a decision's number: never a shared stream."""

import numpy as np
from numpy.random.bit_generator import ISeedSequence

SEEDS = 2**64
"""The number of seeds: a word of the generator's key."""


class Key(ISeedSequence):
    """The key of a Philox generator, (seed, decision), handed over as a seed's words.

    The argument ``key`` gives the same generator, but numpy then asks the system for random bits
    first, and drops them: more time than the draws themselves take.
    """

    def __init__(self, seed: int, decision: int) -> None:
        self.words = [seed, decision]

    def generate_state(self, n_words: int, dtype: type = np.uint64) -> np.ndarray:
        return np.array(self.words, dtype=np.uint64)


def noise(seed: int, decision: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns float32 standard normal numbers [*shape] for the ``decision``-th plan of an episode.

    Philox is a counter-based generator whose key is (seed, decision): what was drawn before, on
    which machine and in how many processes, changes nothing.
    """
    key = Key(seed, decision)
    # numpy takes any ISeedSequence, and its types say SeedSequence alone
    generator = np.random.Generator(np.random.Philox(key))  # type: ignore[arg-type]
    return generator.standard_normal(shape, dtype=np.float32)

"""Noise as a pure function of a seed and of a decision's number: never a shared stream."""

import numpy as np

SEEDS = 2**64
"""The number of seeds: a word of the generator's key."""


def noise(seed: int, decision: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns float32 standard normal numbers [*shape] for the ``decision``-th plan of an episode.

    Philox is a counter-based generator whose key is (seed, decision): what was drawn before, on
    which machine and in how many processes, changes nothing.
    """
    key = np.array([seed, decision], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key))
    return generator.standard_normal(shape, dtype=np.float32)

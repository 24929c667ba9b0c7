"""Random orders that depend on a seed and a purpose, and are the same in every version."""

from __future__ import annotations

import zlib

import numpy as np


def random_words(count: int, seed: int, purpose: str, epoch: int = 0) -> np.ndarray:
    """Returns `count` random ``uint64`` that depend on (seed, purpose, epoch) only.

    Philox's raw stream, because NumPy promises that it never changes; its `Generator` methods
    make no such promise, and a resumed run must see the same batches.
    """
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    entropy = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), epoch])
    return np.random.Philox(entropy).random_raw(count)


def permutation(count: int, seed: int, purpose: str, epoch: int = 0) -> np.ndarray:
    """Returns the numbers 0 to ``count - 1`` in an order that (seed, purpose, epoch) fixes."""
    # Stable: should two words be equal, their order is still the same everywhere.
    return np.argsort(random_words(count, seed, purpose, epoch), kind="stable")

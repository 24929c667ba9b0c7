"""Which images the small sets are made of.

Both rules see a split in the order of (class, file name) and take each class by itself.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Choice = Callable[[np.ndarray], np.ndarray]  # labels in order of (class, name) -> rows


def evenly(labels: np.ndarray, per_class: int) -> np.ndarray:
    """Returns rows that are evenly spaced in each class: of GTSRB, over the tracks of a sign.

    Args:
      labels: Of all images in the order of (class, file name), int ``[n]``.
      per_class: At most so many of each.

    Example:
      >>> evenly(np.array([0, 0, 0, 0, 0, 1]), 3).tolist()
      [0, 2, 4, 5]
    """
    return np.concatenate([rows[_spaced(len(rows), per_class)] for rows in _by_class(labels)])


def _spaced(count: int, chosen: int) -> np.ndarray:
    if count <= chosen:
        return np.arange(count)
    return np.linspace(0, count - 1, chosen).round().astype(int)


def drawn(labels: np.ndarray, per_class: int) -> np.ndarray:
    """Returns rows that are drawn from each class, in their old order, always the same ones.

    One generator of NumPy with seed 0 permutes the classes one after the other.

    Args:
      labels: Of all images in the order of (class, file name), int ``[n]``.
      per_class: At most so many of each.

    Example:
      >>> drawn(np.array([0, 0, 0, 0, 0, 1]), 3).tolist()
      [2, 3, 4, 5]
    """
    generator = np.random.default_rng(0)
    orders = [rows[generator.permutation(len(rows))[:per_class]] for rows in _by_class(labels)]
    return np.concatenate([np.sort(rows) for rows in orders])


def _by_class(labels: np.ndarray) -> list[np.ndarray]:
    return [np.flatnonzero(labels == label) for label in np.unique(labels)]

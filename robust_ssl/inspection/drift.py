"""Whether new images come from where the old ones came from, by their features."""

from __future__ import annotations

import numpy as np

PERMUTATIONS = 1999  # so that the smallest p is 1/2000


def energy_test(
    first: np.ndarray, second: np.ndarray, *, seed: int = 0, permutations: int = PERMUTATIONS
) -> tuple[float, float]:
    r"""Returns the energy distance of two samples and how often chance gives as large a one.

    .. math:: 2\,E\|x - y\| - E\|x - x'\| - E\|y - y'\|

    Each feature is first divided by its spread over both, so that none decides by its unit.

    Args:
      first: Vectors, float ``[n, dim]``.
      second: Vectors, float ``[m, dim]``.
      seed: Of the permutations.
      permutations: How many; p is at least ``1 / (permutations + 1)``.

    Returns:
      ``(distance, p)``.

    Raises:
      ValueError: If a sample is empty or the two are of other dimensions.

    Example:
      >>> numbers = np.linspace(0, 1, 40)[:, None]
      >>> energy_test(numbers[::2], numbers[1::2])[1] > 0.5
      True
      >>> energy_test(numbers[:20], numbers[20:])[1]
      0.0005

    References:
      Szekely and Rizzo, "Energy statistics: A class of statistics based on distances", 2013.
    """
    both = np.concatenate([first, second]).astype(np.float64)
    spread = both.std(axis=0)
    spread[spread == 0] = 1.0
    distances, labels = _pooled(first / spread, second / spread)
    measured = _energy(distances, labels[None])[0]
    random = np.random.default_rng(seed)
    shuffled = random.permuted(np.tile(labels, (permutations, 1)), axis=1)
    # By chance as large: rounding must not tell a permutation from itself.
    as_large = _energy(distances, shuffled) >= measured * (1 - 1e-9)
    return float(measured), float((1 + as_large.sum()) / (permutations + 1))


def _pooled(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns all distances, ``[n + m, n + m]``, and which vectors are of the first, bool."""
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"need two samples of vectors, got {first.shape} and {second.shape}")
    if not len(first) or not len(second):
        raise ValueError(f"a sample is empty: {len(first)} and {len(second)} vectors")
    both = np.concatenate([first, second]).astype(np.float64)
    # From differences and not from products: equal vectors have a distance of exactly 0.
    distances = np.stack([np.linalg.norm(both - row, axis=1) for row in both])
    return distances, np.arange(len(both)) < len(first)


def _energy(distances: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the energy distance for each row of labels, ``[rows]``."""
    ours = labels.astype(np.float64)
    theirs = 1 - ours
    towards, n, m = ours @ distances, ours.sum(axis=1), theirs.sum(axis=1)
    between = (towards * theirs).sum(axis=1) / (n * m)
    within = (towards * ours).sum(axis=1) / n**2
    others = ((theirs @ distances) * theirs).sum(axis=1) / m**2
    return 2 * between - within - others

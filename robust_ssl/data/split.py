"""What a split can do, in memory or read on demand."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from robust_ssl.data.order import permutation


class Split:
    """What both kinds of examples can do; they differ in how they `read` and `take`."""

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 where there are no labels."""
        return len(self.class_names)

    @property
    def where(self) -> str:
        """What an error calls these examples: name and split."""
        return f"{self.name!r} ({self.split})"

    @property
    def nbytes(self) -> int:
        """Size of all images as ``uint8``, bytes."""
        return len(self) * int(np.prod(self.image_shape))

    def subset(self, count: int, seed: int = 0):
        """Returns `count` examples drawn without repetition, in their old order."""
        if not 1 <= count <= len(self):
            raise ValueError(f"cannot take {count} of the {len(self)} examples of {self.where}")
        return self.take(np.sort(permutation(len(self), seed, "subset")[:count]))


def as_indices(indices: Any, count: int, where: str) -> np.ndarray:
    """Returns indices as an integer array ``[k]``, each of them in 0 to ``count - 1``."""
    indices = np.asarray(indices)
    if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(
            f"indices into {where} must be integers [k], got {indices.dtype} {indices.shape}"
        )
    # Negative ones too: NumPy would count them from the end without a word.
    outside = (indices < 0) | (indices >= count)
    if outside.any():
        first = int(np.argmax(outside))
        raise ValueError(
            f"indices into {where} must be 0 to {count - 1}: indices[{first}] is {indices[first]}"
        )
    return indices


def header(examples: Split) -> bytes:
    """Returns what a fingerprint says of examples beside pixels and labels."""
    shape = tuple(int(n) for n in examples.image_shape)  # NumPy 2 would print np.int64(8)
    facts = (examples.name, examples.split, len(examples), shape, examples.class_names)
    return repr(facts).encode()


def sha256(*parts: Any) -> str:
    """Returns the SHA-256 of some parts in a row, 64 hex digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()

"""What makes class numbers of labels that are none; no advice makes up a class."""

from __future__ import annotations

import numpy as np


def columns(labels: np.ndarray) -> str:
    """Returns which column of labels ``[n, m]`` to take, and how."""
    if labels.ndim != 2:
        return ""
    if labels.shape[0] == 1:
        return "; one row: labels[0]"
    if labels.dtype.kind not in "biuf":
        return "; take the column that is meant: labels[:, 0]"
    if np.isin(labels, (0, 1)).all() and (labels.sum(axis=1) == 1).all():
        return "; for one-hot labels: labels.argmax(axis=-1)"
    if np.isin(labels, (0, 1)).all():
        return "; several or no classes of an image cannot be learned: give each image one"
    return "; take the column that is meant, for example labels[:, 0]"


def not_integers(labels: np.ndarray, where: str) -> str:
    """Returns an error for labels ``[n]`` that are no integers: which one, and what to do."""
    absent = _absent(labels)
    if absent.any():
        return without_label(absent, where)
    index, line = 0, "number the classes from 0 and use labels.astype(np.int64)"
    if labels.dtype.kind in "UOS":
        line = (
            "number the names, over all splits together: class_names, labels = "
            "np.unique(labels, return_inverse=True)"
        )
    elif labels.dtype.kind == "f" and (broken := labels != np.rint(labels)).any():
        index = int(np.argmax(broken))
        line = (
            f"{np.count_nonzero(broken)} of {len(labels)} are no whole numbers; make classes of "
            "them first, for example by bounds: np.digitize(labels, bounds)"
        )
    return (
        f"labels of {where} must be integers, got {labels.dtype}: labels[{index}] is "
        f"{labels[index]!r}; {line}"
    )


def _absent(labels: np.ndarray) -> np.ndarray:
    """Returns where a label is no value at all: NaN, infinite, None, no time; bool ``[n]``."""
    if labels.dtype.kind in "fc":
        return ~np.isfinite(labels)
    if labels.dtype.kind in "mM":
        return np.isnat(labels)
    if labels.dtype.kind == "O":  # NaN is not itself
        return np.array([label is None or bool(label != label) for label in labels])
    return np.zeros(len(labels), bool)


def without_label(absent: np.ndarray, where: str) -> str:
    """Returns an error for images without a label, with their rows.

    Args:
      absent: Which they are, bool ``[n]``.
      where: What the error calls the labels.

    Example:
      >>> without_label(np.array([False, True]), "'mine'")[:35]
      "1 of 2 labels of 'mine' are missing"
    """
    rows = np.flatnonzero(absent)
    named = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
    return (
        f"{len(rows)} of {absent.size} labels of {where} are missing (NaN, infinite, None or "
        f"masked), in rows {named}; drop those images, or pass labels=None for a set without labels"
    )

"""What the classes of the splits and of a model must have in common."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np

from robust_ssl.data.examples import Examples, numbers
from robust_ssl.data.streamed import StreamedExamples

_LISTED = 5  # of several names, so many are shown


def check_classes(examples: Examples | StreamedExamples, num_classes: int) -> None:
    """Raises ValueError unless the examples have labels for a head of `num_classes` logits.

    A split other than the training split may lack classes, where labels are all that names them.

    Example:
      >>> from robust_ssl.data import from_arrays
      >>> check_classes(from_arrays(np.zeros((2, 4, 4, 3)), [0, 1]), 2)
    """
    if not examples.class_names:
        raise ValueError(f"{examples.where} has no labels, which a head needs")
    fewer = examples.num_classes < num_classes and not _is_training(examples)
    if examples.num_classes == num_classes or (fewer and is_numbered(examples.class_names)):
        return
    advice = f"build the head with num_classes={examples.num_classes}"
    if not _is_training(examples):  # whose classes are what the head was built for
        advice = "every class needs training images, and the splits the same classes"
    raise ValueError(
        f"{examples.where} has {examples.num_classes} classes, the head {num_classes} logits; "
        f"{advice}"
    )


def with_classes_of(
    examples: Examples | StreamedExamples, train: Examples | StreamedExamples
) -> Any:
    """Returns a split with the classes of the training split, of which it may lack some.

    Args:
      examples: A test split.
      train: Its training split.

    Raises:
      ValueError: If one has no labels, or they have other classes or another order of them.

    Example:
      >>> from robust_ssl.data import from_arrays
      >>> train = from_arrays(np.zeros((3, 4, 4, 3)), [0, 1, 2])
      >>> test = from_arrays(np.zeros((2, 4, 4, 3)), [0, 1], split="test")
      >>> with_classes_of(test, train).class_names
      ('0', '1', '2')
    """
    for part in (train, examples):
        if not part.class_names:
            raise ValueError(f"{part.where} has no labels, which a head needs")
    mine, known = examples.class_names, train.class_names
    if mine == known:
        return examples
    if is_numbered(mine) and len(mine) <= len(known):  # nothing but numbers was given
        return dataclasses.replace(examples, class_names=known)
    what = difference(mine, known)
    raise ValueError(
        f"the classes of {examples.where} are not those of {train.where}: {what}; every class "
        "needs training images, and the splits the same names in one order"
    )


def check_trained(train: Examples | StreamedExamples) -> None:
    """Raises ValueError if a class has no training image; labels that are not known pass.

    Example:
      >>> from robust_ssl.data import from_arrays
      >>> check_trained(from_arrays(np.zeros((2, 4, 4, 3)), [0, 1]))
    """
    if train.num_classes == 1:
        raise ValueError(
            f"{train.where} has one class only, {train.class_names[0]!r}; a classifier needs two"
        )
    if train.labels is None:
        return
    counts = np.bincount(train.labels, minlength=train.num_classes)
    empty = [name for name, count in zip(train.class_names, counts, strict=True) if not count]
    if empty:
        raise ValueError(
            f"{len(empty)} of the {train.num_classes} classes of {train.where} have no training "
            f"image: {listed(empty)}; drop them, or add images (train_limit may be too small)"
        )


def is_numbered(names: Sequence[str]) -> bool:
    """Whether classes are called by their numbers, as those without names are."""
    return tuple(names) == numbers(len(names))


def taken_in_order(mine: Sequence[str], asked: Sequence[str]) -> str:
    """Says that logits are taken for classes in their order, and why.

    Args:
      mine: What a classifier calls its logits: numbers or nothing.
      asked: The classes of the images.

    Example:
      >>> taken_in_order((), ("cat", "dog"))
      "the logits are taken for the classes 'cat', 'dog' in this order, since it does not say what
      they are"
    """
    why = f"it knows them as {listed(mine)}" if mine else "it does not say what they are"
    return f"the logits are taken for the classes {listed(asked)} in this order, since {why}"


def difference(mine: Sequence[str], known: Sequence[str]) -> str:
    """Returns in words how two lists of class names differ.

    Example:
      >>> difference(["cat", "emu"], ["Cat", "dog"])
      "only the first has 'cat' (near 'Cat'), 'emu'; only the second 'Cat', 'dog'"
      >>> difference(["a", "b"], ["b", "a"])
      "the same names in another order: 'a', 'b' and 'b', 'a'"
    """
    if sorted(mine) == sorted(known):
        return f"the same names in another order: {listed(mine)} and {listed(known)}"
    here = [name for name in mine if name not in known]
    there = [name for name in known if name not in mine]
    parts = []
    if here:
        parts.append(f"only the first has {listed(here, near=there)}")
    if there:
        parts.append(f"only the second {'' if here else 'has '}{listed(there)}")
    return "; ".join(parts)


def listed(names: Sequence[str], near: Sequence[str] = ()) -> str:
    """Returns the first few of many names, each with the nearest of others, if any is near."""
    folded = {other.casefold(): other for other in near}
    words = []
    for name in list(names)[:_LISTED]:
        close = difflib.get_close_matches(name.casefold(), folded, n=1)
        words.append(f"{name!r} (near {folded[close[0]]!r})" if close else repr(name))
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(words) + more


def _is_training(examples: Examples | StreamedExamples) -> bool:
    return examples.split.startswith("train")

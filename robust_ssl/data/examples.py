"""A split of a data set in memory, as a value; arrays to examples, and training data in two."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from robust_ssl.data import checks
from robust_ssl.data.order import permutation
from robust_ssl.data.split import Split, as_indices, header, sha256


@dataclasses.dataclass(frozen=True, eq=False)
class Examples(Split):
    """A split of a data set, decoded once into one array; what exists is valid.

    Attributes:
      images: ``uint8 [n, H, W, 3]``, read-only.
      labels: ``int32 [n]``, read-only; None where the set has no labels (surrogate data need
        none).
      class_names: One name per class; empty where there are no labels.
      name: For tables and manifests.
      split: ``"train"``, ``"test"``, ...
      notes: What was left out or changed where they were read, a sentence each.

    Raises:
      ValueError: If images or labels break what `from_arrays` asks of them.

    Example:
      >>> examples = Examples(np.zeros((3, 8, 8, 3), np.uint8), np.array([0, 1, 1]), ("a", "b"))
      >>> len(examples), examples.num_classes, examples.take([2]).labels.tolist()
      (3, 2, [1])
    """

    images: np.ndarray
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    name: str = "examples"
    split: str = "train"
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        names = tuple(str(name) for name in self.class_names)
        if len(set(names)) < len(names):
            raise ValueError(f"class names of {self.where} must differ, got {names[:10]}")
        if self.labels is None:
            names, labels = (), None
        else:
            labels = checks.as_labels(self.labels, len(self.images), len(names), self.where)
            # `as_labels` copies, so the caller's own array stays writable; so does the view below.
            labels.flags.writeable = False
        images = checks.as_pixels(self.images, self.where).view()
        images.flags.writeable = False
        for field, value in (("images", images), ("labels", labels), ("class_names", names)):
            object.__setattr__(self, field, value)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        return self.images.shape[1:]

    def read(self, indices: Any, *, places: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Returns ``{"images", "labels"}`` of the chosen examples (no labels: no such entry).

        Args:
          indices: Which ones, int ``[k]``.
          places: Only these of the `k`, as `StreamedExamples.read` has it.
        """
        chosen = np.asarray(indices) if places is None else np.asarray(indices)[places]
        batch = {"images": self.images[chosen]}
        if self.labels is not None:
            batch["labels"] = self.labels[chosen]
        return batch

    def take(self, indices: Any) -> Examples:
        """Returns the chosen examples, in the order they are asked for."""
        indices = as_indices(indices, len(self), self.where)
        labels = None if self.labels is None else self.labels[indices]
        return dataclasses.replace(self, images=self.images[indices], labels=labels)

    def fingerprint(self) -> str:
        """Returns the SHA-256 of pixels, labels, shapes and names, 64 hex digits."""
        labels = b"" if self.labels is None else self.labels.tobytes()
        return sha256(header(self), np.ascontiguousarray(self.images), labels)


def from_arrays(
    images: Any,
    labels: Any = None,
    *,
    class_names: Sequence[str] | None = None,
    name: str = "arrays",
    split: str = "train",
) -> Examples:
    """Checks arrays and makes `Examples` of them.

    Args:
      images: ``uint8 [n, H, W, 3]``, or float in [0, 1], which is rounded to 8 bits.  Channels
        first, gray images, tensors and a list of images are brought to this form where they can
        mean one thing only.
      labels: Integers ``[n]`` in 0 to classes - 1, or None.
      class_names: One per class; by default ``"0"`` to the largest label.  Then each class of a
        training split needs an image, and another split may lack some.
      name: For tables and manifests.
      split: ``"train"``, ``"test"``, ...

    Returns:
      The examples.

    Raises:
      ValueError: If images are NaN, outside [0, 1], of wrong rank, channel count or dtype, or
        none; if labels are negative, too large, not integers or not one per image, or start at 1.

    Example:
      >>> from_arrays(np.zeros((3, 4, 4, 3)), [0, 2, 1]).class_names
      ('0', '1', '2')
    """
    where = f"{name!r} ({split})"
    images = checks.as_pixels(images, where)
    checks.check_not_bits(images, where)
    if labels is not None and class_names is None:
        labels = checks.as_labels(labels, len(images), None, where)
        if split == "train":
            checks.check_no_gaps(labels, where)
        class_names = numbers(int(labels.max(initial=-1)) + 1)
    return Examples(images, labels, tuple(class_names or ()), name, split)


def numbers(count: int) -> tuple[str, ...]:
    """Returns the names of classes that have none: their numbers."""
    return tuple(str(number) for number in range(count))


def carve(
    examples: Split,
    fraction: float = 0.1,
    *,
    count: int | None = None,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Splits training data by index into a part to train on and a part to choose by.

    One example of each class is never given away, so no class vanishes from training (of a TFDS
    set that is streamed the labels are not known beforehand, and nothing is kept back).  The test
    split has no part in it.

    Args:
      examples: The training split.
      fraction: Share of the examples that goes to validation, in (0, 1).
      count: How many go to validation, instead of `fraction`.
      seed: Which ones.

    Returns:
      ``(train, validation)``, disjoint, together everything, in the old order.

    Raises:
      ValueError: If `examples` is a test split, or nothing would be left on one side.

    Example:
      >>> train, validation = carve(from_arrays(np.zeros((20, 4, 4, 3)), [0] * 19 + [1]))
      >>> len(train), len(validation), train.labels.max()
      (18, 2, np.int32(1))
    """
    if examples.split.startswith("test"):
        raise ValueError(f"{examples.where} is a test split; carve the training split")
    if count is None:
        if not 0 < fraction < 1:
            raise ValueError(f"fraction must lie in (0, 1), got {fraction}")
        count = round(len(examples) * fraction)
    order = permutation(len(examples), seed, "carve")
    # From the other end than validation is taken: what stays does not depend on the count.
    backwards = order[::-1]
    reserved = backwards[:1]
    if examples.labels is not None:  # the last of each class in this order stays
        reserved = backwards[np.unique(examples.labels[backwards], return_index=True)[1]]
    free = order[~np.isin(order, reserved)]
    if not len(free):
        raise ValueError(
            f"{examples.where} has one image of each class, {len(examples)} in all, and none is "
            "left to validate on; bring more"
        )
    if not 1 <= count <= len(free):
        raise ValueError(
            f"cannot carve {count} validation images out of the {len(examples)} of "
            f"{examples.where}: between 1 and {len(free)} are free, as each class keeps one"
        )
    validation = np.sort(free[:count])
    train = np.setdiff1d(np.arange(len(examples)), validation)
    counted = {"split": "validation"}
    if hasattr(examples, "trained_on"):
        counted["trained_on"] = False
    return examples.take(train), dataclasses.replace(examples.take(validation), **counted)


def check_image_size(examples: Split, image_size: int) -> None:
    """Raises ValueError unless every image is `image_size` by `image_size`.

    Example:
      >>> check_image_size(from_arrays(np.zeros((2, 4, 4, 3))), 4)
    """
    height, width, _ = examples.image_shape
    if (height, width) != (image_size, image_size):
        raise ValueError(
            f"images of {examples.where} are {height}x{width}, the encoder takes "
            f"{image_size}x{image_size}; load them with image_size={image_size}"
        )

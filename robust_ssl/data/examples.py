"""A split of a data set as a value: in memory (`Examples`) or read on demand."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import logging
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from robust_ssl.data import checks, pictures
from robust_ssl.data.order import permutation
from robust_ssl.data.resizing import Resizing

_log = logging.getLogger(__name__)
_NAMED = 20  # unreadable pictures that are logged one by one

Record = tuple[bytes | pathlib.Path | np.ndarray, int | None]  # a picture and its label


class _Split:
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


@dataclasses.dataclass(frozen=True, eq=False)
class Examples(_Split):
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

    def read(self, indices: Any) -> dict[str, np.ndarray]:
        """Returns ``{"images", "labels"}`` of the chosen examples (no labels: no such entry)."""
        batch = {"images": self.images[np.asarray(indices)]}
        if self.labels is not None:
            batch["labels"] = self.labels[np.asarray(indices)]
        return batch

    def take(self, indices: Any) -> Examples:
        """Returns the chosen examples, in the order they are asked for."""
        indices = _as_indices(indices, len(self), self.where)
        labels = None if self.labels is None else self.labels[indices]
        return dataclasses.replace(self, images=self.images[indices], labels=labels)

    def fingerprint(self) -> str:
        """Returns the SHA-256 of pixels, labels, shapes and names, 64 hex digits."""
        labels = b"" if self.labels is None else self.labels.tobytes()
        return _sha256(_header(self), np.ascontiguousarray(self.images), labels)


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedExamples(_Split):
    """A split too large for memory: pictures are read and decoded when they are asked for.

    Attributes:
      records: Maps row numbers ``int [k]`` to `k` pairs of a picture (encoded bytes, a path or
        pixels) and a label (None where there are none).
      rows: Which rows of the source these examples are, int ``[n]``.
      image_size: Every picture is brought to this height and width; None takes them as they are
        stored, and one that differs from the first is an error.
      class_names: One name per class; empty where there are no labels.
      name: For tables and manifests.
      split: ``"train"``, ``"test"``, ...
      labels: ``int32 [n]`` where they are known without reading the pictures, else None.
      notes: What was left out or changed where they were found, a sentence each.
      digests: Of the pixels of each row of the source, ``uint64``, 0 until it is read; all parts
        of a split share them.  See `robust_ssl.data.duplicates`.
      workers: How many processes read and decode training batches; 0 are threads of this one.
      skip_unreadable: Whether pictures that cannot be decoded are left out and counted.  In a batch
        of the training split the one before it takes its place; in a batch of another split, and
        by default, it is an error.
      unreadable: Rows of such pictures, with what was wrong; all parts of a split share them.
      resizing: How pictures get their size; None is as `robust_ssl.data.load` says.

    Example:
      >>> pixels = np.zeros((8, 8, 3), np.uint8)
      >>> examples = StreamedExamples(
      ...     lambda rows: [(pixels, int(row) % 2) for row in rows], np.arange(10**6), None, "ab"
      ... )
      >>> examples.read([5, 6])["labels"].tolist()
      [1, 0]
    """

    records: Callable[[np.ndarray], Sequence[Record]]
    rows: np.ndarray
    image_size: int | None = None
    class_names: Sequence[str] = ()
    name: str = "examples"
    split: str = "train"
    labels: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    digests: np.ndarray | None = dataclasses.field(default=None, repr=False)
    workers: int = 0
    skip_unreadable: bool = False
    unreadable: dict[int, str] = dataclasses.field(default_factory=dict, repr=False)
    resizing: Resizing | None = None

    def __post_init__(self):
        if len(self.rows) == 0:
            raise ValueError(f"{self.where} is empty: no images; choose another split or folder")
        if self.digests is None:
            digests = np.zeros(int(np.max(self.rows)) + 1, np.uint64)
            object.__setattr__(self, "digests", digests)
        object.__setattr__(self, "class_names", tuple(self.class_names))

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image; reads the first one if need be."""
        if self.image_size is not None:
            return (self.image_size, self.image_size, 3)
        return self._decode(self.rows[0], self.records(self.rows[:1])[0][0]).shape

    def read(self, indices: Any, threads: int | None = None) -> dict[str, np.ndarray]:
        """Reads and decodes the chosen examples: ``{"images", "labels"}``, as `Examples.read`.

        Args:
          indices: Which ones, int ``[k]``.
          threads: In how many threads large pictures are decoded; None is one for each core.

        Raises:
          ValueError: If a picture is broken or differs in size, or a label is out of range.
        """
        rows = self.rows[np.asarray(indices)]
        records, decoded = self._read(rows, threads)
        if any(image is None for image in decoded):
            records, decoded = self._filled(records, decoded)
        # Each batch is checked, because nobody has read the whole source beforehand.
        batch = {"images": np.stack(decoded)}
        if self.class_names:
            labels = [label for _, label in records]
            batch["labels"] = checks.as_labels(labels, len(rows), self.num_classes, self.where)
        return batch

    def _read(self, rows: np.ndarray, threads: int | None = None) -> tuple[list, list]:
        """Returns the records of rows and their pixels, None for a picture that is left out."""
        records = list(self.records(rows))
        encoded = [picture for picture, _ in records]
        threads = threads or os.cpu_count() or 1
        if isinstance(encoded[0], np.ndarray) or _is_small(encoded[0]) or threads == 1:
            decoded = list(map(self._decode, rows, encoded))
        else:  # Pillow lets other threads run while it decodes
            with ThreadPoolExecutor(max_workers=threads) as pool:
                decoded = list(pool.map(self._decode, rows, encoded))
        for row, image in zip(rows, decoded, strict=True):
            if image is not None and image.shape != self.image_shape:
                raise ValueError(
                    f"image {row} of {self.where} is {image.shape}, the first one "
                    f"{self.image_shape}; give image_size to bring all to one size"
                )
        return records, decoded

    def _filled(self, records: Sequence[Record], decoded: Sequence[np.ndarray | None]):
        """Puts the readable picture before it, with its label, in the place of each other one."""
        readable = [place for place, image in enumerate(decoded) if image is not None]
        if not readable:
            raise ValueError(
                f"none of {len(decoded)} pictures in a row of {self.where} can be read: "
                f"{self._first_unreadable}"
            )
        if self.split != "train":
            raise ValueError(
                f"{self._first_unreadable}; no other can take its place where figures are counted, "
                "and the set is too large to read beforehand: remove the file"
            )
        # Before the first readable one comes the last, so that each place has one.
        fills = [readable[bisect.bisect(readable, p) - 1] for p in range(len(decoded))]
        return [records[p] for p in fills], [decoded[p] for p in fills]

    @property
    def _first_unreadable(self) -> str:
        return next(iter(self.unreadable.values()))

    def note_unreadable(self, found: Mapping[int, str]) -> None:
        """Counts pictures that cannot be read; the first of them are logged."""
        for row, wrong in found.items():
            if row not in self.unreadable:
                self.unreadable[row] = wrong
                if len(self.unreadable) <= _NAMED:
                    _log.warning("left out (%d so far): %s", len(self.unreadable), wrong)

    def _decode(self, row: int, picture: bytes | pathlib.Path | np.ndarray) -> np.ndarray | None:
        file = f" ({picture})" if isinstance(picture, pathlib.Path) else ""
        try:
            where = f"image {row} of {self.where}{file}"
            image = pictures.decode(picture, self.image_size, where, self.resizing)
        except ValueError as error:
            if not self.skip_unreadable:
                raise
            self.note_unreadable({int(row): str(error)})
            return None
        # While it is there: a second pass over the pictures would take as long as an epoch.
        if not self.digests[row]:
            self.digests[row] = pixel_digest(image)
        return image

    def take(self, indices: Any) -> StreamedExamples:
        """Returns the chosen examples, in the order they are asked for; reads nothing."""
        indices = _as_indices(indices, len(self), self.where)
        labels = None if self.labels is None else self.labels[indices]
        return dataclasses.replace(self, rows=self.rows[indices], labels=labels)

    def in_memory(self, chunk: int = 1024) -> Examples:
        """Reads everything once and returns it as `Examples`, without what cannot be read."""
        images = np.empty((len(self), *self.image_shape), np.uint8)
        labels: list[int | None] = []
        for start in range(0, len(self), chunk):
            records, decoded = self._read(self.rows[start : start + chunk])
            for (_, label), image in zip(records, decoded, strict=True):
                if image is not None:
                    images[len(labels)] = image
                    labels.append(label)
        count, notes = len(labels), self.notes
        if count < len(self):
            first = next(iter(self.unreadable.values()))
            notes = (
                *notes,
                f"left out, {len(self) - count} that cannot be read; the first: {first}",
            )
        known = None
        if self.class_names:
            known = checks.as_labels(labels, count, self.num_classes, self.where)
        return Examples(images[:count], known, self.class_names, self.name, self.split, notes)

    def fingerprint(self) -> str:
        """Returns the SHA-256 of names, shapes, rows and the first 64 images, 64 hex digits.

        Reading everything would take as long as an epoch, so a change in a later picture goes
        unseen.
        """
        head = self.read(np.arange(min(64, len(self))))
        # The same pixels in another order, or of other rows, are other data.
        rows = np.asarray(self.rows, np.int64).tobytes()
        return _sha256(_header(self), rows, *(head[key].tobytes() for key in sorted(head)))


def pixel_digest(image: np.ndarray) -> int:
    """Returns a 64-bit digest of one image's pixels, above 0.

    Example:
      >>> pixel_digest(np.zeros((2, 2, 3), np.uint8)) == pixel_digest(np.ones((2, 2, 3), np.uint8))
      False
    """
    content = np.ascontiguousarray(image)
    return max(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"), 1)


def _is_small(picture: bytes | pathlib.Path) -> bool:
    # A 32x32 PNG has 2 kB; handing it to a thread costs more (1.4x in all) than it gains.
    return isinstance(picture, bytes) and len(picture) < 2**14


def _as_indices(indices: Any, count: int, where: str) -> np.ndarray:
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


def _header(examples: Examples | StreamedExamples) -> bytes:
    shape = tuple(int(n) for n in examples.image_shape)  # NumPy 2 would print np.int64(8)
    facts = (examples.name, examples.split, len(examples), shape, examples.class_names)
    return repr(facts).encode()


def _sha256(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


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
    examples: Examples | StreamedExamples,
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
    if not 1 <= count <= len(free):
        raise ValueError(
            f"cannot carve {count} validation images out of the {len(examples)} of "
            f"{examples.where}: between 1 and {len(free)} are free, as each class keeps one"
        )
    validation = np.sort(free[:count])
    train = np.setdiff1d(np.arange(len(examples)), validation)
    return examples.take(train), dataclasses.replace(examples.take(validation), split="validation")


def check_image_size(examples: Examples | StreamedExamples, image_size: int) -> None:
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

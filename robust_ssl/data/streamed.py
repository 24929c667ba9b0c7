"""A split too large for memory: pictures are read and decoded when they are asked for."""

from __future__ import annotations

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
from robust_ssl.data.examples import Examples
from robust_ssl.data.resizing import Resizing
from robust_ssl.data.split import Split, as_indices, header, sha256

_log = logging.getLogger(__name__)
_NAMED = 20  # unreadable pictures that are logged one by one

Record = tuple[bytes | pathlib.Path | np.ndarray, int | None]  # a picture and its label


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedExamples(Split):
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
        to train on the one before it takes its place; in another batch, and by default, it is an
        error.
      trained_on: Whether it is to train on; None asks the split's name, which begins with "train".
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
    trained_on: bool | None = None

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
        for row in self.rows:  # until one can be read
            image = self._decode(row, self.records(np.array([row]))[0][0])
            if image is not None:
                return image.shape
        raise ValueError(f"no picture of {self.where} can be read: {self._first_unreadable}")

    @property
    def unread(self) -> np.ndarray:
        """Which examples have no digest yet and are not known to be unreadable, int ``[k]``."""
        without = np.flatnonzero(self.digests[self.rows] == 0)
        return without[~np.isin(self.rows[without], list(self.unreadable))]

    def look_at(self, indices: np.ndarray) -> None:
        """Reads examples for their digests alone: nothing takes the place of an unreadable one."""
        self._read(self.rows[indices])

    def read(
        self, indices: Any, threads: int | None = None, places: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Reads and decodes the chosen examples: ``{"images", "labels"}``, as `Examples.read`.

        Args:
          indices: Which ones, int ``[k]``.
          threads: In how many threads large pictures are decoded; None is one for each core.
          places: Only these of the `k` are read, ascending; they are what they would be among all.

        Raises:
          UnreadableError: If a picture is broken or differs in size, a label is out of range, or
            `records` fails: of what is trained on them none of this says anything.
        """
        whole = self.rows[np.asarray(indices)]
        places = np.arange(len(whole)) if places is None else places
        rows = whole[places]
        records, decoded = self._read(rows, threads)
        if any(image is None for image in decoded):
            records, decoded = self._filled(whole, places, records, decoded)
        # Each batch is checked, because nobody has read the whole source beforehand.
        batch = {"images": np.stack(decoded)}
        if self.class_names:
            batch["labels"] = self._labels(rows, records)
        return batch

    def _labels(self, rows: np.ndarray, records: list) -> np.ndarray:
        labels = [label for _, label in records]
        try:
            return checks.as_labels(labels, len(rows), self.num_classes, self.where)
        except ValueError as error:
            classes = range(self.num_classes)
            wrong = [row for row, label in zip(rows, labels, strict=True) if label not in classes]
            named = f"image {wrong[0]} of {self.where}: " if wrong else ""
            raise pictures.UnreadableError(f"{named}{error}") from error

    def _records(self, rows: np.ndarray) -> list[Record]:
        try:
            records = [(picture, label) for picture, label in self.records(rows)]
            if len(records) != len(rows):
                raise ValueError(f"it gave {len(records)} records for {len(rows)} rows")
            return records
        except pictures.UnreadableError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise pictures.UnreadableError(
                f"the function that reads {self.where} failed: {type(error).__name__}: {error}"
            ) from error

    def _read(self, rows: np.ndarray, threads: int | None = None) -> tuple[list, list]:
        """Returns the records of rows and their pixels, None for a picture that is left out."""
        records = self._records(rows)
        encoded = [picture for picture, _ in records]
        threads = threads or os.cpu_count() or 1
        if isinstance(encoded[0], np.ndarray) or _is_small(encoded[0]) or threads == 1:
            decoded = list(map(self._decode, rows, encoded))
        else:  # Pillow lets other threads run while it decodes
            with ThreadPoolExecutor(max_workers=threads) as pool:
                decoded = list(pool.map(self._decode, rows, encoded))
        for row, image in zip(rows, decoded, strict=True):
            if image is not None and image.shape != self.image_shape:
                raise pictures.UnreadableError(
                    f"image {row} of {self.where} is {image.shape}, the first one "
                    f"{self.image_shape}; give image_size to bring all to one size"
                )
        return records, decoded

    def _filled(self, rows: np.ndarray, places: np.ndarray, records: list, decoded: list):
        """Puts the readable picture before it, with its label, in the place of each other one.

        Those before a place are read where they are not among `places`: the fill is the same,
        whatever part of a batch a process reads.
        """
        named = self.split.startswith("train")
        if not (named if self.trained_on is None else self.trained_on):
            # Validation and training images share what was noted: the one of this batch is meant.
            row = next(rows[p] for p, image in zip(places, decoded, strict=True) if image is None)
            raise pictures.UnreadableError(
                f"{self.unreadable[int(row)]}; no other can take its place where figures are "
                "counted, and the set is too large to read beforehand: remove the file"
            )
        known = dict(zip(places.tolist(), zip(records, decoded, strict=True), strict=True))
        fills = [self._readable_before(rows, place, known) for place in places.tolist()]
        return [record for record, _ in fills], [image for _, image in fills]

    def _readable_before(self, rows: np.ndarray, place: int, known: dict[int, tuple]) -> tuple:
        """The record and the pixels at a place, or at the last readable one before it."""
        for step in range(len(rows)):
            other = (place - step) % len(rows)  # before the first one comes the last
            if other not in known:
                (record,), (image,) = self._read(rows[[other]])
                known[other] = record, image
            if known[other][1] is not None:
                return known[other]
        raise pictures.UnreadableError(
            f"none of {len(rows)} pictures in a row of {self.where} can be read: "
            f"{self._first_unreadable}"
        )

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
        where = f"image {row} of {self.where}{file}"
        try:
            _check_pixels(picture, where)
            image = pictures.decode(picture, self.image_size, where, self.resizing)
        except ValueError as error:
            # A disk that is away for a while must not change what is trained on.
            if not self.skip_unreadable or isinstance(error, pictures.LostError):
                if isinstance(error, pictures.UnreadableError):
                    raise
                raise pictures.UnreadableError(f"{where}: {error}") from error
            self.note_unreadable({int(row): str(error)})
            return None
        # While it is there: a second pass over the pictures would take as long as an epoch.
        if not self.digests[row]:
            self.digests[row] = pixel_digest(image)
        return image

    def take(self, indices: Any) -> StreamedExamples:
        """Returns the chosen examples, in the order they are asked for; reads nothing."""
        indices = as_indices(indices, len(self), self.where)
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
        """Returns the SHA-256 of names, shapes, rows, labels, files and 64 images, in hex.

        Reading everything would take as long as an epoch.  Of files their names and lengths are
        looked at, of images 64 from the whole set: a change of pixels elsewhere that keeps a file's
        length goes unseen, and in a prepared set any, and one of its label.
        """
        head = self.read(np.unique(np.linspace(0, len(self) - 1, 64).astype(np.int64)))
        # The same pixels in another order, or of other rows, are other data.
        rows = np.asarray(self.rows, np.int64).tobytes()
        known = b"" if self.labels is None else np.asarray(self.labels, np.int32).tobytes()
        return sha256(
            header(self), rows, known, self._files, *(head[key].tobytes() for key in sorted(head))
        )

    @functools.cached_property
    def _files(self) -> bytes:
        """A digest of the files' names and lengths in a folder; every stage asks for it again."""
        first = [picture for picture, _ in self.records(self.rows[:1])]
        if not first or not isinstance(first[0], pathlib.Path):
            return b""
        files = [file for file, _ in self.records(self.rows)]
        lines = "\n".join(f"{file.name} {file.stat().st_size}" for file in files)
        return hashlib.sha256(lines.encode()).digest()


def pixel_digest(image: np.ndarray) -> int:
    """Returns a 64-bit digest of one image's pixels, above 0.

    Example:
      >>> pixel_digest(np.zeros((2, 2, 3), np.uint8)) == pixel_digest(np.ones((2, 2, 3), np.uint8))
      False
    """
    content = np.ascontiguousarray(image)
    return max(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"), 1)


def _check_pixels(picture: Any, where: str) -> None:
    """Raises for an array that is not as `StreamedExamples.records` should give it."""
    if isinstance(picture, np.ndarray) and (
        picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3
    ):
        raise pictures.UnreadableError(
            f"{where} is {picture.dtype} {list(picture.shape)}; pixels are uint8 [H, W, 3]: of "
            "floats in [0, 1] they are np.rint(255 * image).astype(np.uint8)"
        )


def _is_small(picture: bytes | pathlib.Path) -> bool:
    # A 32x32 PNG has 2 kB; handing it to a thread costs more (1.4x in all) than it gains.
    return isinstance(picture, bytes) and len(picture) < 2**14

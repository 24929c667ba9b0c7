"""Images that are in two splits or twice in one, found by a digest of their pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from robust_ssl.data.examples import Examples
from robust_ssl.data.streamed import StreamedExamples, pixel_digest

_CHUNK = 1024  # images that are read at a time


class Shared(NamedTuple):
    """How many test images are among the training images, and how many there are at all.

    Attributes:
      count: That many.
      test: Of so many test images.
      train: Compared with so many training images, validation images among them.
      distinct: So many of the test images are different ones.
      two_labels: So many different training images have more than one label.
    """

    count: int
    test: int
    train: int
    distinct: int
    two_labels: int = 0

    @property
    def share(self) -> float:
        """Of the test images, in [0, 1]."""
        return self.count / self.test

    @property
    def notes(self) -> list[str]:
        """Says in a sentence each what is wrong with the split; nothing is the usual."""
        notes = []
        if self.count:
            notes.append(
                f"{self.count:,} of {self.test:,} test images are among the {self.train:,} "
                "training images, pixel by pixel (duplicates)"
            )
        if self.distinct < self.test:
            notes.append(
                f"of {self.test:,} test images {self.distinct:,} are different ones, pixel by "
                "pixel: shares are known less well than their intervals say"
            )
        if self.two_labels:
            several = self.two_labels > 1
            notes.append(
                f"{self.two_labels:,} training {'images have' if several else 'image has'} more "
                "than one label, pixel by pixel: is a picture, or a folder, there under two "
                "classes?"
            )
        return notes


def shared(test: Examples | StreamedExamples, *train: Examples | StreamedExamples) -> Shared:
    """Counts the test images whose pixels are those of a training image, and the different ones.

    Pixels are compared as a model sees them, after decoding and resizing, so a copy in another
    lossless format is found.  One that was compressed or cut again is not.  Training images that
    have two labels are counted too.

    Args:
      test: The test split.
      *train: Training and validation images.

    Example:
      >>> from robust_ssl.data import from_arrays
      >>> images = np.arange(4 * 48, dtype=np.uint8).reshape(4, 4, 4, 3)
      >>> shared(from_arrays(images[:3]), from_arrays(images[2:])).notes
      ['1 of 3 test images are among the 2 training images, pixel by pixel (duplicates)']
      >>> shared(from_arrays(images[[0, 0, 1]]), from_arrays(images[2:])).distinct
      2
    """
    of_train = [digests(part) for part in train]
    known = np.concatenate(of_train)
    known = known[known != 0]  # what cannot be read has none
    tested = digests(test)
    count = int(np.isin(tested, known).sum())
    readable = tested[tested != 0]
    copies = len(readable) - len(np.unique(readable))
    labelled_twice = _two_labels(list(zip(train, of_train, strict=True)))
    return Shared(count, len(test), len(known), len(test) - copies, labelled_twice)


def _two_labels(parts: Sequence[tuple[Examples | StreamedExamples, np.ndarray]]) -> int:
    """Counts the different images with more than one label, given splits and their digests."""
    different, times = np.unique(np.concatenate([found for _, found in parts]), return_counts=True)
    # Labels that would have to be read are read of copies only.
    copied = different[(times > 1) & (different != 0)]
    labels: dict[int, set[int]] = {}
    for examples, found in parts:
        places = np.flatnonzero(np.isin(found, copied))
        if not len(places):
            continue
        stored = examples.labels
        of_copies = labels_of(examples.take(places)) if stored is None else stored[places]
        if of_copies is not None:
            for digest, label in zip(found[places], of_copies, strict=True):
                labels.setdefault(int(digest), set()).add(int(label))
    return sum(len(each) > 1 for each in labels.values())


def digests(examples: Examples | StreamedExamples) -> np.ndarray:
    """Returns a digest of each image, ``uint64 [n]``.

    Of a streamed split only those images are read that have not been read before; 0 is the digest
    of one that cannot be read and is left out.
    """
    if isinstance(examples, Examples):
        return np.array([pixel_digest(image) for image in examples.images], np.uint64)
    unread = examples.unread
    for start in range(0, len(unread), _CHUNK):
        examples.look_at(unread[start : start + _CHUNK])
    return examples.digests[examples.rows]


def are_known(*splits: Examples | StreamedExamples) -> bool:
    """Whether `shared` reads no picture of these splits."""
    return all(isinstance(part, Examples) or not len(part.unread) for part in splits)


def labels_of(examples: Examples | StreamedExamples) -> np.ndarray | None:
    """Returns the labels of a split, ``int32 [n]``, decoding no picture; None if it has none."""
    if examples.labels is not None or not examples.class_names:
        return examples.labels
    labels = []
    for start in range(0, len(examples), _CHUNK):
        rows = examples.rows[start : start + _CHUNK]
        labels += [label for _, label in examples.records(rows)]
    return np.asarray(labels, np.int32)

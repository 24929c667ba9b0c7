"""GTSRB: 43 German traffic signs, whole pictures brought to 32x32 pixels.

The published pictures have 15 to 250 pixels a side, with a margin around the sign.  The margin
stays, and the sides are scaled each by itself: that is how this package's small copy was made, with
``cv2.resize(image, (32, 32))``.  `resize` is that function in whole numbers, so OpenCV is not
needed: of 105 pictures whose original is at hand it gave every pixel of the copy, and on random
images it agrees with OpenCV 5.0.  Pillow's filters do not; its bilinear one, which also smooths,
differs by 0.7 gray levels on average.

Training pictures are ``000NN/TTTTT_FFFFF.ppm``: class, track, frame.  The 30 frames of a track show
one sign, so a validation set should not cut through tracks.
"""

from __future__ import annotations

import csv
import io
import pathlib
import re
from collections.abc import Iterator

import numpy as np

from robust_ssl.data import pictures
from robust_ssl.data.public.archives import zip_members
from robust_ssl.data.public.subsets import Choice, drawn, evenly
from robust_ssl.data.public.values import Content, Example, Files

IMAGE_SIZE = 32
TRAIN = "GTSRB_Final_Training_Images.zip"
TEST = "GTSRB_Final_Test_Images.zip"
TEST_LABELS = "GTSRB_Final_Test_GT.zip"
_CLASSES = tuple(f"{label:02d}" for label in range(43))
_TRAIN_PICTURE = re.compile(r"(?:.*/)?000(\d\d)/(\d{5}_\d{5}\.ppm)")
_TEST_PICTURE = re.compile(r"(?:.*/)?(\d{5}\.ppm)")


def gtsrb(files: Files) -> Content:
    """Reads the whole set."""
    return _content(files, None, None)


def gtsrb32(files: Files) -> Content:
    """Reads 150 training images of each class, over its tracks, and up to 100 test images."""
    return _content(files, lambda labels: evenly(labels, 150), lambda labels: drawn(labels, 100))


def _content(files: Files, train: Choice | None, test: Choice | None) -> Content:
    def read_train():
        with zip_members(files[TRAIN]) as members:
            matches = [match for match in map(_TRAIN_PICTURE.fullmatch, members) if match]
            entries = [(int(match[1]), match[2], match[0]) for match in matches]
            yield from _examples(entries, members, "train", train, files[TRAIN])

    def read_test():
        labels = _test_labels(files[TEST_LABELS])
        with zip_members(files[TEST]) as members:
            matches = [match for match in map(_TEST_PICTURE.fullmatch, members) if match]
            entries = [(labels[m[1]], m[1], m[0]) for m in matches if m[1] in labels]
            yield from _examples(entries, members, "test", test, files[TEST])

    return Content({"label": _CLASSES}, {"train": read_train, "test": read_test}, ("id",))


def _test_labels(path: pathlib.Path) -> dict[str, int]:
    with zip_members(path) as members:
        tables = [name for name in members if name.endswith(".csv")]
        if not tables:
            raise ValueError(f"{path} has no table of labels; it is not the published file")
        rows = list(csv.DictReader(io.StringIO(members[tables[0]]().decode()), delimiter=";"))
    if not rows or not {"Filename", "ClassId"} <= rows[0].keys():
        raise ValueError(f"{path}: its table has no columns Filename and ClassId")
    return {row["Filename"]: int(row["ClassId"]) for row in rows}


def _examples(entries, members, split, choose: Choice | None, path) -> Iterator[Example]:
    if not entries:
        raise ValueError(f"{path} has no pictures of signs; it is not the published file")
    entries = sorted(entries)
    if choose is not None:
        labels = np.array([label for label, _, _ in entries])
        entries = [entries[row] for row in choose(labels)]
    for index, (label, _, member) in enumerate(entries):
        image = pictures.decode(members[member](), None, f"{member} of {path}")
        name = f"{split}_{index:05d}"
        yield name, {"id": name, "image": resize(image, IMAGE_SIZE), "label": label}


_ONE = 2048  # OpenCV's weights have 11 bits


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Returns ``uint8 [size, size, 3]``: bilinear without smoothing, as ``cv2.resize`` does it.

    Example:
      >>> resize(np.array([[[0] * 3, [255] * 3]], np.uint8), 4)[0, :, 0].tolist()
      [0, 64, 191, 255]
    """
    height, width, _ = image.shape
    left, across = _weights(width, size)
    top, down = _weights(height, size)
    # Beyond the first or last column OpenCV takes that column alone; of rows it mixes the same two.
    outside = (left < 0) | (left >= width - 1)
    across = np.where(outside, [[_ONE], [0]], across)[..., None]
    pixels = image.astype(np.int64)
    rows = pixels[:, left.clip(0, width - 1)] * across[0]
    rows += pixels[:, (left + 1).clip(0, width - 1)] * across[1]
    # Bits are dropped before the sum and after it, which is where the last gray level is decided.
    upper, lower = (rows[y.clip(0, height - 1)] >> 4 for y in (top, top + 1))
    down = down[..., None, None]
    total = (down[0] * upper >> 16) + (down[1] * lower >> 16)
    return ((total + 2) >> 2).clip(0, 255).astype(np.uint8)


def _weights(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first of two neighbors for each pixel, ``[target]``, and weights of both."""
    places = ((np.arange(target) + 0.5) * (1 / (target / source)) - 0.5).astype(np.float32)
    first = np.floor(places).astype(np.int64)
    share = places - first.astype(np.float32)
    return first, np.rint(np.stack([1 - share, share]) * np.float32(_ONE)).astype(np.int64)

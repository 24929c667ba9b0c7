"""STL-10 and SVHN: pixels as plain arrays."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator

import numpy as np

from robust_ssl.data.public.archives import limit_of, refuse_growth, tar_files, tar_members
from robust_ssl.data.public.values import Content, Example, Files

_STL_PIXELS = 3 * 96 * 96


def stl10(files: Files) -> Content:
    """Reads STL-10: labelled splits ``train`` and ``test``, and ``unlabelled``."""
    (path,) = files.values()
    small = tar_files(path, {"class_names.txt", "train_y.bin", "test_y.bin"})
    classes = tuple(small["class_names.txt"].decode().split())

    def reader(part, labels):
        return lambda: _stl_examples(path, f"{part}_X.bin", labels)

    splits = {
        part: reader(part, np.frombuffer(small[f"{part}_y.bin"], np.uint8).astype(np.int64) - 1)
        for part in ("train", "test")
    }
    return Content({"label": classes}, {**splits, "unlabelled": reader("unlabeled", None)})


def _stl_examples(path: pathlib.Path, member: str, labels: np.ndarray | None) -> Iterator[Example]:
    for name, file in tar_members(path):
        if name.rpartition("/")[2] != member:
            continue
        # One by one: the unlabelled images are 2.8 GB.
        for row, content in enumerate(iter(lambda file=file: file.read(_STL_PIXELS), b"")):
            if len(content) != _STL_PIXELS or (labels is not None and row >= len(labels)):
                raise ValueError(f"{path}: {member} and its labels do not agree")
            planes = np.frombuffer(content, np.uint8).reshape(3, 96, 96)
            # Planes lie column by column.
            label = -1 if labels is None else int(labels[row])
            yield row, {"image": planes.transpose(2, 1, 0), "label": label}
        return
    raise ValueError(f"{path} has no {member}; it is not the published file")


def svhn(files: Files) -> Content:
    """Reads SVHN's cropped digits: ``train`` and ``test``."""
    splits = {
        split: lambda split=split: _svhn_examples(files[f"{split}_32x32.mat"], split)
        for split in ("train", "test")
    }
    return Content({"label": tuple("0123456789")}, splits, ("id",))


def _svhn_examples(path: pathlib.Path, split: str) -> Iterator[Example]:
    table = load_matrices(path, ("X", "y"))
    images, labels = table["X"], table["y"].ravel()
    if images.dtype != np.uint8 or images.shape != (32, 32, 3, len(labels)):
        raise ValueError(f"{path}: X must be uint8 [32, 32, 3, n], got {images.shape}")
    for row, label in enumerate(labels):
        # The digit 0 is stored as 10.
        example = {"image": images[..., row], "label": int(label) % 10}
        yield row, {**example, "id": f"{split}_{row:06d}"}


def load_matrices(path: pathlib.Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Returns arrays of a MATLAB file.

    Raises:
      ValueError: If one is missing, the file is damaged or would grow too much.
    """
    from scipy import io

    try:
        # The headers first: what is compressed may be of any size.
        shapes = {name: shape for name, shape, _ in io.whosmat(str(path), appendmat=False)}
        if sum(math.prod(shapes.get(name, ())) for name in names) > limit_of(path):
            raise refuse_growth(path)
        table = io.loadmat(str(path), appendmat=False, variable_names=names)
    except Exception as error:  # SciPy has many names for a file that is none
        if isinstance(error, ValueError) and "hostile" in str(error):
            raise
        raise ValueError(
            f"{path} cannot be read as a MATLAB file: {error}\nremove it and fetch it again"
        ) from error
    missing = sorted(set(names) - set(table))
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}; it is not the published file")
    return {name: np.asarray(table[name]) for name in names}

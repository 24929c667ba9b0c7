"""CIFAR-10 and CIFAR-100, from the binary archive or from the one of Python pickles.

Pickles are read by `robust_ssl.pickles`, which runs nothing in them.  Only the pickles have the
names of the images, so the small set needs them.
"""

from __future__ import annotations

import io
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from robust_ssl import pickles
from robust_ssl.data.public.archives import tar_files
from robust_ssl.data.public.subsets import drawn
from robust_ssl.data.public.values import Content, Example, Files

_PIXELS = 3 * 32 * 32
_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_SPLITS_10 = {"train": _BATCHES, "test": ("test_batch",)}
_SPLITS_100 = {"train": ("train",), "test": ("test",)}

Batch = dict[str, Any]  # "pixels": uint8 [n, 3072], planes of red, green, blue; labels by feature


def cifar10(files: Files) -> Content:
    """Reads CIFAR-10, all of it."""
    splits, classes = _read(files, _SPLITS_10, {"label": ("labels", "label_names")}, "batches.meta")
    return _content(splits, classes)


def cifar100(files: Files) -> Content:
    """Reads CIFAR-100, all of it, with the 20 coarse labels."""
    return _content(*_read_100(files))


def cifar100_small(files: Files) -> Content:
    """Reads 70 training and 20 test images of each fine class of CIFAR-100."""
    splits, classes = _read_100(files)
    chosen = {
        split: _draw(batch, {"train": 70, "test": 20}[split]) for split, batch in splits.items()
    }
    fine = {"label": classes["label"]}
    readers = {
        split: lambda split=split: _examples(chosen[split], split, fine, named=True)
        for split in chosen
    }
    return Content(fine, readers, ("id",))


def _read_100(files: Files) -> tuple[dict[str, Batch], dict[str, tuple[str, ...]]]:
    # In this order the labels stand in a binary record.
    labels = {
        "coarse_label": ("coarse_labels", "coarse_label_names"),
        "label": ("fine_labels", "fine_label_names"),
    }
    return _read(files, _SPLITS_100, labels, "meta")


def _read(files, splits, labels, meta) -> tuple[dict[str, Batch], dict[str, tuple[str, ...]]]:
    ((file, path),) = files.items()
    members = [name for names in splits.values() for name in names]
    if "binary" in file:
        named = {"label": "batches.meta.txt"}
        if meta == "meta":
            named = {feature: f"{key}.txt" for feature, (_, key) in labels.items()}
        contents = tar_files(path, {*named.values(), *(f"{name}.bin" for name in members)})
        batches = {m: _binary(contents[f"{m}.bin"], list(labels), path) for m in members}
        classes = {f: tuple(contents[n].decode().split()) for f, n in named.items()}
    else:
        contents = tar_files(path, {meta, *members})
        batches = {m: _pickled(contents[m], labels, path) for m in members}
        table = load_pickle(contents[meta])
        classes = {feature: tuple(table[key]) for feature, (_, key) in labels.items()}
    return {split: _join([batches[n] for n in names]) for split, names in splits.items()}, classes


def _binary(content: bytes, labels: list[str], path: pathlib.Path) -> Batch:
    width = len(labels) + _PIXELS
    if not content or len(content) % width:
        raise ValueError(f"{path} holds a batch that is not made of records of {width} bytes")
    records = np.frombuffer(content, np.uint8).reshape(-1, width)
    columns = {name: records[:, i].astype(np.int64) for i, name in enumerate(labels)}
    return {"pixels": records[:, len(labels) :], **columns}


def _pickled(content: bytes, labels: dict[str, tuple[str, str]], path: pathlib.Path) -> Batch:
    batch = load_pickle(content)
    keys = {"data", "filenames", *(key for key, _ in labels.values())}
    if not isinstance(batch, dict) or not keys <= batch.keys():
        raise ValueError(f"{path} holds a batch without {', '.join(sorted(keys))}")
    pixels = batch["data"].array() if isinstance(batch["data"], Array) else None
    columns = {name: np.asarray(batch[key], np.int64) for name, (key, _) in labels.items()}
    names = [str(name) for name in batch["filenames"]]
    lengths = {len(column) for column in (*columns.values(), names)}
    if pixels is None or lengths != {len(pixels)} or pixels.shape[1:] != (_PIXELS,):
        raise ValueError(f"{path} holds a batch whose pixels, labels and names do not agree")
    return {"pixels": pixels, "names": names, **columns}


def _join(batches: list[Batch]) -> Batch:
    joined = {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}
    return joined


def _draw(batch: Batch, per_class: int) -> Batch:
    if "names" not in batch:
        raise ValueError(
            "the binary archive has no names of images, by which the small set is drawn; take "
            "cifar-100-python.tar.gz"
        )
    order = np.lexsort([batch["names"], batch["label"]])
    rows = order[drawn(batch["label"][order], per_class)]
    return {key: column[rows] for key, column in batch.items()}


def _content(splits: dict[str, Batch], classes: dict[str, tuple[str, ...]]) -> Content:
    readers = {
        split: lambda split=split: _examples(splits[split], split, classes) for split in splits
    }
    return Content(classes, readers, ("id",))


def _examples(batch: Batch, split: str, classes, *, named: bool = False) -> Iterator[Example]:
    images = batch["pixels"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    for row, image in enumerate(images):
        labels = {feature: int(batch[feature][row]) for feature in classes}
        name = f"{split}_{row:05d}"
        # TFDS shuffles by the key: with its own one, a copy of `tfds build` has the same order.
        yield name if named else row, {"id": name, "image": image, **labels}


# ---------------------------------------------------------------------------------------- pickles


class Array:
    """What a pickle says of a NumPy array; it becomes one only if it is plain bytes."""

    def __init__(self):
        self.state: Any = None

    def array(self) -> np.ndarray:
        """Returns the numbers, uint8.

        Raises:
          RefusedError: If they are no plain bytes of the shape that is named.
        """
        state = self.state
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickles.RefusedError("its pickle has an array without a state")
        _, shape, dtype, fortran, content = state
        content = content.encode("latin1") if isinstance(content, str) else content
        plain = isinstance(dtype, Array) and dtype.state in ("u1", "uint8") and not fortran
        sizes = shape if isinstance(shape, tuple) and all(type(n) is int for n in shape) else (-1,)
        if not plain or min(sizes) < 0 or not isinstance(content, bytes):
            raise pickles.RefusedError("its pickle has an array that is not of plain bytes")
        if len(content) != math.prod(sizes):
            raise pickles.RefusedError(f"its pickle has an array whose shape is not {sizes}")
        return np.frombuffer(content, np.uint8).reshape(sizes)


_ARRAYS = {f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")}
_NAMES = {*_ARRAYS, "numpy.ndarray", "numpy.dtype", "_codecs.encode"}


def _call(name: pickles.Name, args: tuple) -> Any:
    if name.path == "_codecs.encode":  # bytes, as Python 3 writes them for Python 2
        text = args[0] if args and isinstance(args[0], str) else ""
        return text.encode("latin1", errors="replace")
    value = Array()
    if name.path == "numpy.dtype":
        value.state = args[0] if args else None
    return value


def _build(instance: Any, state: Any) -> None:
    # A dtype's own state is its byte order, which a byte has not.
    if isinstance(instance, Array) and instance.state is None:
        instance.state = state


def load_pickle(content: bytes) -> Any:
    """Returns what one of the archive's pickles holds, an array as an `Array`.

    Raises:
      RefusedError: If it names anything but arrays, or is damaged.

    Example:
      >>> import pickle
      >>> batch = pickle.dumps({"data": np.arange(3, dtype=np.uint8)}, protocol=2)
      >>> load_pickle(batch)["data"].array().tolist()
      [0, 1, 2]
    """
    rules = pickles.Rules(
        "batch of CIFAR", lambda path: path in _NAMES, _call, build=_build, encoding="latin1"
    )
    return pickles.load(io.BytesIO(content), rules)

"""Data sets of the Hugging Face hub, through its own library `datasets`."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from robust_ssl.data.streamed import StreamedExamples

PREFIX = "hf:"


def open_hub(name: str, split: str, image_size: int | None) -> StreamedExamples:
    """Opens a split of a hub data set; decodes no picture yet.

    Args:
      name: ``"hf:owner/name"`` or ``"hf:owner/name/config"``.
      split: A split or a slice of one, as `datasets` writes them: ``"train[:10%]"``.
      image_size: As in `StreamedExamples`.

    Raises:
      ModuleNotFoundError: If `datasets` is not installed.
      ValueError: If the set cannot be loaded, or has not one column of images.
    """
    table = _load(name, split)
    image_key, label_key = _columns(table, name)
    datasets = _library(name)
    # As files: our own decoder names the picture that is broken.
    encoded = table.cast_column(image_key, datasets.Image(decode=False))
    labels = names = None
    if label_key is not None:
        labels = np.asarray(table[label_key][:])
        names = getattr(table.features[label_key], "names", None)
        if names is None:
            names = [str(label) for label in range(labels.max(initial=-1) + 1)]
        if len(labels) and (labels == -1).all():  # a test split without labels
            labels = names = None
    records = _reader(encoded, image_key, labels, name)
    rows = np.arange(len(table))
    return StreamedExamples(records, rows, image_size, names or (), name, split, labels)


def _library(name: str) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name!r} needs the library `datasets`: pip install 'robust-ssl[hf]'"
        ) from error
    return datasets


def _load(name: str, split: str) -> Any:
    parts = name.removeprefix(PREFIX).split("/")
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise ValueError(f"{name!r} must be hf:owner/name or hf:owner/name/config")
    library = _library(name)
    try:
        return library.load_dataset("/".join(parts[:2]), *parts[2:], split=split)
    except Exception as error:  # a dozen kinds, from no network to no such split
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"data set {name!r}, split {split!r}, cannot be loaded from the hub: {cause[:300]}"
        ) from error


def _columns(table: Any, name: str) -> tuple[str, str | None]:
    """Returns which column is the image and which the label (None: there is none)."""
    kinds = {column: type(feature).__name__ for column, feature in table.features.items()}
    images = [column for column, kind in kinds.items() if kind == "Image"]
    labels = [column for column, kind in kinds.items() if kind == "ClassLabel"]
    # The usual name first; else a lone column of the type cannot be mistaken.
    image_key = _pick(images, ("image", "img"))
    if image_key is None:
        columns = ", ".join(f"{column} ({kind})" for column, kind in kinds.items())
        raise ValueError(
            f"data set {name!r} has not one column of images; its columns are {columns}; read it "
            "with a function of your own"
        )
    # Some sets have plain numbers for labels.
    numbers = [c for c, feature in table.features.items() if _is_whole(feature)]
    label_key = _pick(labels, ("label", "labels", "fine_label"))
    return image_key, label_key or next((c for c in ("label", "labels") if c in numbers), None)


def _pick(columns: list[str], usual: tuple[str, ...]) -> str | None:
    for column in usual:
        if column in columns:
            return column
    return columns[0] if len(columns) == 1 else None


def _is_whole(feature: Any) -> bool:
    return str(getattr(feature, "dtype", "")).startswith(("int", "uint"))


def _reader(table: Any, image_key: str, labels: np.ndarray | None, name: str) -> Callable:
    def records(rows):
        batch = table[[int(row) for row in rows]][image_key]
        pairs = []
        for row, picture in zip(rows, batch, strict=True):
            content = picture and (picture["bytes"] or picture["path"])
            if not content:
                raise ValueError(f"image {row} of {name!r} is empty; leave it out of the set")
            if isinstance(content, str):
                content = pathlib.Path(content)
            pairs.append((content, None if labels is None else int(labels[row])))
        return pairs

    return records

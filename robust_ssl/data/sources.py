"""`load`: from what a user names to `Examples`."""

from __future__ import annotations

import dataclasses
import inspect
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from robust_ssl.build import resolve
from robust_ssl.data import pictures, tfds_source
from robust_ssl.data.addresses import refuse_addresses
from robust_ssl.data.examples import Examples, StreamedExamples, from_arrays

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm")


def load(
    source: Any,
    *,
    split: str = "train",
    image_size: int | None = None,
    data_dir: str | pathlib.Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    memory_limit: int = 4 * 2**30,
    **options: Any,
) -> Examples | StreamedExamples:
    """Reads one split of a data set.

    Args:
      source: One of

        * a TFDS name, ``"cifar10"``, ``"visual_domain_decathlon/gtsrb"``, ``"cifar10:3.0.2"``:
          any data set prepared under `data_dir` in the array_record format, also one that TFDS
          itself does not know; read without TensorFlow;
        * a folder, a `pathlib.Path` or a string that starts with ``/``, ``.`` or ``~``:
          ``folder/split/class/*.png``, or ``folder/class/*.png`` for a set that is all training;
        * arrays: ``(images, labels)``, ``{"images": ..., "labels": ..., "class_names": ...}``, or
          a mapping from split to either; see `from_arrays`;
        * a function, or its name as ``"module:function"``: called with `split`, with `seed` and
          `image_size` where it has such parameters, and with `options`; returns `Examples` or
          ``(images, labels)``.
      split: ``"train"``, ``"test"``, ...; for TFDS also a slice such as ``"train[:1000]"``.
      image_size: Brings each image to this height and width, pixels (Lanczos, center kept); None
        takes them as they are.
      data_dir: Where TFDS sets are; by default ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.
      limit: At most so many examples, drawn by `seed`; None takes all.
      seed: For `limit`, and for a function that asks for it.
      memory_limit: A TFDS set or folder with more bytes of pixels than this is not decoded into
        memory but read on demand.
      **options: For a function.

    Returns:
      `Examples`; `StreamedExamples`, which reads the same way, for a set above `memory_limit`.

    Raises:
      ValueError: If the name, split or file is wrong, or images or labels break what
        `from_arrays` asks of them.
      FileNotFoundError: If a folder does not exist or a TFDS set is not prepared yet.
      TypeError: If `options` are not parameters of the function.

    Example:
      >>> digits = load("robust_ssl.data:digits", split="test", limit=100)
      >>> digits.images.shape, digits.num_classes
      ((100, 32, 32, 3), 10)
    """
    refuse_addresses(source=source, data_dir=data_dir)
    if isinstance(source, Mapping) and "images" not in source:
        source = _pick_split(source, split)
    if isinstance(source, str) and _names_function(source):
        source = resolve(source)
    if options and not callable(source):
        raise TypeError(f"options {sorted(options)} are for functions, and {source!r} is none")
    if callable(source):
        examples = _from_function(source, split, seed, image_size, options)
    elif isinstance(source, pathlib.Path) or (
        isinstance(source, str) and source.startswith(("/", ".", "~"))
    ):
        examples = _from_folder(pathlib.Path(source).expanduser(), split, image_size)
    elif isinstance(source, str):
        examples = tfds_source.open_split(source, split, image_size, data_dir)
    else:
        examples = _from_values(source, split, "arrays")
    return _fit(examples, image_size, limit, seed, memory_limit)


def _fit(examples, image_size, limit, seed, memory_limit) -> Examples | StreamedExamples:
    if limit is not None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        # Before pictures are decoded: the others are never read.
        if limit < len(examples):
            examples = examples.subset(limit, seed)
    # Decoded at their size already; only arrays are resized below.
    if isinstance(examples, StreamedExamples):
        return examples.in_memory() if examples.nbytes <= memory_limit else examples
    if image_size is None or examples.image_shape[:2] == (image_size, image_size):
        return examples
    resized = np.stack([pictures.resize(image, image_size) for image in examples.images])
    return dataclasses.replace(examples, images=resized)


def _pick_split(source: Mapping, split: str) -> Any:
    if split not in source:
        raise ValueError(f"arrays for split {split!r} are missing; there are {sorted(source)}")
    return source[split]


def _from_values(value: Any, split: str, name: str) -> Examples:
    """`Examples` from what a function returned or a user passed: Examples, tuple or mapping."""
    if isinstance(value, (Examples, StreamedExamples)):
        return value
    if isinstance(value, Mapping):
        unknown = set(value) - {"images", "labels", "class_names", "name"}
        if "images" not in value or unknown:
            raise ValueError(
                f"{name!r}: a mapping must hold images, and may hold labels, class_names and "
                f"name; got {sorted(value)}"
            )
        return from_arrays(**{"name": name, **value}, split=split)
    if isinstance(value, tuple) and len(value) == 2:
        return from_arrays(*value, name=name, split=split)
    raise ValueError(
        f"{name!r} must be Examples, (images, labels) or a mapping with images, got "
        f"{type(value).__name__}; a data set can also be a TFDS name, a folder or a function"
    )


def _names_function(source: str) -> bool:
    module, colon, function = source.partition(":")
    # "cifar10:3.0.2" is a TFDS name with a version; a function's file ends with ".py".
    # A slash before the colon is a TFDS configuration.
    is_module = "/" not in module or module.endswith(".py")
    return bool(colon) and function.isidentifier() and is_module


def _from_function(function, split, seed, image_size, options) -> Examples | StreamedExamples:
    name = getattr(function, "__name__", type(function).__name__)
    parameters = inspect.signature(function).parameters
    arguments = dict(options)
    if "seed" in parameters:
        arguments["seed"] = seed
    if "image_size" in parameters and image_size is not None:
        arguments["image_size"] = image_size
    # Bound first: a TypeError from inside the function must not look like wrong arguments.
    try:
        inspect.signature(function).bind(split, **arguments)
    except TypeError as error:
        raise TypeError(
            f"data function {name!r} cannot be called with split and {sorted(arguments)}: {error}; "
            f"its parameters are {list(parameters)}"
        ) from error
    return _from_values(function(split, **arguments), split, name)


def _from_folder(folder: pathlib.Path, split: str, image_size: int | None) -> StreamedExamples:
    if not folder.is_dir():
        raise FileNotFoundError(f"data folder {str(folder)!r} does not exist")
    root, class_names = _class_folders(folder, split)
    files, labels = [], []
    for label, class_name in enumerate(class_names):
        pictures_of_class = _pictures(root / class_name)
        files += pictures_of_class
        labels += [label] * len(pictures_of_class)
    if not files:
        raise ValueError(
            f"data folder {str(root)!r} is empty: no {', '.join(PICTURE_SUFFIXES)} files in "
            f"{root.name}/CLASS/"
        )
    labels = np.asarray(labels, np.int32)

    def records(rows):
        return [(files[row], int(labels[row])) for row in rows]

    rows = np.arange(len(files))
    name = folder.resolve().name
    return StreamedExamples(records, rows, image_size, class_names, name, split, labels)


def _class_folders(folder: pathlib.Path, split: str) -> tuple[pathlib.Path, list[str]]:
    """Returns the folder that holds the class folders, and the class names of all splits."""
    inside = _subfolders(folder)
    if any(_pictures(folder / name) for name in inside):
        if split != "train":
            raise ValueError(
                f"data folder {str(folder)!r} has class folders and no splits, so it is all "
                f"'train'; for split {split!r} make {folder.name}/train/CLASS and "
                f"{folder.name}/{split}/CLASS"
            )
        return folder, inside
    if split not in inside:
        raise ValueError(f"data folder {str(folder)!r} has no split {split!r}; it has {inside}")
    # The union, so that a class without test images does not shift the labels of the others.
    class_names = set().union(*(_subfolders(folder / part) for part in inside))
    return folder / split, sorted(class_names)


def _subfolders(folder: pathlib.Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _pictures(folder: pathlib.Path) -> list[pathlib.Path]:
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    # Hidden ones are no pictures: macOS leaves "._name.png" beside each file it copies.
    return [f for f in files if f.suffix.lower() in PICTURE_SUFFIXES and not f.name.startswith(".")]

"""`load`: from what a user names to `Examples`."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from robust_ssl import disk
from robust_ssl.build import resolve
from robust_ssl.data import checks, folders, hub, pictures, tfds_source
from robust_ssl.data.addresses import refuse_addresses
from robust_ssl.data.examples import Examples, from_arrays
from robust_ssl.data.resizing import Resizing
from robust_ssl.data.streamed import StreamedExamples

_log = logging.getLogger(__name__)


def load(
    source: Any,
    *,
    split: str = "train",
    image_size: int | None = None,
    data_dir: str | pathlib.Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    memory_limit: int = 4 * 2**30,
    workers: int = 0,
    skip_unreadable: bool = False,
    resizing: Resizing | str | Mapping[str, Any] | None = None,
    **options: Any,
) -> Examples | StreamedExamples:
    """Reads one split of a data set.

    Args:
      source: One of

        * a TFDS name, ``"cifar10"``, ``"visual_domain_decathlon/gtsrb"``, ``"cifar10:3.0.2"``:
          any data set prepared under `data_dir` in the array_record format, also one that TFDS
          itself does not know; read without TensorFlow.  ``robust-ssl data prepare NAME`` prepares
          the public ones;
        * a data set of the Hugging Face hub, ``"hf:owner/name"`` or ``"hf:owner/name/config"``,
          through `datasets` (``pip install 'robust-ssl[hf]'``);
        * a folder, a `pathlib.Path` or a string that starts with ``/``, ``.`` or ``~``:
          ``folder/split/class/*.png``, or ``folder/class/*.png`` for a set that is all training;
          `robust_ssl.data.folders` says which folders are which;
        * arrays: ``(images, labels)``, ``{"images": ..., "labels": ..., "class_names": ...}``,
          images alone (an array, a tensor or a list), or a mapping from split to one of these; see
          `from_arrays`;
        * a function, or its name as ``"module:function"``: called with `split`, with `seed` and
          `image_size` where it has such parameters, and with `options`; returns `Examples` or
          ``(images, labels)``.
      split: ``"train"``, ``"test"``, ...; for TFDS also a slice such as ``"train[:1000]"``.
      image_size: Brings each image to this height and width, pixels; None takes them as they are.
      data_dir: Where TFDS sets are; by default ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.
      limit: At most so many examples, drawn by `seed`; None takes all.
      seed: For `limit`, and for a function that asks for it.
      memory_limit: A TFDS set or folder with more bytes of pixels than this is not decoded into
        memory but read on demand.
      workers: How many processes read and decode the batches of a set that is read on demand, with
        grain (``pip install 'robust-ssl[grain]'``); 0 are threads of this process.  Batches are
        the same.
      skip_unreadable: Whether pictures that cannot be decoded are left out, and counted in the
        notes; in a set that is read on demand another one of the training batch takes the place.
        Otherwise one is an error.
      resizing: How images are brought to their size: a `Resizing`, its fields as a mapping, or a
        mode (``"shorter"``, ``"squash"``, ``"longest"``, ``"fit"``).  None leaves those of this
        size as they are, and scales others with Lanczos' filter, center kept.
        `robust_ssl.weights.resizing_of` has that of an encoder.
      **options: For a function.

    Returns:
      `Examples`; `StreamedExamples`, which reads the same way, for a set above `memory_limit`.
      Its ``notes``, which are logged, name what was left out, and nearly black images.

    Raises:
      ValueError: If the name, split, size or file is wrong, or images or labels break what
        `from_arrays` asks of them.
      FileNotFoundError: If a folder does not exist or a TFDS set is not prepared yet.
      TypeError: If `options` are not parameters of the function.

    Example:
      >>> digits = load("robust_ssl.data:digits", split="test", limit=100)
      >>> digits.images.shape, digits.num_classes
      ((100, 32, 32, 3), 10)
    """
    refuse_addresses(source=source, data_dir=data_dir)
    if image_size is not None:
        _check_pixels(image_size)
    if resizing is not None:
        resizing = Resizing.read(resizing, "resizing")
        image_size = resizing.size(image_size)
    if isinstance(source, Mapping) and "images" not in source:
        source = _pick_split(source, split)
    if isinstance(source, str) and _names_function(source):
        source = resolve(source)
    if options and not callable(source):
        raise TypeError(f"options {sorted(options)} are for functions, and {source!r} is none")
    if callable(source):
        value, name = _called(source, split, seed, image_size, options)
        examples, resizing = _of_one_size(value, split, name, image_size, resizing)
    elif is_folder(source):
        examples = folders.open_split(disk.expanded(source), split, image_size)
    elif isinstance(source, str) and source.startswith(hub.PREFIX):
        examples = hub.open_hub(source, split, image_size)
    elif isinstance(source, str):
        examples = tfds_source.open_split(source, split, image_size, data_dir)
    else:
        examples, resizing = _of_one_size(source, split, "arrays", image_size, resizing)
    if isinstance(examples, StreamedExamples):
        examples = dataclasses.replace(
            examples,
            workers=workers or examples.workers,
            skip_unreadable=skip_unreadable or examples.skip_unreadable,
            resizing=resizing or examples.resizing,
        )
    examples = _fit(examples, image_size, resizing, limit, seed, memory_limit)
    if examples.notes:
        _log.warning("%s: %s", examples.where, "; ".join(examples.notes))
    return examples


def _check_pixels(image_size: Any) -> None:
    is_whole = isinstance(image_size, int | np.integer) and not isinstance(image_size, bool)
    if not is_whole or image_size < 1:
        raise ValueError(
            f"image_size must be a whole number of pixels, at least 1, got {image_size!r}"
        )


def is_folder(source: Any) -> bool:
    """Whether a source is a folder of pictures: a path, or a text that starts like one.

    Example:
      >>> is_folder("./cats"), is_folder("cifar10"), is_folder("./my_data.py:images")
      (True, False, False)
    """
    if isinstance(source, pathlib.Path):
        return True
    is_text = isinstance(source, str) and source.startswith(("/", ".", "~"))
    return is_text and not _names_function(source)


def _fit(examples, image_size, resizing, limit, seed, memory_limit) -> Examples | StreamedExamples:
    if limit is not None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        # Before pictures are decoded: the others are never read.
        if limit < len(examples):
            examples = examples.subset(limit, seed)
    # Decoded at their size already; only arrays are resized below.
    if isinstance(examples, StreamedExamples):
        if examples.nbytes > memory_limit:
            return examples
        examples = examples.in_memory()
    elif image_size is not None and (
        resizing is not None or examples.image_shape[:2] != (image_size, image_size)
    ):
        resized = [pictures.resize(image, image_size, resizing) for image in examples.images]
        examples = dataclasses.replace(examples, images=np.stack(resized))
    dark = checks.darkness(examples.images)
    if dark and dark not in examples.notes:
        examples = dataclasses.replace(examples, notes=(*examples.notes, dark))
    return examples


def _of_one_size(value: Any, split: str, name: str, image_size: int | None, resizing: Any):
    """Returns the examples of what was given or returned, and the resizing that is left to do."""
    of_one_size = _one_size(value, image_size, resizing)
    if of_one_size is not value and resizing is not None:  # done, and not to be done again
        resizing = dataclasses.replace(resizing, sized="keep")
    return _from_values(of_one_size, split, name), resizing


def _one_size(source: Any, image_size: int | None, resizing: Resizing | None) -> Any:
    """Brings a list of images to one size, which an array has anyway."""
    images = source["images"] if isinstance(source, Mapping) else source
    images = images[0] if isinstance(images, tuple) and len(images) == 2 else images
    if image_size is None or not isinstance(images, list) or not images:
        return source
    images = [checks.as_pixels([image], f"image {i}")[0] for i, image in enumerate(images)]
    images = [pictures.resize(image, image_size, resizing) for image in images]
    if isinstance(source, Mapping):
        return {**source, "images": images}
    return (images, source[1]) if isinstance(source, tuple) else images


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
    if isinstance(value, list) and len(value) == 2 and np.ndim(value[0]) > 3:
        raise ValueError(f"{name!r} is a list of two; images and labels are a tuple: tuple(...)")
    if isinstance(value, list) or hasattr(value, "__array__"):
        return from_arrays(value, name=name, split=split)
    raise ValueError(
        f"{name!r} must be Examples, (images, labels) or a mapping with images, got "
        f"{type(value).__name__}; a data set can also be a TFDS name, a folder or a function"
    )


def _names_function(source: str) -> bool:
    module, colon, function = source.partition(":")
    # "cifar10:3.0.2" is a TFDS name with a version; a function's file ends with ".py".
    # A slash before the colon is a TFDS configuration.
    is_module = ("/" not in module or module.endswith(".py")) and module != "hf"
    return bool(colon) and function.isidentifier() and is_module


def _called(function, split, seed, image_size, options) -> tuple[Any, str]:
    """Returns what a data function returns, and its name."""
    inner = getattr(function, "func", function)  # of a partial, which says some of it itself
    name = getattr(inner, "__name__", type(inner).__name__)
    said, parameters = getattr(function, "keywords", {}), inspect.signature(function).parameters
    arguments = dict(options)
    if "seed" in parameters and "seed" not in said:
        arguments["seed"] = seed
    if "image_size" in parameters and image_size is not None and "image_size" not in said:
        arguments["image_size"] = image_size
    # Bound first: a TypeError from inside the function must not look like wrong arguments.
    try:
        inspect.signature(function).bind(split, **arguments)
    except TypeError as error:
        raise TypeError(
            f"data function {name!r} cannot be called with split and {sorted(arguments)}: {error}; "
            f"its parameters are {list(parameters)}"
        ) from error
    return function(split, **arguments), name

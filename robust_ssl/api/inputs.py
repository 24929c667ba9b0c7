"""What the three calls are given, as the values that they work on."""

from __future__ import annotations

import difflib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from robust_ssl import data, weights
from robust_ssl.api.names import BUILTIN
from robust_ssl.build import Seed, read
from robust_ssl.data.checks import as_images, check_not_bits
from robust_ssl.evaluation.analysis.layers import as_value
from robust_ssl.models.bridge import Bridge
from robust_ssl.parallel import Parallel
from robust_ssl.types import Encoder

_PUT_A_HEAD_ON_IT = (
    "an encoder has no classes to measure; put a head on it: "
    "robust_ssl.secure(encoder, images, labels, recipe='linear_probe')"
)


def encoder_of(encoder: Any) -> Any:
    """Returns an encoder: what is given, or the one of a shipped name or a path.

    Raises:
      ValueError: If it is a class or an integer, or a path without an encoder.
    """
    if isinstance(encoder, (str, os.PathLike)):
        if weights.is_foreign(os.fspath(encoder)):
            return weights.import_encoder(encoder)
        return weights.load_encoder(encoder)
    if isinstance(encoder, type) or not callable(encoder):
        raise ValueError(
            f"the encoder must be a robust_ssl.Encoder, a shipped name (robust_ssl.list"
            f'("encoders")) or a path, got {encoder!r}'
        )
    return encoder


def classifier_of(classifier: Any) -> Any:
    """Returns a classifier: what is given, or the one that a directory holds.

    Raises:
      ValueError: If it has no logits, as an encoder has none.
    """
    if isinstance(classifier, (str, os.PathLike)):
        if classifier in weights.list_encoders() and not os.path.isdir(classifier):
            raise ValueError(f"{classifier!r} is an encoder; {_PUT_A_HEAD_ON_IT}")
        return weights.load_classifier(classifier)
    if isinstance(classifier, Encoder):
        if isinstance(classifier.module, Bridge):
            raise ValueError(
                f"{classifier.module.kind} was taken for an encoder; if it has logits, say where "
                "it is taken how many: num_classes=10, or class_names="
            )
        raise ValueError(_PUT_A_HEAD_ON_IT)
    if isinstance(classifier, type) or not callable(classifier):
        raise ValueError(
            f"the classifier must be a robust_ssl.Classifier, or the directory of a saved one, got "
            f"{classifier!r}"
        )
    return as_value(classifier)


def one_budget(epsilon: Any, otherwise: str) -> float:
    """Returns a budget as a number.

    Args:
      epsilon: The budget.
      otherwise: What to do with several.

    Raises:
      ValueError: If it is several, or no number.
    """
    if np.ndim(epsilon):
        raise ValueError(f"epsilon= is one budget, got {epsilon!r}; {otherwise}")
    if isinstance(epsilon, (bool, np.bool_)) or np.asarray(epsilon).dtype.kind not in "iuf":
        raise ValueError(f"epsilon= is a number, for example 8/255, got {epsilon!r}")
    return float(epsilon)


def count(value: Any, name: str) -> int:
    """Returns a whole number of at least 1.

    Raises:
      ValueError: If it is none.
    """
    if isinstance(value, (bool, np.bool_)) or np.asarray(value).dtype.kind not in "iu" or value < 1:
        raise ValueError(f"{name}= is a whole number of at least 1, got {value!r}")
    return int(value)


def seed(value: Any) -> int:
    """Returns a seed as an integer.

    Raises:
      ValueError: If it is no whole number that a key can be made of.
    """
    return read(Seed, _plain(value), "seed=")


def switch(value: Any, name: str) -> bool:
    """Returns a truth.

    Raises:
      ValueError: If it is another value, as the text ``"no"`` is.
    """
    return read(bool, _plain(value), f"{name}=")


def _plain(value: Any) -> Any:
    """Returns an array of no axes, as NumPy's and JAX's scalars are, as a Python number."""
    return value.item() if getattr(value, "shape", None) == () else value


def resizing_of(encoder: Any) -> data.Resizing | None:
    """Returns how pictures are resized for a model, as its files or the model itself say."""
    if isinstance(encoder, (str, os.PathLike)):
        return weights.resizing_of(os.fspath(encoder))
    return getattr(getattr(encoder, "encoder", encoder), "resizing", None)


def examples_of(
    images: Any,
    labels: Any,
    image_size: int | None,
    split: str,
    resizing: data.Resizing | None = None,
) -> Any:
    """Returns examples of arrays, `data.Examples`, or a data set's name or folder.

    Args:
      images: Anything that `data.load` takes; ``"digits"`` and ``"photo_crops"`` are there
        without a download.
      labels: Of arrays; None where `images` has its own, or there are none.
      image_size: What the model takes, pixels; a data set by name is brought to it.
      split: Of a data set by name.
      resizing: How its pictures get their size, see `data.load`.

    Raises:
      ValueError: If arrays have another size, with the line that resizes them.
    """
    if isinstance(images, (str, pathlib.Path)):
        if labels is not None:
            raise ValueError(f"{str(images)!r} has its own labels; leave out `labels`")
        if not str(images):
            raise ValueError('the name of the images is empty; see robust_ssl.list("data")')
        named = BUILTIN.get(str(images), images)
        close = difflib.get_close_matches(str(images), BUILTIN, n=1, cutoff=0.8)
        if named is images and close and not data.is_folder(images):
            raise ValueError(f"no images {images!r}; did you mean {close[0]!r}?")
        examples = data.load(named, split=split, image_size=image_size, resizing=resizing)
    elif isinstance(images, (data.Examples, data.StreamedExamples)):
        examples = images
    elif _has_labels(images):
        if labels is not None:
            raise ValueError("the images have their own labels; leave out `labels`")
        examples = data.load(images, split=split)
    else:
        examples = data.from_arrays(images, labels, name="images", split=split)
    height, width, _ = examples.image_shape
    if image_size is not None and (height, width) != (image_size, image_size):
        raise ValueError(
            f"the images are {height}x{width} pixels and the model takes {image_size}x{image_size};"
            f" resize them: robust_ssl.data.load((images, labels), image_size={image_size})"
        )
    return examples


def _has_labels(images: Any) -> bool:
    """Whether it is a mapping or a pair that `data.load` takes as images with labels."""
    pair = isinstance(images, tuple) and len(images) == 2
    return isinstance(images, Mapping) or (pair and np.ndim(images[0]) != np.ndim(images[1]))


def answer_of(model: Any, count: int, image_shape: tuple[int, ...]) -> Any:
    """Returns what a function gives for so many images, as shapes.

    Raises:
      ValueError: If it computes with NumPy or asks for values, so that it has no gradient.
    """
    images = jax.ShapeDtypeStruct((count, *image_shape), np.float32)
    try:
        return jax.eval_shape(lambda given: model(given), images)
    except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError) as error:
        name = getattr(model, "__name__", type(model).__name__)
        raise ValueError(
            f"{name} is no function of JAX: it turns images into arrays of NumPy or asks for their "
            f"values; compute with jax.numpy, or say so: robust_ssl.from_callable({name}, "
            "image_size, on_host=True)"
        ) from error


def what_is(value: Any) -> str:
    """Returns what errors call a value: an array by its shape, anything else by its type."""
    return f"an array {value.shape}" if hasattr(value, "shape") else type(value).__name__


def size_of(model: Any) -> int | None:
    """Returns the height and width that a model takes, None where it does not say."""
    return getattr(model, "image_size", None)


def pixels_of(images: Any) -> np.ndarray:
    """Returns images as float32 pixels in [0, 1], ``[n, H, W, 3]``; floats are not rounded.

    Raises:
      ValueError: If they are neither 8-bit images nor floats in [0, 1], with the line that
        converts them.
    """
    if isinstance(images, (data.Examples, data.StreamedExamples)):
        images = images.read(np.arange(len(images)))["images"]
    pixels = as_images(images, "'arrays'")
    if pixels.dtype != np.uint8:
        return pixels
    check_not_bits(pixels, "'arrays'")
    return pixels.astype(np.float32) / 255


def devices_of(parallel: Parallel | None) -> Parallel:
    """Returns the devices: what is given, or the first one.

    Raises:
      ValueError: If something else is given.
    """
    if parallel is None:
        return Parallel.create(num_devices=1)
    if not isinstance(parallel, Parallel):
        raise ValueError(
            "parallel= is a robust_ssl.parallel.Parallel, for example "
            f"Parallel.create(num_devices=2); got {parallel!r}"
        )
    return parallel


def batch_of(batch_size: int, images: int, parallel: Parallel) -> int:
    """Returns the batch size that so many images allow: at most what is asked for.

    Fewer images make it a power of two: 1, 2, 4 and 8 devices share that, and so train alike.

    Raises:
      ValueError: If there are fewer images than devices.
    """
    devices = len(parallel.devices)
    if images < devices:
        raise ValueError(f"{images} images cannot be shared by {devices} devices; take fewer")
    if batch_size <= images:
        return batch_size
    power = 1 << images.bit_length() - 1
    return images - images % devices if power % devices else power

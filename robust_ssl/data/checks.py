"""What images and labels must be, checked on the host before the first step."""

from __future__ import annotations

from typing import Any

import numpy as np


def as_pixels(images: Any, where: str) -> np.ndarray:
    """Returns images as ``uint8 [n, H, W, 3]``; floats in [0, 1] are rounded to 8 bits.

    Args:
      images: ``uint8 [n, H, W, 3]``, or float in [0, 1] of the same shape.
      where: What an error calls them, for example ``"'mine' (train)"``.

    Raises:
      ValueError: If the rank, channel count or dtype is wrong, sizes differ, there is no image,
        or a float is NaN, infinite or outside [0, 1]; names the first offender.

    Example:
      >>> as_pixels(np.full((1, 1, 1, 3), 0.5), "an example").tolist()
      [[[[128, 128, 128]]]]
    """
    images = _as_array(images, where)
    if len(images) == 0:
        raise ValueError(f"{where} is empty: no images; choose another split or folder")
    if images.ndim != 4:
        gray = "; for gray images: np.repeat(images[..., None], 3, axis=-1)"
        raise ValueError(
            f"images of {where} must be [n, height, width, 3], got shape {images.shape}"
            f"{gray if images.ndim == 3 else ''}"
        )
    if images.shape[3] != 3:
        raise ValueError(
            f"images of {where} must have 3 channels last, got shape {images.shape}"
            f"{_channel_hint(images.shape)}"
        )
    if images.shape[1] == 0 or images.shape[2] == 0:
        raise ValueError(f"images of {where} have no pixels: shape {images.shape}")
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(
            f"images of {where} must be uint8 (0 to 255) or float (0 to 1), got {images.dtype}; "
            "if the values are 0 to 255: images.astype(np.uint8)"
        )
    # float32 holds every multiple of 1/255 well enough to round back to it.
    _check_range(images, where)
    return np.rint(images.astype(np.float32, copy=False) * 255).astype(np.uint8)


def _as_array(images: Any, where: str) -> np.ndarray:
    if isinstance(images, (list, tuple)):
        # NumPy's own error for ragged lists names no image.
        shapes = [np.shape(image) for image in images]
        check_one_size(shapes, where)
    return np.asarray(images)


def check_one_size(shapes: list[tuple[int, ...]], where: str) -> None:
    """Raises ValueError, naming the first image whose shape is not that of image 0."""
    for index, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(
                f"images of {where} differ in size: image {index} is {shape}, image 0 is "
                f"{shapes[0]}; bring them to one size first"
            )


def _channel_hint(shape: tuple[int, ...]) -> str:
    if shape[1] == 3:
        return "; channels seem to come first: images.transpose(0, 2, 3, 1)"
    if shape[3] == 1:
        return "; for gray images: np.repeat(images, 3, axis=-1)"
    if shape[3] == 4:
        return "; to drop the alpha channel: images[..., :3]"
    return ""


def _check_range(images: np.ndarray, where: str) -> None:
    # NaN first: it compares false with both ends of the range.
    finite = np.isfinite(images)
    if not finite.all():
        index = _first(~finite)
        raise ValueError(
            f"images of {where} hold {images[index]} at index {list(index)} "
            f"({_count_bad(~finite)}); repair or drop those images"
        )
    outside = (images < 0) | (images > 1)
    if outside.any():
        index = _first(outside)
        hint = "divide by 255" if images.min() >= 0 and images.max() <= 255 else "rescale them"
        raise ValueError(
            f"images of {where} must lie in [0, 1], got {images[index]:.6g} at index "
            f"{list(index)} ({_count_bad(outside)}); {hint}, and leave normalization to the encoder"
        )


def _first(bad: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(np.argmax(bad), bad.shape))


def _count_bad(bad: np.ndarray) -> str:
    images = int(bad.reshape(len(bad), -1).any(axis=1).sum())
    return f"{images} of {len(bad)} images"


def as_labels(labels: Any, count: int, num_classes: int | None, where: str) -> np.ndarray:
    """Returns labels as ``int32 [count]`` after checking each of them.

    Args:
      labels: Integers ``[count]``.
      count: How many images there are.
      num_classes: Labels must be smaller; None where only the labels tell.
      where: What an error calls them.

    Raises:
      ValueError: If they are not integers, not ``[count]``, negative or too large; names the
        first offender.

    Example:
      >>> as_labels([0, 2, 1], 3, 3, "an example")
      array([0, 2, 1], dtype=int32)
    """
    labels = np.asarray(labels)
    if labels.ndim != 1:
        hint = "; for one-hot labels: labels.argmax(axis=-1)" if labels.ndim == 2 else ""
        raise ValueError(f"labels of {where} must be [n], got shape {labels.shape}{hint}")
    if len(labels) != count:
        raise ValueError(f"{where} has {count} images and {len(labels)} labels")
    if not np.issubdtype(labels.dtype, np.integer):
        index = _first_non_integer(labels)
        raise ValueError(
            f"labels of {where} must be integers, got {labels.dtype}: labels[{index}] is "
            f"{labels[index]!r}; number the classes from 0 and use labels.astype(np.int32)"
        )
    if (labels < 0).any():
        index = int(np.argmax(labels < 0))
        raise ValueError(
            f"labels of {where} must not be negative: labels[{index}] is {labels[index]}; drop "
            "unlabelled images, or pass labels=None for a set without labels"
        )
    if num_classes is not None and (labels >= num_classes).any():
        index = int(np.argmax(labels >= num_classes))
        raise ValueError(
            f"labels of {where} must be below the number of classes, {num_classes}: "
            f"labels[{index}] is {labels[index]}; number the classes from 0, or name them all"
        )
    return labels.astype(np.int32)


def _first_non_integer(labels: np.ndarray) -> int:
    if np.issubdtype(labels.dtype, np.floating):
        broken = ~np.isfinite(labels) | (labels != np.rint(labels))
        return int(np.argmax(broken))  # 0 when every value happens to be whole
    return 0

"""What images and labels must be, checked on the host before the first step."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from robust_ssl.data import label_hints, pictures

MOST_UNNAMED = 100_000  # classes; a label above is an id, and names for all below it take memory
DARK = 16  # what no pixel of a nearly black image reaches: an eighth of the middle gray


def as_pixels(images: Any, where: str) -> np.ndarray:
    """Returns images as ``uint8 [n, H, W, 3]``; floats in [0, 1] are rounded to 8 bits.

    What can be meant in one way only is brought to this form: channels first, gray images, a list
    of images, torch tensors and Pillow images.

    Args:
      images: ``uint8 [n, H, W, 3]``, or float in [0, 1] of the same shape; ``[n, 3, H, W]``,
        ``[n, H, W]``, ``[n, H, W, 1]`` or ``[n, 1, H, W]`` of either; or a list of such images.
      where: What an error calls them, for example ``"'mine' (train)"``.

    Raises:
      ValueError: If the rank, channel count or dtype is wrong, sizes differ, there is no image,
        or a float is NaN, infinite or outside [0, 1]; names the first offender and the line that
        converts.

    Example:
      >>> as_pixels(np.full((1, 1, 1, 3), 0.5), "an example").tolist()
      [[[[128, 128, 128]]]]
      >>> as_pixels(np.zeros((2, 3, 8, 6), np.uint8), "an example").shape
      (2, 8, 6, 3)
    """
    images = as_images(images, where)
    # float32 holds every multiple of 1/255 well enough to round back to it.
    return images if images.dtype == np.uint8 else np.rint(images * 255).astype(np.uint8)


def as_images(images: Any, where: str) -> np.ndarray:
    """Returns images as `as_pixels` does, but floats as float32, which is not rounded to 8 bits.

    Example:
      >>> as_images(np.full((1, 3, 8, 6), 0.3), "an example").dtype
      dtype('float32')
    """
    images = _as_array(images, where)
    _check_numbers(images, where)
    if len(images) == 0:
        raise ValueError(f"{where} is empty: no images; choose another split or folder")
    images = _three_channels_last(images, where)
    if images.shape[1] == 0 or images.shape[2] == 0:
        raise ValueError(f"images of {where} have no pixels: shape {images.shape}")
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(
            f"images of {where} must be uint8 (0 to 255) or float (0 to 1), got {images.dtype}"
            f"{_integer_hint(images)}"
        )
    _check_range(images, where)
    return images.astype(np.float32, copy=False)


def as_array(value: Any, where: str) -> np.ndarray:
    """Returns an array, a tensor or a Pillow image as a NumPy array.

    Raises:
      ValueError: If it is none, for example a tensor on another device.
    """
    if hasattr(value, "convert") and hasattr(value, "getexif"):  # a palette image holds places
        return pictures.to_rgb(value, where)
    if hasattr(value, "detach"):  # torch; one that needs a gradient is no array otherwise
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # which torch itself gives to no array
            value = value.float()
    if np.ma.is_masked(value):
        raise ValueError(f"{where} is masked; fill it: array.filled(0)")
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where} cannot be read as an array: {error}") from error


def _as_array(images: Any, where: str) -> np.ndarray:
    if isinstance(images, (list, tuple)):
        images = [as_array(image, f"image {i} of {where}") for i, image in enumerate(images)]
        # NumPy's own error for ragged lists names no image.
        check_one_size([image.shape for image in images], where)
        return _widened(np.stack(images)) if images else np.empty((0,))
    images = _widened(as_array(images, where))
    if images.ndim == 0:
        raise ValueError(
            f"images of {where} must be an array [n, height, width, 3] or a list of images, got "
            f"{images.dtype} of shape ()"
        )
    return images


def _widened(images: np.ndarray) -> np.ndarray:
    """Returns floats that NumPy does not know, as JAX's bfloat16, as float32."""
    unknown = images.dtype.kind == "V" and jnp.issubdtype(images.dtype, jnp.floating)
    return images.astype(np.float32) if unknown else images


def _check_numbers(images: np.ndarray, where: str) -> None:
    if images.dtype.kind in "US":
        raise ValueError(f"images of {where} are texts; for files give their folder, or read them")
    if images.dtype.kind not in "biuf":
        raise ValueError(
            f"images of {where} must be uint8 (0 to 255) or float (0 to 1), got {images.dtype}; "
            "are they of one size?"
        )


def check_one_size(shapes: list[tuple[int, ...]], where: str) -> None:
    """Raises ValueError, naming the first image whose shape is not that of image 0."""
    for index, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(
                f"images of {where} differ in size: image {index} is {shape}, image 0 is "
                f"{shapes[0]}; bring them to one size first"
            )


def _three_channels_last(images: np.ndarray, where: str) -> np.ndarray:
    """Returns ``[n, H, W, 3]`` of what can be nothing else; raises ValueError for the rest."""
    shape = images.shape
    few = (1, 3, 4)  # channels: a height or width of so few pixels could be either
    if len(shape) == 3 and shape[0] not in few and shape[2] not in few:
        return np.repeat(images[..., None], 3, axis=-1)
    if len(shape) != 4:
        raise ValueError(
            f"images of {where} must be [n, height, width, 3], got shape {shape}{_rank_hint(shape)}"
        )
    if shape[3] == 3:
        return images
    first = shape[1] in (1, 3) and shape[2] not in few and shape[3] not in few
    if first:
        images = np.moveaxis(images, 1, 3)
    if images.shape[3] == 3:
        return np.ascontiguousarray(images)
    if images.shape[3] == 1 and (first or shape[1] not in few):
        return np.repeat(images, 3, axis=-1)
    raise ValueError(
        f"images of {where} must have 3 channels last, got shape {shape}{_channel_hint(shape)}"
    )


def _rank_hint(shape: tuple[int, ...]) -> str:
    if len(shape) == 2:
        return "; rows of pixels must be given their shape: images.reshape(-1, height, width, 3)"
    if len(shape) != 3:
        return ""
    one = "images[None]" if shape[2] == 3 else "images.transpose(1, 2, 0)[None]"
    one = f"; for one image: {one}" if 3 in (shape[0], shape[2]) else ""
    return f"{one}; for gray images: np.repeat(images[..., None], 3, axis=-1)"


def _channel_hint(shape: tuple[int, ...]) -> str:
    if shape[3] == 1:
        return "; for gray images: np.repeat(images, 3, axis=-1)"
    if shape[3] == 4:
        return "; to drop the alpha channel: images[..., :3]"
    if shape[1] == 3:
        return "; if channels come first: images.transpose(0, 2, 3, 1)"
    if shape[1] == 4:
        return "; for channels first with alpha: images[:, :3].transpose(0, 2, 3, 1)"
    return ""


def _integer_hint(images: np.ndarray) -> str:
    if images.dtype == bool:
        return "; for black and white: images * np.uint8(255)"
    low, high = images.min(), images.max()
    if low >= 0 and high <= 255:
        return "; the values are 0 to 255: images.astype(np.uint8)"
    if low >= 0 and high <= 65535:
        return f"; the largest is {high}: images / 65535 for 16 bits, images / 4095 for 12"
    return f"; the values are {low} to {high}: scale them to [0, 1]"


def check_not_bits(images: np.ndarray, where: str) -> None:
    """Raises ValueError for ``uint8`` images of zeros and ones: floats that were cast.

    All zeros are let through, which is what a placeholder has.

    Example:
      >>> check_not_bits(np.array([0, 1, 255], np.uint8), "an example")
    """
    if images.max() == 1:
        raise ValueError(
            f"images of {where} are uint8 and hold 0 and 1 only, of 255; floats in [0, 1] are "
            "taken as they are, without a cast; for masks: images * 255"
        )


def _check_range(images: np.ndarray, where: str) -> None:
    # NaN first: it compares false with both ends of the range.
    finite = np.isfinite(images)
    if not finite.all():
        index = _first(~finite)
        raise ValueError(
            f"images of {where} hold {images[index]} at index {list(index)} "
            f"({_count_bad(~finite)}); repair or drop those images"
        )
    low, high = images.min(), images.max()
    if low < 0 or high > 1:
        outside = (images < 0) | (images > 1)
        index = _first(outside)
        raise ValueError(
            f"images of {where} must lie in [0, 1], got {images[index]:.6g} at index "
            f"{list(index)} ({_count_bad(outside)}); {_scale_hint(low, high)}, and leave "
            "normalization to the encoder"
        )
    if 0 < high <= 1.001 / 255:
        raise ValueError(
            f"no pixel of {where} is above {high:.6g}, one of 255 levels: were the images divided "
            "by 255 twice? Divide once"
        )


def _scale_hint(low: float, high: float) -> str:
    if low >= -0.1 and high <= 1.1:
        return "clip what resampling or rounding has left there: images.clip(0, 1)"
    if low >= 0 and 64 < high <= 255:
        return "divide by 255: images / 255"
    if low >= 0:
        return "divide by the value that is white, which is 255 in 8 bits and 65535 in 16"
    if low >= -1.1 and high <= 1.1:
        return "rescale them; if black is -1: (images + 1) / 2"
    return "rescale them; if they are normalized: images * std + mean"


def _first(bad: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(np.argmax(bad), bad.shape))


def _count_bad(bad: np.ndarray) -> str:
    images = int(bad.reshape(len(bad), -1).any(axis=1).sum())
    return f"{images} of {len(bad)} images"


def darkness(images: np.ndarray, limit: float = 0.01) -> str:
    """Returns a sentence if more than a share of images are nearly black, else nothing.

    16-bit pictures that something else has cut to 8 bits look like this.

    Args:
      images: ``uint8 [n, H, W, 3]``.
      limit: Of the images, the largest share without a note.

    Example:
      >>> darkness(np.full((2, 4, 4, 3), 7, np.uint8))
      '2 of 2 images are nearly black: no value above 15 of 255'
    """
    dark = int((images.reshape(len(images), -1).max(axis=1) < DARK).sum())
    if dark <= limit * len(images):
        return ""
    return f"{dark} of {len(images)} images are nearly black: no value above {DARK - 1} of 255"


# --- Labels -------------------------------------------------------------------------------------


def as_labels(labels: Any, count: int, num_classes: int | None, where: str) -> np.ndarray:
    """Returns labels as ``int32 [count]`` after checking each of them.

    Args:
      labels: Integers ``[count]``, or one column of them.
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
    if np.ma.is_masked(labels):
        raise ValueError(label_hints.without_label(np.ma.getmaskarray(labels), where))
    labels = as_array(labels, f"labels of {where}")
    if labels.ndim == 2 and labels.shape[1] == 1:  # as keras has them: it can mean nothing else
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise ValueError(
            f"labels of {where} must be [n], got shape {labels.shape}{label_hints.columns(labels)}"
        )
    if len(labels) != count:
        raise ValueError(f"{where} has {count} images and {len(labels)} labels")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(label_hints.not_integers(labels, where))
    if (labels < 0).any():
        index = int(np.argmax(labels < 0))
        raise ValueError(
            f"labels of {where} must not be negative: labels[{index}] is {labels[index]}; drop "
            "unlabelled images, or pass labels=None for a set without labels"
        )
    # Before the cast, which would take 2**32 for 0.
    limit = MOST_UNNAMED if num_classes is None else num_classes
    if (labels >= limit).any():
        index = int(np.argmax(labels >= limit))
        what = "what a class number can be" if num_classes is None else "the number of classes"
        raise ValueError(
            f"labels of {where} must be below {what}, {limit}: labels[{index}] is "
            f"{labels[index]}; number the classes from 0, or name them all"
            f"{_NUMBER_IDS if num_classes is None else ''}"
        )
    return labels.astype(np.int32)


_NUMBER_IDS = (
    "; number ids over all splits together: ids, labels = np.unique(labels, return_inverse=True)"
)


def check_no_gaps(labels: np.ndarray, where: str) -> None:
    """Raises ValueError unless each class number up to the largest has an image.

    Args:
      labels: ``int32 [n]`` of a training split.
      where: What an error calls them.

    Example:
      >>> check_no_gaps(np.array([0, 2, 1]), "an example")
    """
    present = np.unique(labels)
    if len(present) == 0 or len(present) == present[-1] + 1:
        return
    missing = np.setdiff1d(np.arange(present[-1]), present)
    more = ", ..." if len(present) > 4 else ""
    seen = f"labels of {where} are {', '.join(map(str, present[:4]))}{more}"
    if present[0] == 1 and len(missing) == 1:
        raise ValueError(f"{seen}: they start at 1, and class 0 has no image; take labels - 1")
    if len(missing) < len(present):
        raise ValueError(
            f"{seen}: class {missing[0]} has no training image, and every class needs some; number "
            "the classes anew, or, if this is no training split, pass its name as split"
        )
    raise ValueError(
        f"{seen}: ids up to {present[-1]} of {len(present)} classes, not class numbers{_NUMBER_IDS}"
    )

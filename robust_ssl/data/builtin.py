"""Data that install with scikit-learn: handwritten digits, and crops of two photographs."""

from __future__ import annotations

import numpy as np

from robust_ssl.data import pictures
from robust_ssl.data.examples import Examples
from robust_ssl.data.order import random_words


def digits(split: str = "train", *, image_size: int = 32) -> Examples:
    """Handwritten digits: 1,437 to train and 360 to test, ten classes.

    scikit-learn's 8x8 scans with 17 gray levels, enlarged with Lanczos' filter.  The split is
    this package's own, since the set has none: in the order of (class, index), every fifth
    example is a test one, so each class has a fifth of its images there.  Writers are not told
    apart; both splits hold images by the same hands.

    Args:
      split: ``"train"`` or ``"test"``.
      image_size: Height and width, pixels.

    Returns:
      Examples, ``uint8 [n, image_size, image_size, 3]`` with labels; the same ones on every call.

    Raises:
      ValueError: If there is no such split.

    Example:
      >>> len(digits("train")), len(digits("test"))
      (1437, 360)

    References:
      Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.
    """
    from sklearn import datasets

    if split not in ("train", "test"):
        raise ValueError(f"digits have no split {split!r}; they have 'train' and 'test'")
    scans = datasets.load_digits()
    # Stable, so that the split is the same with every version of NumPy.
    order = np.argsort(scans.target, kind="stable")
    is_test = np.zeros(len(order), bool)
    is_test[order[::5]] = True
    rows = np.flatnonzero(is_test if split == "test" else ~is_test)
    # Scans have the values 0 to 16.
    gray = np.rint(scans.images[rows] * (255 / 16)).astype(np.uint8)
    images = [pictures.resize(np.repeat(g[..., None], 3, axis=-1), image_size) for g in gray]
    names = tuple(str(name) for name in scans.target_names)
    return Examples(np.stack(images), scans.target[rows], names, "digits", split)


def photo_crops(
    split: str = "train", *, n: int = 2000, image_size: int = 32, seed: int = 0
) -> Examples:
    """Random crops of two photographs, a temple and a flower, without labels.

    What an attacker can use who has no data set at hand: natural colors and edges at scales from
    one pixel a pixel to a whole photograph.  The side of a crop is log-uniform between
    `image_size` and the photograph's shorter side; half of the crops are mirrored.

    Args:
      split: Any name; different names give different crops of the same photographs.
      n: How many crops.
      image_size: Height and width, pixels; at most 427, the photographs' height.
      seed: Which crops.

    Returns:
      Examples, ``uint8 [n, image_size, image_size, 3]``, labels None; they depend on the
      arguments only, and the first crops of a larger `n` are those of a smaller one.

    Raises:
      ValueError: If `n` or `image_size` is out of range.

    Example:
      >>> photo_crops(n=3).images.shape
      (3, 32, 32, 3)
    """
    from PIL import Image
    from sklearn import datasets

    photos = [Image.fromarray(photo) for photo in datasets.load_sample_images().images]
    shorter = min(min(photo.size) for photo in photos)
    if n < 1 or not 1 <= image_size <= shorter:
        raise ValueError(f"photo_crops need n >= 1 and image_size in 1 to {shorter}")
    words = random_words(5 * n, seed, f"photo_crops/{split}").reshape(n, 5)
    uniform = (words >> np.uint64(11)) * 2.0**-53  # the top 53 bits, in [0, 1)
    images = np.empty((n, image_size, image_size, 3), np.uint8)
    for image, (which, scale, left, top, mirror) in zip(images, uniform, strict=True):
        photo = photos[int(which * len(photos))]
        # Log-uniform: as many crops between 1x and 2x as between 2x and 4x.
        side = image_size * (shorter / image_size) ** scale
        left, top = left * (photo.width - side), top * (photo.height - side)
        box = (left, top, left + side, top + side)
        crop = photo.resize((image_size, image_size), Image.Resampling.LANCZOS, box=box)
        image[:] = np.asarray(crop)[:, ::-1] if mirror < 0.5 else np.asarray(crop)
    return Examples(images, None, (), "photo_crops", split)

"""Encoded pictures to pixels, with Pillow."""

from __future__ import annotations

import io
import pathlib

import numpy as np


def decode(
    picture: bytes | pathlib.Path | np.ndarray, image_size: int | None, where: str
) -> np.ndarray:
    """Returns one picture as ``uint8 [H, W, 3]``, at `image_size` if that is given.

    Gray and palette pictures become RGB, alpha is dropped.  A picture of another size is scaled
    with Lanczos' filter so that its shorter side fits, and the center is kept.

    Args:
      picture: An encoded file, its path, or pixels ``uint8 [H, W, 3]``.
      image_size: Height and width, pixels; None leaves the picture as it is stored.
      where: What an error calls it.

    Raises:
      ValueError: If the file is broken, or not 8 bits a channel.
    """
    from PIL import Image

    if isinstance(picture, np.ndarray):
        return resize(picture, image_size)
    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as opened:
            deep = opened.mode.startswith(("I", "F"))
            rgb = None if deep else opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{where} cannot be read as an image: {error}; replace or remove it"
        ) from error
    if rgb is None:  # Pillow would clip 16 bits to 8 without a word
        raise ValueError(f"{where} has more than 8 bits a channel; convert it to 8-bit RGB")
    return resize(np.asarray(rgb), image_size)


def resize(image: np.ndarray, image_size: int | None) -> np.ndarray:
    """Returns ``uint8 [H, W, 3]`` brought to `image_size`: Lanczos, center kept.

    Example:
      >>> resize(np.full((10, 20, 3), 7, np.uint8), 5).shape
      (5, 5, 3)
    """
    from PIL import Image, ImageOps

    if image_size is None or image.shape[:2] == (image_size, image_size):
        return image
    # Not by the longer side: encoders take squares, and bars at the edges are no pixels of the set.
    size = (image_size, image_size)
    fitted = ImageOps.fit(Image.fromarray(image), size, method=Image.Resampling.LANCZOS)
    return np.asarray(fitted)

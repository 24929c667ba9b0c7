"""What images are here, ``[n, height, width, 3]`` with pixels in [0, 1], and who says otherwise."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_images(images: Any, what: str = "images") -> None:
    """Raises ValueError unless images are uint8, or floats in [0, 1], ``[n, H, W, 3]``.

    Of what is traced by JAX only shape and dtype are looked at.

    Args:
      images: An array.
      what: What an error calls them.

    Example:
      >>> check_images(np.zeros((2, 8, 8, 3), np.uint8))
      >>> check_images(np.full((2, 8, 8, 3), 128.0), "photographs")
      Traceback (most recent call last):
      ValueError: photographs must be uint8, or float pixels in [0, 1], got float64 from 128 to 128
    """
    shape, dtype = np.shape(images), np.dtype(getattr(images, "dtype", type(None)))
    if len(shape) != 4:
        raise ValueError(f"{what} must be [n, H, W, 3], got {shape}")
    check_channels(shape, what)
    if dtype == np.uint8:
        return
    must = f"{what} must be uint8, or float pixels in [0, 1], got {dtype}"
    if not jnp.issubdtype(dtype, np.floating):  # bfloat16 is one for JAX alone
        raise ValueError(must)
    if isinstance(images, jax.core.Tracer) or 0 in shape:
        return
    low, high = float(np.min(images)), float(np.max(images))
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise ValueError(f"{must} from {low:g} to {high:g}")


def check_channels(shape: tuple[int, ...], what: str = "images") -> None:
    """Raises ValueError unless the last axis has three colors; says which line makes it so.

    Example:
      >>> check_channels((8, 8, 4))
      Traceback (most recent call last):
      ValueError: images must be [..., H, W, 3], got (8, 8, 4); without alpha: images[..., :3]
    """
    if shape[-1:] == (3,):
        return
    way = ""
    if shape[-3:-2] == (3,):
        way = "; colors come last: np.moveaxis(images, -3, -1)"
    elif shape[-1:] == (1,):
        way = "; of gray ones: images.repeat(3, axis=-1)"
    elif shape[-1:] == (4,):
        way = "; without alpha: images[..., :3]"
    raise ValueError(f"{what} must be [..., H, W, 3], got {shape}{way}")


def float_pixels(images: jax.Array) -> jax.Array:
    """Returns float pixels as float32.

    What moves an image within a budget of a few levels of 255 computes in it: the steps of half
    precision are up to one level wide.

    Raises:
      TypeError: If they are integers, which are not in [0, 1].

    Example:
      >>> float_pixels(jnp.ones(2, jnp.bfloat16)).dtype
      dtype('float32')
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"an attack takes float pixels in [0, 1], got {images.dtype}; divide 8-bit images by "
            "255"
        )
    return jnp.asarray(images, jnp.float32)

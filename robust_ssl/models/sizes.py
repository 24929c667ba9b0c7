"""What the builders of networks share: what they refuse, and the first variables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from robust_ssl.keys import check_key

NUMBER_TYPES = ("float32", "bfloat16")


def number_type(dtype: Any) -> Any:
    """Returns what a network computes in.

    Raises:
      ValueError: If it is neither float32 nor bfloat16.  float16 ends at 65504, which sums inside
        of networks go beyond.

    Example:
      >>> number_type("bfloat16") == jnp.bfloat16
      True
    """
    try:
        kind = jnp.dtype(dtype)
    except TypeError:
        kind = None
    if kind is None or kind.name not in NUMBER_TYPES:
        raise ValueError(f"dtype must be one of {NUMBER_TYPES}, got {dtype!r}")
    return kind


def check_sizes(mean: Sequence[float], std: Sequence[float], **sizes: int) -> None:
    """Raises ValueError unless sizes are whole numbers of at least 1, and deviations above 0.

    Args:
      mean: Of the training pixels, by color.
      std: Their deviation.
      **sizes: By the builder's argument.

    Example:
      >>> check_sizes((0.5,) * 3, (0.2,) * 3, width=64)
      >>> check_sizes((0.5,) * 3, (0.2,) * 3, width=0)
      Traceback (most recent call last):
      ValueError: width must be a whole number of at least 1, got 0
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or size != int(size) or size < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {size!r}")
    for name, values in (("mean", mean), ("std", std)):
        numbers = [float(value) for value in values]
        fit = len(numbers) == 3 and all(map(math.isfinite, numbers))
        if not fit or (name == "std" and min(numbers) <= 0):
            above = " above 0" if name == "std" else ""
            raise ValueError(f"{name} must be three numbers{above}, one a color, got {values!r}")


def first_variables(module: nn.Module, key: jax.Array, image_size: int) -> Any:
    """Returns the variables of a network of square images, drawn by a key.

    Raises:
      ValueError: If the key is none.
    """
    check_key(key)
    # One program for the whole tree; unjitted, every operation would be compiled by itself.
    return jax.jit(module.init)(key, jnp.zeros((1, image_size, image_size, 3)))

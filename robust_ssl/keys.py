"""What a random key is, and who says so of what is none."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_key(key: Any, name: str = "key") -> None:
    """Raises ValueError for what is no random key of JAX, as the number that one is made of.

    Keys of the old kind, ``jax.random.PRNGKey(0)``, are taken, and so are several keys.

    Example:
      >>> check_key(jax.random.key(0))
      >>> check_key(0)
      Traceback (most recent call last):
      ValueError: key= is a random key of JAX, such as jax.random.key(0), got 0
    """
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return
    if dtype == np.uint32 and np.ndim(key) > 0:  # of the old kind
        return
    seed = key if isinstance(key, int) and not isinstance(key, bool) else 0
    number = isinstance(key, int | float | str | np.number) or key is None
    got = repr(key) if number else f"{dtype or type(key).__name__} {np.shape(key)}"
    raise ValueError(
        f"{name}= is a random key of JAX, such as jax.random.key({max(seed, 0)}), got {got}"
    )

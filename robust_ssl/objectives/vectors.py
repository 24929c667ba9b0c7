"""Lengths and directions whose gradient stays finite at zero."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def safe_norm(x: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """Euclidean length with gradient zero, not NaN, where the length is zero.

    Args:
      x: Float, any shape.
      axis: What is summed over; None is all of it.

    Returns:
      Lengths, without the axes that were summed over; NaN where `x` has one.

    Example:
      >>> float(safe_norm(jnp.array([3.0, 4.0])))
      5.0
      >>> jax.grad(safe_norm)(jnp.zeros(2)).tolist()
      [0.0, 0.0]
    """
    squared = jnp.sum(x**2, axis=axis)
    something = squared != 0  # true of NaN, which must not pass for zero
    return jnp.where(something, jnp.sqrt(jnp.where(something, squared, 1.0)), 0.0)


def unit_vectors(x: jax.Array) -> jax.Array:
    """Scales each row of ``[batch, dim]`` to length one; a zero row stays zero, gradient and all.

    A row with a NaN becomes NaN.

    Example:
      >>> unit_vectors(jnp.array([[0.0, 2.0], [0.0, 0.0]])).tolist()
      [[0.0, 1.0], [0.0, 0.0]]
    """
    squared = jnp.sum(x**2, axis=-1, keepdims=True)
    something = squared != 0  # true of NaN, which must not pass for zero
    return jnp.where(something, x * jax.lax.rsqrt(jnp.where(something, squared, 1.0)), 0.0)

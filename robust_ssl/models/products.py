"""What a transformer computes with, fast on a CPU too, forward and backward.

XLA:CPU fuses what made an operand into each of its consumers.  In a transformer that is the sum of
all later blocks' gradients, computed anew, from its parts and with strides, in front of every
product: the deeper the network, the more of it.  Here operands and cotangents stand behind barriers
and are computed once.  They need `xla.set_flags`; without it XLA:CPU drops barriers first.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from robust_ssl.xla import on_cpu


def once(x: jax.Array) -> jax.Array:
    """Returns `x`, computed once on a CPU, as its gradient is; elsewhere it is fused as ever.

    Example:
      >>> once(jnp.ones(2)).tolist()
      [1.0, 1.0]
    """
    return lax.optimization_barrier(x) if on_cpu() else x


def dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`lax.dot_general` in the backend's best form; for `nn.Dense`.

    On CPU the product of a dense layer (default precision) has no forward-mode derivative.  All
    else, and every other backend, is `lax` itself.

    Args:
      lhs: Float ``[..., in]``.
      rhs: Kernel, float ``[in, out]``.
      dimension_numbers: As in `lax`.
      precision: As in `lax`.
      preferred_element_type: As in `lax`.

    Returns:
      Float ``[..., out]``.

    Example:
      >>> dot_general(jnp.ones((2, 3, 4)), jnp.ones((4, 5)), (((2,), (0,)), ((), ()))).shape
      (2, 3, 5)
    """
    dense = dimension_numbers == (((lhs.ndim - 1,), (0,)), ((), ())) and rhs.ndim == 2
    plain = precision is None and preferred_element_type is None
    if dense and plain and on_cpu():
        return _product(lhs.reshape(-1, lhs.shape[-1]), rhs).reshape(*lhs.shape[:-1], -1)
    return lax.dot_general(lhs, rhs, dimension_numbers, precision, preferred_element_type)


@jax.custom_vjp
def _product(lhs, rhs):
    return lax.optimization_barrier(lhs) @ rhs


def _forward(lhs, rhs):
    lhs = lax.optimization_barrier(lhs)
    return lhs @ rhs, (lhs, rhs)


def _backward(residuals, cotangent):
    lhs, rhs = residuals
    cotangent = lax.optimization_barrier(cotangent)
    return cotangent @ rhs.T, lhs.T @ cotangent


_product.defvjp(_forward, _backward)


def attend(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    """`jax.nn.dot_product_attention` in the backend's best form.

    On CPU heads come before tokens, so that all products are of plain matrices.

    Args:
      queries: Float ``[batch, tokens, heads, head_width]``.
      keys: Float ``[batch, others, heads, head_width]``.
      values: As `keys`.

    Returns:
      As `queries`; logits are divided by the root of a head's width, and float32 in the softmax.

    Example:
      >>> x = jnp.ones((2, 5, 3, 4))
      >>> attend(x[:, :1], x, 2 * x).shape
      (2, 1, 3, 4)
    """
    if not on_cpu():
        return jax.nn.dot_product_attention(queries, keys, values)
    queries, keys, values = (once(x.swapaxes(1, 2)) for x in (queries, keys, values))
    queries = queries * queries.shape[-1] ** -0.5
    logits = jnp.matmul(queries, keys.swapaxes(2, 3), preferred_element_type=jnp.float32)
    shares = jax.nn.softmax(logits).astype(values.dtype)
    return once(shares @ values).swapaxes(1, 2)


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU by `erf`, as torch has it; linen's, by `erfc`, takes three times as long.

    Example:
      >>> gelu(jnp.array([0.0, 10.0])).tolist()
      [0.0, 10.0]
    """
    return 0.5 * x * (1 + lax.erf(x * 2**-0.5))

"""A convolution whose gradients stay fast inside loops on a CPU.

XLA:CPU rewrites a convolution to its fast form only in the entry computation of a program.  In the
body of a `lax.scan` or `lax.fori_loop`, where every iterative attack lives, the input gradient that
JAX derives (a convolution with reversed and transposed kernel) falls to naive loops and is four to
five times slower (jax issue 12868).  Written with the kernel flipped and its channels swapped
beforehand, it is in canonical NHWC/HWIO form and needs no rewriting.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers=None,
    feature_group_count: int = 1,
    precision=None,
    preferred_element_type=None,
    **unused,
) -> jax.Array:
    """`lax.conv_general_dilated` with the backend's best gradient; a drop-in for `nn.Conv`.

    On CPU, plain convolutions (no dilation, one group) get the canonical input gradient; it has no
    forward-mode derivative.  Everything else, and every other backend, is `lax` itself.

    Args:
      lhs: Images, float ``[batch, height, width, in]``.
      rhs: Kernel, float ``[height, width, in, out]``.
      window_strides: Stride per spatial axis.
      padding: ``"SAME"``, ``"VALID"`` or (low, high) per spatial axis.
      lhs_dilation: As in `lax`.
      rhs_dilation: As in `lax`.
      dimension_numbers: Ignored: linen always passes NHWC and HWIO.
      feature_group_count: As in `lax`.
      precision: As in `lax`.
      preferred_element_type: As in `lax`.
      **unused: Nothing else may be given.

    Returns:
      Float ``[batch, height', width', out]``.

    Example:
      >>> image, kernel = jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1))
      >>> conv_general_dilated(image, kernel, (1, 1), "SAME")[0, :, :, 0].tolist()[0]
      [4.0, 6.0, 6.0, 4.0]
    """
    if unused:
        raise TypeError(f"unexpected arguments {sorted(unused)}")
    undilated = set(lhs_dilation or (1,)) == {1} and set(rhs_dilation or (1,)) == {1}
    if jax.default_backend() != "cpu" or not undilated or feature_group_count != 1:
        return lax.conv_general_dilated(
            lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, _DIMENSIONS,
            feature_group_count=feature_group_count, precision=precision,
            preferred_element_type=preferred_element_type,
        )  # fmt: skip
    strides = tuple(window_strides)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], strides, padding)
    return _canonical_conv(lhs, rhs, strides, tuple(map(tuple, padding)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _canonical_conv(lhs, rhs, strides, padding):
    return lax.conv_general_dilated(lhs, rhs, strides, padding, dimension_numbers=_DIMENSIONS)


def _forward(lhs, rhs, strides, padding):
    return _canonical_conv(lhs, rhs, strides, padding), (lhs, rhs)


def _backward(strides, padding, residuals, cotangent):
    lhs, rhs = residuals
    # Padding of the transposed convolution: each output pixel must land where it came from.
    pads = []
    for axis, ((low, _), stride) in enumerate(zip(padding, strides, strict=True)):
        size, kernel, out = lhs.shape[1 + axis], rhs.shape[axis], cotangent.shape[1 + axis]
        before = kernel - 1 - low
        pads.append((before, size - before - ((out - 1) * stride + 1) + kernel - 1))
    flipped = jnp.swapaxes(rhs[::-1, ::-1], 2, 3)
    lhs_gradient = lax.conv_general_dilated(
        cotangent, flipped, (1, 1), pads, lhs_dilation=strides, dimension_numbers=_DIMENSIONS
    )
    _, pullback = jax.vjp(
        lambda kernel: lax.conv_general_dilated(
            lhs, kernel, strides, padding, dimension_numbers=_DIMENSIONS
        ),
        rhs,
    )
    return lhs_gradient, pullback(cotangent)[0]


_canonical_conv.defvjp(_forward, _backward)

"""A convolution that stays fast on a CPU, forward and backward, inside loops and out.

XLA:CPU has three slow corners, each measured several times slower than it need be:

1. In the body of a `lax.scan` or `lax.fori_loop`, where every iterative attack lives, the input
   gradient that JAX derives (a convolution with reversed and transposed kernel) falls to naive
   loops, because XLA rewrites convolutions to canonical form only in a program's entry computation
   (jax issue 12868).  Here the kernel is flipped and its channels swapped beforehand.
2. A convolution over an image smaller than its kernel (the last stage of a ResNet on small images)
   is 10 to 80 times slower than the same matrix product, so it is written as that product.
3. The gradient with respect to an image of three channels is likewise a matrix product here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
_FEW_CHANNELS = 4  # at most: their input gradient is faster as a matrix product


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
) -> jax.Array:
    """`lax.conv_general_dilated` in the backend's best form; a drop-in for `nn.Conv`.

    On CPU, plain convolutions (no dilation, one group, default precision) take the forms of this
    file; they have no forward-mode derivative.  Everything else, and every other backend, is `lax`
    itself.

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

    Returns:
      Float ``[batch, height', width', out]``.

    Example:
      >>> image, kernel = jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1))
      >>> conv_general_dilated(image, kernel, (1, 1), "SAME")[0, :, :, 0].tolist()[0]
      [4.0, 6.0, 6.0, 4.0]
    """
    undilated = set(lhs_dilation or (1,)) == {1} and set(rhs_dilation or (1,)) == {1}
    plain = undilated and feature_group_count == 1
    plain = plain and precision is None and preferred_element_type is None
    # Asked when traced: one process runs on one backend.
    if jax.default_backend() != "cpu" or not plain:
        return lax.conv_general_dilated(
            lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, _DIMENSIONS,
            feature_group_count=feature_group_count, precision=precision,
            preferred_element_type=preferred_element_type,
        )  # fmt: skip
    strides = tuple(window_strides)
    if isinstance(padding, str):  # as numbers, which the gradient below computes with
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], strides, padding)
    padding = tuple(map(tuple, padding))
    if _smaller_than_kernel(lhs, rhs, strides, padding):
        return _as_matrix_product(lhs, rhs, strides, padding)
    return _canonical(lhs, rhs, strides, padding)


def _output_size(lhs, rhs, strides, padding) -> tuple[int, int]:
    return tuple(
        (lhs.shape[1 + axis] + sum(padding[axis]) - rhs.shape[axis]) // strides[axis] + 1
        for axis in (0, 1)
    )


def _smaller_than_kernel(lhs, rhs, strides, padding) -> bool:
    """Whether the image, or the cotangent that the input gradient convolves, is so small."""
    sizes = (*lhs.shape[1:3], *_output_size(lhs, rhs, strides, padding))
    return max(rhs.shape[:2]) > min(sizes)


def _as_matrix_product(lhs, rhs, strides, padding):
    """The convolution as patches times kernel; JAX's own derivatives of it hold no convolution."""
    height, width = _output_size(lhs, rhs, strides, padding)
    padded = jnp.pad(lhs, ((0, 0), *padding, (0, 0)))
    patches = []
    for i in range(rhs.shape[0]):
        rows = padded[:, i : i + (height - 1) * strides[0] + 1 : strides[0]]
        for j in range(rhs.shape[1]):
            patches.append(rows[:, :, j : j + (width - 1) * strides[1] + 1 : strides[1]])
    flat = jnp.concatenate(patches, axis=-1).reshape(lhs.shape[0] * height * width, -1)
    product = flat @ rhs.reshape(flat.shape[1], rhs.shape[3])
    return product.reshape(lhs.shape[0], height, width, rhs.shape[3])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _canonical(lhs, rhs, strides, padding):
    return lax.conv_general_dilated(lhs, rhs, strides, padding, dimension_numbers=_DIMENSIONS)


def _forward(lhs, rhs, strides, padding):
    return _canonical(lhs, rhs, strides, padding), (lhs, rhs)


def _backward(strides, padding, residuals, cotangent):
    lhs, rhs = residuals
    if lhs.shape[-1] <= _FEW_CHANNELS:
        # Third case of the module's text.
        _, pull_lhs = jax.vjp(lambda x: _as_matrix_product(x, rhs, strides, padding), lhs)
        (lhs_gradient,) = pull_lhs(cotangent)
    else:
        lhs_gradient = _input_gradient(lhs.shape, rhs, strides, padding, cotangent)
    # The kernel's gradient is JAX's own: on two devices nothing measured was faster.
    _, pull_rhs = jax.vjp(
        lambda kernel: lax.conv_general_dilated(
            lhs, kernel, strides, padding, dimension_numbers=_DIMENSIONS
        ),
        rhs,
    )
    return lhs_gradient, pull_rhs(cotangent)[0]


def _input_gradient(shape, rhs, strides, padding, cotangent):
    """The transposed convolution in canonical form: kernel flipped, channels swapped."""
    pads = []
    for axis, ((low, _), stride) in enumerate(zip(padding, strides, strict=True)):
        # With these pads the result has the image's size, whatever the stride left over.
        kernel = rhs.shape[axis]
        before = kernel - 1 - low
        dilated = (cotangent.shape[1 + axis] - 1) * stride + 1
        pads.append((before, shape[1 + axis] - before - dilated + kernel - 1))
    # First case of the module's text.  Outside loops the result is that of `lax`, bit for bit.
    flipped = jnp.swapaxes(rhs[::-1, ::-1], 2, 3)
    return lax.conv_general_dilated(
        cotangent, flipped, (1, 1), pads, lhs_dilation=strides, dimension_numbers=_DIMENSIONS
    )


_canonical.defvjp(_forward, _backward)

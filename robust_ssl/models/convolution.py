"""A convolution that stays fast on a CPU, forward and backward, inside loops and out.

XLA:CPU has slow corners, each measured 1.3 to 80 times slower than it need be; the forms that are
taken instead are those of `robust_ssl.models.cpu_forms`:

1. In the body of a `lax.scan` or `lax.fori_loop`, where every iterative attack lives, the input
   gradient that JAX derives (a convolution with reversed and transposed kernel) falls to naive
   loops, because XLA rewrites convolutions to canonical form only in a program's entry computation
   (jax issue 12868).  Here the kernel is flipped and its channels swapped beforehand.
2. An image smaller than its kernel, as in the last stage of a ResNet on small images.
3. Three input channels, that is a stem, forward and backward; and few output channels.
4. A kernel of one pixel with a stride.
5. The kernel's gradient, whose operands are copied with a stride while they are computed anew.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from robust_ssl.models import cpu_forms as forms
from robust_ssl.xla import on_cpu

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
    if not (plain and on_cpu()):
        return lax.conv_general_dilated(
            lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, forms.DIMENSIONS,
            feature_group_count=feature_group_count, precision=precision,
            preferred_element_type=preferred_element_type,
        )  # fmt: skip
    strides = tuple(window_strides)
    if isinstance(padding, str):  # as numbers, which the gradient below computes with
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], strides, padding)
    padding = tuple(map(tuple, padding))
    if _smaller_than_kernel(lhs, rhs, strides, padding):
        # JAX's own derivatives of these hold no convolution.
        less = forms.dense_is_less(lhs, rhs, strides, padding)
        return (forms.dense if less else forms.patches)(lhs, rhs, strides, padding)
    return _canonical(lhs, rhs, strides, padding)


def _smaller_than_kernel(lhs, rhs, strides, padding) -> bool:
    """Whether the image, or the cotangent that the input gradient convolves, is so small."""
    size = forms.output_size(lhs.shape, rhs.shape, strides, padding)
    return max(rhs.shape[:2]) > min(*lhs.shape[1:3], *size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _canonical(lhs, rhs, strides, padding):
    if forms.is_pixelwise(rhs, padding):
        return forms.every(lhs, strides) @ rhs[0, 0]
    if lhs.shape[-1] <= _FEW_CHANNELS:
        return forms.packed_rows(lhs, rhs, strides, padding)
    return forms.widened(lhs, rhs, strides, padding)


def _forward(lhs, rhs, strides, padding):
    # What made the images is computed once, and not again in each copy of them.
    lhs = lax.optimization_barrier(lhs)
    return _canonical(lhs, rhs, strides, padding), (lhs, rhs)


def _backward(strides, padding, residuals, cotangent):
    lhs, rhs = residuals
    cotangent = lax.optimization_barrier(cotangent)
    if forms.is_pixelwise(rhs, padding):
        return _pixelwise_gradients(lhs, rhs, strides, cotangent)
    gradient = forms.kernel_gradient(lhs, rhs.shape, strides, padding, cotangent)
    if lhs.shape[-1] > _FEW_CHANNELS:
        return _input_gradient(lhs.shape, rhs, strides, padding, cotangent), gradient
    _, pull = jax.vjp(lambda x: forms.patches(x, rhs, strides, padding), lhs)
    return pull(cotangent)[0], gradient


def _pixelwise_gradients(lhs, rhs, strides, cotangent):
    gradient = forms.spread(cotangent @ rhs[0, 0].T, lhs.shape, strides)
    kernel = lax.dot_general(
        forms.every(lhs, strides).reshape(-1, lhs.shape[-1]),
        cotangent.reshape(-1, cotangent.shape[-1]),
        (((0,), (0,)), ((), ())),
    )
    return gradient, kernel[None, None]


def _input_gradient(shape, rhs, strides, padding, cotangent):
    """The transposed convolution in canonical form: kernel flipped, channels swapped."""
    if forms.has_four_phases(shape, rhs, strides, padding, cotangent):
        return forms.in_four_phases(rhs, cotangent)
    pads = []
    for axis, ((low, _), stride) in enumerate(zip(padding, strides, strict=True)):
        # With these pads the result has the image's size, whatever the stride left over.
        kernel = rhs.shape[axis]
        before = kernel - 1 - low
        dilated = (cotangent.shape[1 + axis] - 1) * stride + 1
        pads.append((before, shape[1 + axis] - before - dilated + kernel - 1))
    # First case of the module's text.
    flipped = jnp.swapaxes(rhs[::-1, ::-1], 2, 3)
    if strides == (1, 1):
        return forms.widened(cotangent, flipped, strides, tuple(pads))
    return forms.plain(cotangent, flipped, (1, 1), pads, lhs_dilation=strides)


_canonical.defvjp(_forward, _backward)

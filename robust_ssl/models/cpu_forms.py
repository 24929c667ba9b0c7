"""The forms of a convolution that XLA:CPU computes fastest, each exact and for some shapes.

All take images ``[batch, height, width, in]``, a kernel ``[height, width, in, out]``, strides and
padding as numbers, and return what `lax.conv_general_dilated` does, to rounding.  Times are of one
thread of a CPU with 512-bit vectors, jaxlib 0.10, 32 images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Pads = tuple[tuple[int, int], tuple[int, int]]
Strides = tuple[int, int]

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
VECTOR = 32  # output channels that fill the registers; fewer leave the fast convolutions of XLA
WIDE = 8  # pixels: in smaller images making pixels side by side costs more than it saves


def plain(images, kernel, strides: Strides, padding: Pads, **options: Any) -> jax.Array:
    """Returns the convolution as `lax` has it."""
    return lax.conv_general_dilated(
        images, kernel, strides, padding, dimension_numbers=DIMENSIONS, **options
    )


def output_size(
    image: Sequence[int], kernel: Sequence[int], strides: Strides, padding: Pads
) -> tuple[int, int]:
    """Returns height and width of what comes out, from the shapes of what goes in."""
    return tuple(
        (image[1 + axis] + sum(padding[axis]) - kernel[axis]) // strides[axis] + 1
        for axis in (0, 1)
    )


def is_pixelwise(kernel, padding: Pads) -> bool:
    """Whether each pixel comes from one pixel."""
    return kernel.shape[:2] == (1, 1) and not any(map(any, padding))


def every(images, strides: Strides) -> jax.Array:
    """Returns the pixels that a kernel of one pixel looks at."""
    return images if strides == (1, 1) else images[:, :: strides[0], :: strides[1]]


def spread(pixels, shape: Sequence[int], strides: Strides) -> jax.Array:
    """Returns images ``shape`` with these pixels where `every` takes them, zeros between."""
    if strides == (1, 1):
        return pixels
    pads = [
        (0, size - (count - 1) * stride - 1, stride - 1)
        for size, count, stride in zip(shape[1:3], pixels.shape[1:3], strides, strict=True)
    ]
    return lax.pad(pixels, jnp.zeros((), pixels.dtype), [(0, 0, 0), *pads, (0, 0, 0)])


def patches(images, kernel, strides: Strides, padding: Pads) -> jax.Array:
    """Returns the convolution as patches times kernel.

    For few input channels backward, and for images smaller than the kernel: there XLA:CPU is 10 to
    80 times slower than this product.
    """
    height, width = output_size(images.shape, kernel.shape, strides, padding)
    padded = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    windows = []
    for i in range(kernel.shape[0]):
        rows = padded[:, i : i + (height - 1) * strides[0] + 1 : strides[0]]
        for j in range(kernel.shape[1]):
            windows.append(rows[:, :, j : j + (width - 1) * strides[1] + 1 : strides[1]])
    flat = jnp.concatenate(windows, axis=-1).reshape(images.shape[0] * height * width, -1)
    product = flat @ kernel.reshape(flat.shape[1], kernel.shape[3])
    return product.reshape(images.shape[0], height, width, kernel.shape[3])


def dense_is_less(images, kernel, strides: Strides, padding: Pads) -> bool:
    """Whether `dense` has fewer products than `patches`, which multiplies the border's zeros."""
    pixels = math.prod(output_size(images.shape, kernel.shape, strides, padding))
    return math.prod(images.shape[1:3]) * pixels < math.prod(kernel.shape[:2]) * pixels


def dense(images, kernel, strides: Strides, padding: Pads) -> jax.Array:
    """Returns the convolution as one matrix from all pixels in to all pixels out.

    For 2x2 images under a 3x3 kernel it has 2.25 times fewer products than `patches`.
    """
    (rows, columns), nothing = images.shape[1:3], jnp.zeros(kernel.shape[2:], kernel.dtype)
    height, width = output_size(images.shape, kernel.shape, strides, padding)

    def tap(i: int, j: int, y: int, x: int):
        """What pixel (i, j) adds to pixel (y, x) of the result."""
        a, b = i + padding[0][0] - y * strides[0], j + padding[1][0] - x * strides[1]
        inside = 0 <= a < kernel.shape[0] and 0 <= b < kernel.shape[1]
        return kernel[a, b] if inside else nothing

    out = [(y, x) for y in range(height) for x in range(width)]
    lines = [
        jnp.concatenate([tap(i, j, *pixel) for pixel in out], axis=-1)
        for i in range(rows)
        for j in range(columns)
    ]
    matrix = jnp.stack(lines).reshape(rows * columns * kernel.shape[2], -1)
    product = images.reshape(images.shape[0], -1) @ matrix
    return product.reshape(images.shape[0], height, width, kernel.shape[3])


def _side_by_side(kernel, stride: int, block: int) -> jax.Array:
    """Returns a kernel that makes `block` neighboring pixels of a row at once, as channels.

    ``[h, w, in, out]`` to ``[h, w + stride (block - 1), in, block out]``: beside zeros a shifted
    copy of the kernel for each of them.
    """
    copies = [
        jnp.pad(kernel, ((0, 0), (stride * i, stride * (block - 1 - i)), (0, 0), (0, 0)))
        for i in range(block)
    ]
    return jnp.concatenate(copies, axis=-1)


def widened(images, kernel, strides: Strides, padding: Pads) -> jax.Array:
    """Returns the convolution with neighboring pixels made as channels, where out is small.

    16 channels fill no register: 4/3 of the products at twice the speed (3.2 to 2.3 ms).  Above 16
    channels nothing is gained.
    """
    height, width = output_size(images.shape, kernel.shape, strides, padding)
    block = VECTOR // kernel.shape[3]
    if block < 2 or width % block or min(height, width) < WIDE:
        return plain(images, kernel, strides, padding)
    wide, (low, _) = _side_by_side(kernel, strides[1], block), padding[1]
    # The last block ends with the last pixel, whatever a stride would have left over.
    high = strides[1] * (width - 1) + kernel.shape[1] - low - images.shape[2]
    pads = (padding[0], (low, high))
    product = plain(images, wide, (strides[0], strides[1] * block), pads)
    return product.reshape(images.shape[0], height, width, kernel.shape[3])


def packed_rows(images, kernel, strides: Strides, padding: Pads) -> jax.Array:
    """Returns the convolution of a stem: a row's pixels with their colors as one channel.

    Three input channels are the slowest of all (2.2 to 0.52 ms; with stride 2 2.7 to 0.31 ms).
    """
    channels, out = kernel.shape[2:]
    height, width = output_size(images.shape, kernel.shape, strides, padding)
    block = max(1, VECTOR // out)
    while width % block:
        block -= 1
    wide = _side_by_side(kernel, strides[1], block)
    wide = wide.reshape(kernel.shape[0], wide.shape[1] * channels, 1, block * out)
    padded = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    rows = padded.reshape(*padded.shape[:2], padded.shape[2] * channels, 1)
    product = plain(rows, wide, (strides[0], strides[1] * block * channels), ((0, 0), (0, 0)))
    # Columns that a stride has left over make pixels beyond the last one.
    return product[:, :, : width // block].reshape(images.shape[0], height, width, out)


def in_four_phases(kernel, cotangent) -> jax.Array:
    """Returns the input gradient of a 3x3 convolution of stride 2, even and odd pixels apart.

    For images of even size under padding 1.  No zeros are put between pixels and multiplied; with
    16 input channels 2.3 to 1.6 ms, from 32 on nothing is gained.
    """
    batch, height, width, _ = cotangent.shape
    turned = jnp.swapaxes(kernel, 2, 3)

    def phase(odd_row: bool, odd_column: bool):
        taps = turned[::-2] if odd_row else turned[1:2]
        taps = taps[:, ::-2] if odd_column else taps[:, 1:2]
        return plain(cotangent, taps, (1, 1), ((0, int(odd_row)), (0, int(odd_column))))

    rows = [jnp.stack([phase(odd, False), phase(odd, True)], axis=3) for odd in (False, True)]
    return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, kernel.shape[2])


def has_four_phases(shape: Sequence[int], kernel, strides: Strides, padding: Pads, cotangent):
    """Whether `in_four_phases` is right for these shapes, and faster."""
    halves = all(shape[1 + axis] == 2 * cotangent.shape[1 + axis] for axis in (0, 1))
    usual = (kernel.shape[:2], strides, padding) == ((3, 3), (2, 2), ((1, 1), (1, 1)))
    return usual and halves and shape[3] <= VECTOR // 2


def kernel_gradient(images, shape: Sequence[int], strides: Strides, padding: Pads, cotangent):
    """Returns the gradient of a kernel ``shape``: a convolution with the batch as channels.

    Its operands are laid out by plain copies behind barriers.  XLA would make one strided copy of
    each and compute in it, a second time, whatever made the operand (a training pass of 64 images
    402 to 297 ms).  XLA:CPU drops barriers before it fuses, unless `xla.set_flags` was called.
    """
    barrier = lax.optimization_barrier
    inner = barrier(jnp.transpose(images, (1, 2, 0, 3)))  # runs of channels stay whole
    inner = barrier(jnp.transpose(inner, (3, 0, 1, 2)))
    outer = barrier(jnp.transpose(cotangent, (1, 2, 0, 3)))
    pads = [
        (low, shape[axis] + (cotangent.shape[1 + axis] - 1) * stride - images.shape[1 + axis] - low)
        for axis, ((low, _), stride) in enumerate(zip(padding, strides, strict=True))
    ]
    gradient = plain(inner, outer, (1, 1), pads, rhs_dilation=strides)
    return jnp.transpose(gradient, (1, 2, 0, 3))

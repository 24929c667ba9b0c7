"""The network that makes a universal perturbation out of fixed noise (AdvEncoder's generator).

Its transposed convolutions are matrix products followed by an overlap-add.  Several generators,
one per seed and budget, are fitted under `jax.vmap` over their kernels; a convolution would then
become a grouped one, which is slow on every backend, while a matrix product becomes a batched
matrix product, which is not.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

_DCGAN = nn.initializers.normal(0.02)  # Radford et al., ICLR 2016, Section 4


def _overlap_add(pieces: jax.Array, axis: int) -> jax.Array:
    """Adds four-pixel pieces that start every two pixels, less one pixel at each end.

    Args:
      pieces: Float; ``axis`` counts the n pieces, ``axis + 1`` is their four pixels.
      axis: Not negative.

    Returns:
      ``2 n`` pixels along `axis`; the axis after it is gone.
    """
    first, second, third, fourth = (
        jax.lax.index_in_dim(pieces, i, axis + 1, keepdims=False) for i in range(4)
    )
    count = pieces.shape[axis]
    nothing = jnp.zeros_like(jax.lax.slice_in_dim(first, 0, 1, axis=axis))
    before = jnp.concatenate([nothing, jax.lax.slice_in_dim(fourth, 0, count - 1, axis=axis)], axis)
    after = jnp.concatenate([jax.lax.slice_in_dim(first, 1, count, axis=axis), nothing], axis)
    pairs = jnp.stack([second + before, third + after], axis + 1)
    return pairs.reshape(*first.shape[:axis], 2 * count, *first.shape[axis + 1 :])


def upsampling_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Transposed 4x4 convolution of stride 2 that doubles height and width.

    What torch calls ``ConvTranspose2d(kernel_size=4, stride=2, padding=1)`` and `lax` calls
    ``conv_transpose(x, kernel[::-1, ::-1], (2, 2), "SAME")``.

    Args:
      x: Float ``[batch, H, W, in]``.
      kernel: Float ``[4, 4, in, out]``.

    Returns:
      Float ``[batch, 2 H, 2 W, out]``.

    Example:
      >>> x, kernel = jnp.ones((1, 2, 2, 1)), jnp.ones((4, 4, 1, 1))
      >>> upsampling_convolution(x, kernel)[0, :, :, 0].tolist()
      [[1.0, 2.0, 2.0, 1.0], [2.0, 4.0, 4.0, 2.0], [2.0, 4.0, 4.0, 2.0], [1.0, 2.0, 2.0, 1.0]]
    """
    batch, height, width, channels = x.shape
    out = kernel.shape[-1]
    matrix = kernel.transpose(2, 0, 1, 3).reshape(channels, 16 * out)
    pieces = (x.reshape(-1, channels) @ matrix).reshape(batch, height, width, 4, 4, out)
    rows = _overlap_add(pieces.transpose(0, 1, 3, 2, 4, 5), 1)  # [batch, 2 H, W, 4, out]
    return _overlap_add(rows, 2)


def mix(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """Mixes several images to one by a 3x3 convolution across them, each color by itself.

    Args:
      images: Float ``[n, H, W, 3]``.
      kernel: Float ``[3, 3, n]``.

    Returns:
      Float ``[H, W, 3]``.
    """
    _, height, width, _ = images.shape
    shares = jnp.einsum("nhwc,abn->abhwc", images, kernel)
    padded = jnp.pad(shares, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    total = 0
    for a, b in np.ndindex(3, 3):
        total += padded[a, b, a : a + height, b : b + width, :]
    return total


def _at_once(function: Callable[[jax.Array], jax.Array], examples: jax.Array) -> jax.Array:
    return function(examples)


class Generator(nn.Module):
    """Fixed noise ``[n, 100]`` to one perturbation ``[H, W, 3]`` in [-1, 1].

    A dense layer makes a small map, about 4x4; each layer after it doubles the size and halves the
    channels, ``1024-512-256-128-3`` at 64 pixels and one layer less at 32, with ReLU between and
    tanh at the end.  The n images are mixed to one, and a second tanh bounds the result smoothly,
    where the released code clips and loses the gradient of every clipped pixel.

    The released generator has batch norm, which at a batch of one is instance norm, and otherwise
    couples the noise vectors and makes training and evaluation differ.  Here it is instance norm
    throughout: the same function for any number of noise vectors, and no statistics to keep.

    Attributes:
      height: Of the perturbation, pixels, at least 8.
      width: Of the perturbation, pixels, at least 8.
      channels: Of the last hidden layer; each layer before it has twice as many.

    References:
      Zhou et al., "Downstream-agnostic Adversarial Examples", ICCV 2023, and its
      released code.
    """

    height: int
    width: int
    channels: int = 128  # AdvEncoder's released code

    @nn.compact
    def __call__(self, noise: jax.Array, share: Callable = _at_once) -> jax.Array:
        """Returns the perturbation, float ``[height, width, 3]`` in [-1, 1].

        Args:
          noise: Float ``[n, 100]``.
          share: ``share(function, noise)`` computes the images of the noise vectors, which do not
            depend on each other; `attacks.FitBatch.share` spreads them over devices.
        """
        images = share(self._images, noise)
        return nn.tanh(mix(images, self.param("mix", _mixing_kernel, images.shape[0])))

    def _images(self, noise: jax.Array) -> jax.Array:
        doublings = _doublings(self.height, self.width)
        rows, columns = (-(-size // 2**doublings) for size in (self.height, self.width))
        channels = self.channels * 2 ** (doublings - 1)
        x = nn.Dense(rows * columns * channels, use_bias=False, kernel_init=_DCGAN)(noise)
        x = x.reshape(-1, rows, columns, channels)
        for index in range(doublings):
            x = nn.relu(nn.InstanceNorm(name=f"norm{index + 1}")(x))
            channels = 3 if index == doublings - 1 else channels // 2
            kernel = self.param(f"kernel{index + 1}", _DCGAN, (4, 4, x.shape[-1], channels))
            x = upsampling_convolution(x, kernel)
        bias = self.param("bias", nn.initializers.zeros, (3,))
        return nn.tanh(x[:, : self.height, : self.width] + bias.reshape(1, 1, 1, 3))


def _doublings(height: int, width: int) -> int:
    """Returns how often a map of at least 4x4 is doubled to reach the size."""
    if min(height, width) < 8:
        raise ValueError(f"the generator makes at least 8x8 pixels, got {height}x{width}")
    return (min(height, width) // 4).bit_length() - 1


def _mixing_kernel(key: jax.Array, count: int) -> jax.Array:
    # Unit variance in, unit variance out, whatever the number of images.
    return jax.random.normal(key, (3, 3, count)) / jnp.sqrt(9.0 * count)

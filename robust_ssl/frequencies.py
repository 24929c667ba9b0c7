"""Spatial frequencies of images and perturbations, in cycles per pixel.

One unit for every image size: 0 is the mean, 0.5 the finest stripes along an axis, 0.71 the finest
chequerboard.  Every filter is linear, keeps real images real, and has a hard edge.

The transform is Hartley's, as two matrix products, and not an FFT: at the sizes of images it costs
next to nothing beside an encoder, and with jax 0.11 two CPU devices that run an FFT at the same
time wait for each other for ever (each holds a thread of the pool that the other needs).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np


def radii(height: int, width: int) -> jax.Array:
    """Returns the frequency of each entry of `transform`, float ``[H, W]``.

    Example:
      >>> radii(1, 8).tolist()
      [[0.0, 0.125, 0.25, 0.375, 0.5, 0.375, 0.25, 0.125]]
    """
    # In float64 first: what is off by a last bit misses the band that begins at its frequency.
    vertical, horizontal = (
        ((np.arange(size) + size // 2) % size - size // 2) / size for size in (height, width)
    )
    return jnp.asarray(np.hypot(vertical[:, None], horizontal[None, :]), jnp.float32)


def transform(images: jax.Array) -> jax.Array:
    r"""Writes images as sums of waves; applied twice it gives the images back.

    .. math:: H(u, v) = \frac{1}{\sqrt{HW}} \sum_{y, x} I(y, x)
                        \,\mathrm{cas}(2 \pi u y / H) \,\mathrm{cas}(2 \pi v x / W),
              \qquad \mathrm{cas} = \cos + \sin

    Entry (u, v) mixes the four waves of frequency (±u, ±v), which have one radius, so bands are cut
    and energies summed by `radii` as in a Fourier transform; but it is real, and its own inverse.

    Args:
      images: Float ``[..., H, W, channels]``.

    Returns:
      The same shape, of the same Euclidean length; linear in `images`.

    Example:
      >>> image = jax.random.normal(jax.random.key(0), (8, 6, 3))
      >>> bool(jnp.allclose(transform(transform(image)), image, atol=1e-5))
      True

    References:
      Hartley, "A More Symmetrical Fourier Analysis Applied to Transmission Problems", 1942;
      Bracewell, "The Discrete Hartley Transform", 1983.
    """
    *_, height, width, _ = images.shape
    return jnp.einsum(
        "...yxc,uy,vx->...uvc",
        images,
        _cas(height),
        _cas(width),
        precision=jax.lax.Precision.HIGHEST,  # a hard edge leaves nothing beyond it
    )


@functools.lru_cache(maxsize=16)
def _cas(size: int) -> np.ndarray:
    """Returns the orthonormal waves ``cos + sin``, float32 ``[size, size]``, symmetric."""
    # Whole turns are taken off as integers, which is exact.
    turns = np.outer(np.arange(size), np.arange(size)) % size / size
    waves = np.cos(2 * np.pi * turns) + np.sin(2 * np.pi * turns)
    return (waves / np.sqrt(size)).astype(np.float32)


def band_pass(
    images: jax.Array,
    low: jax.Array | float = 0.0,
    high: jax.Array | float = jnp.inf,
) -> jax.Array:
    """Keeps the spatial frequencies from `low` (inclusive) to `high` (exclusive).

    Args:
      images: Float ``[..., H, W, channels]``.
      low: Cycles per pixel; anything above 0 removes the mean.
      high: Cycles per pixel.

    Returns:
      What is left, same shape; linear in `images`.

    Example:
      >>> image = jnp.zeros((1, 8, 8, 3)).at[:, ::2].set(1.0)  # stripes: a mean and 0.5
      >>> [round(float(band_pass(image, *band).max()), 4) for band in ((0.1, 0.4), (0.0, 0.1))]
      [0.0, 0.5]
    """
    *_, height, width, _ = images.shape
    frequency = radii(height, width)
    keep = ((frequency >= low) & (frequency < high))[..., None]
    spectrum = transform(images)
    return transform(jnp.where(jnp.broadcast_to(keep, spectrum.shape), spectrum, 0.0))


def high_pass(
    images: jax.Array,
    *,
    cutoff: jax.Array | float = 8 / 64,  # AdvEncoder: radius 8 at 64 pixels
) -> jax.Array:
    """Removes the spatial frequencies below a radius, the mean included.

    Args:
      images: Float ``[..., H, W, channels]``.
      cutoff: Radius in cycles per pixel, from 0 (removes nothing) to above 0.71 (everything).

    Returns:
      The rest, same shape.

    Example:
      >>> bool(jnp.allclose(high_pass(jnp.ones((1, 8, 8, 3))), 0.0, atol=1e-6))
      True

    References:
      Zhou et al., "Downstream-agnostic Adversarial Examples", ICCV 2023, and its released code
      (a mask with a hard edge).
    """
    return band_pass(images, low=cutoff)


def low_pass(images: jax.Array, *, cutoff: jax.Array | float = 8 / 64) -> jax.Array:
    """Keeps the spatial frequencies below a radius, the mean included; see `high_pass`."""
    return band_pass(images, high=cutoff)

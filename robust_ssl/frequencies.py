"""Spatial frequencies of images and perturbations, in cycles per pixel.

One unit for every image size: 0 is the mean, 0.5 the finest stripes along an axis, 0.71 the finest
chequerboard.  Every filter is linear, keeps real images real, and has a hard edge.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def radii(height: int, width: int) -> jax.Array:
    """Returns the frequency of each entry of ``jnp.fft.rfft2``, float ``[H, W // 2 + 1]``.

    Example:
      >>> radii(1, 8).tolist()
      [[0.0, 0.125, 0.25, 0.375, 0.5]]
    """
    vertical = jnp.fft.fftfreq(height).reshape(height, 1)
    horizontal = jnp.fft.rfftfreq(width).reshape(1, width // 2 + 1)
    return jnp.sqrt(vertical**2 + horizontal**2)


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
      >>> float(band_pass(image, 0.1, 0.4).max()), float(band_pass(image, high=0.1).max())
      (0.0, 0.5)
    """
    *_, height, width, _ = images.shape
    frequency = radii(height, width)
    keep = ((frequency >= low) & (frequency < high))[..., None]
    spectrum = jnp.fft.rfft2(images, axes=(-3, -2))
    keep = jnp.broadcast_to(keep, spectrum.shape)
    return jnp.fft.irfft2(jnp.where(keep, spectrum, 0.0), s=(height, width), axes=(-3, -2))


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

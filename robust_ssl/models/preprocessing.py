"""Input transformations at inference: what an `Encoder` does to pixels before it normalizes them.

Each is a frozen value, hashable and equal by its numbers, so it is a static field of an `Encoder`:
``encoder.replace(preprocess=JPEG(quality=50))``.  Being inside the encoder, no attack misses it.

Rounding has a gradient of zero almost everywhere, which stops an attack without making the model
robust.  ``straight_through=True`` therefore passes the gradient of the same transformation without
its rounding (BPDA), so that every attack of the package is adaptive; ``False`` is the true
derivative, zero.

References:
  Xu et al., "Feature Squeezing", NDSS 2018; Guo et al., "Countering Adversarial Images using Input
  Transformations", ICLR 2018; Athalye et al., "Obfuscated Gradients Give a False Sense of
  Security", ICML 2018, Sec. 4.1 (BPDA) and 5.2 (both broken by it).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_BLOCK = 8  # pixels: the side of a JPEG block


@dataclasses.dataclass(frozen=True)
class Quantize:
    """Rounds every channel to a few evenly spaced values, ``round(x (levels - 1)) / (levels - 1)``.

    Attributes:
      levels: Values per channel, 2 to 256; 8 is a depth of 3 bits.
      straight_through: Whether the gradient passes the rounding as if it were not there.

    Raises:
      ValueError: If there are fewer than 2 or more than 256 levels.

    Example:
      >>> Quantize(levels=3)(jnp.array([0.1, 0.4, 0.9]).reshape(1, 1, 3)).tolist()
      [[[0.0, 0.5, 1.0]]]

    References:
      Xu et al., "Feature Squeezing", NDSS 2018, Sec. III-A (color depth).
    """

    levels: int = 8
    straight_through: bool = True

    def __post_init__(self):
        """Refuses what makes no sense."""
        _check_integer("levels", self.levels, 2, 256)
        _check_flag("straight_through", self.straight_through)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns pixels in [0, 1], float ``[..., H, W, 3]``."""
        steps = self.levels - 1
        rounded = jnp.round(jnp.clip(images, 0.0, 1.0) * steps) / steps
        return _with_gradient_of(images, rounded) if self.straight_through else rounded


@dataclasses.dataclass(frozen=True)
class Smooth:
    """Blurs with a Gaussian; outside the image its edge goes on.  Linear: the gradient is true.

    Attributes:
      sigma: Standard deviation of the Gaussian, pixels, above 0 and at most 10; it is cut at
        three of them.

    Raises:
      ValueError: If sigma is not in this range.

    Example:
      >>> stripes = jnp.zeros((8, 8, 3)).at[:, ::2].set(1.0)
      >>> blurred = Smooth(sigma=2.0)(stripes)
      >>> bool(jnp.all(jnp.abs(blurred[:, 2:-2] - 0.5) < 0.2))
      True

    References:
      Xu et al., "Feature Squeezing", NDSS 2018, Sec. III-B (local smoothing; theirs is a median).
    """

    sigma: float = 0.75

    def __post_init__(self):
        """Refuses what makes no sense."""
        number = isinstance(self.sigma, int | float) and not isinstance(self.sigma, bool)
        if not number or not 0 < self.sigma <= 10:
            raise ValueError(f"sigma must be above 0 and at most 10 pixels, got {self.sigma!r}")

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns pixels in [0, 1], float ``[..., H, W, 3]``."""
        return _blur(_blur(images, self.sigma, axis=-3), self.sigma, axis=-2)


@dataclasses.dataclass(frozen=True)
class JPEG:
    """What JPEG compression does to an image, without the file.

    YCbCr, the cosine transform of blocks of 8 x 8, rounding to multiples of the standard
    quantization tables scaled by the quality, and back; what lies between has 8 bits, as in
    libjpeg.  With ``straight_through`` the gradient is the one without rounding and clipping: the
    identity, or with `subsample` the averaging of the colors.

    Attributes:
      quality: 1 (coarsest) to 100, on the scale of libjpeg.
      subsample: Halves the resolution of the colors (4:2:0); else 4:4:4.
      straight_through: Whether the gradient passes the rounding as if it were not there.

    Raises:
      ValueError: If the quality is not an integer from 1 to 100.

    Example:
      >>> gray = jnp.full((8, 8, 3), 0.5)
      >>> bool(jnp.abs(JPEG(quality=50)(gray) - gray).max() < 0.02)
      True

    References:
      ITU-T T.81, Annex K.1 (tables) and A.3.3 (transform); JFIF 1.02 (colors); Dziugaite et al.,
      "A study of the effect of JPG compression on adversarial images", 2016.
    """

    quality: int = 50
    subsample: bool = False
    straight_through: bool = True

    def __post_init__(self):
        """Refuses what makes no sense."""
        _check_integer("quality", self.quality, 1, 100)
        _check_flag("subsample", self.subsample)
        _check_flag("straight_through", self.straight_through)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns pixels in [0, 1], float ``[..., H, W, 3]``."""
        *_, height, width, _ = images.shape
        padded = _pad_to_multiple(255.0 * images, 2 * _BLOCK if self.subsample else _BLOCK)
        luma, chroma = self._encode(jnp.round(padded), jnp.round)
        luma = _quantize_blocks(luma, _table(_LUMINANCE, self.quality))
        chroma = _quantize_blocks(chroma, _table(_CHROMINANCE, self.quality))
        coded = _to_8_bits(self._decode(luma, chroma))
        if self.straight_through:
            # Without rounding the transform and its inverse cancel; averaged colors remain so.
            smooth = padded
            if self.subsample:
                smooth = self._decode(*self._encode(padded, lambda planes: planes))
            coded = _with_gradient_of(smooth, coded)
        return coded[..., :height, :width, :] / 255.0

    def _encode(self, pixels, rounded: Callable[[jax.Array], jax.Array]):
        luma, chroma = jnp.split(rounded(_to_ycbcr(pixels)), [1], axis=-1)
        return luma, rounded(_halve(chroma)) if self.subsample else chroma

    def _decode(self, luma, chroma):
        if self.subsample:
            chroma = _double(_double(chroma, axis=-3), axis=-2)
        return _to_rgb(jnp.concatenate([luma, chroma], axis=-1))


def _with_gradient_of(smooth: jax.Array, value: jax.Array) -> jax.Array:
    """Returns `value`, to the bit, with the gradient of `smooth`."""
    return lax.stop_gradient(value) + (smooth - lax.stop_gradient(smooth))


def _check_integer(name: str, value, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, got {value!r}")


def _check_flag(name: str, value) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def _blur(images, sigma: float, axis: int):
    """One axis of a separable Gaussian, as a sum of shifted images: fast in any loop."""
    radius = math.ceil(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    # The edge goes on: zeros outside would darken the border.
    padding = [(0, 0)] * images.ndim
    padding[axis] = (radius, radius)
    padded = jnp.pad(images, padding, mode="edge")
    size = images.shape[axis]
    return sum(
        float(weight) * lax.slice_in_dim(padded, shift, shift + size, axis=axis % images.ndim)
        for shift, weight in enumerate(kernel)
    )


# ITU-T T.81, Tables K.1 and K.2
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56), (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99), (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99), (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)  # fmt: skip


def _table(table, quality: int) -> np.ndarray:
    """The quantization steps at a quality, as libjpeg scales them; float32 ``[8, 8]``."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    scaled = (np.asarray(table) * scale + 50) // 100
    return np.clip(scaled, 1, 255).astype(np.float32)


def _cosines() -> np.ndarray:
    """The orthonormal cosine transform of 8 samples, one frequency a row; float32 ``[8, 8]``."""
    frequency, place = np.mgrid[:_BLOCK, :_BLOCK]
    matrix = np.cos(np.pi * (2 * place + 1) * frequency / (2 * _BLOCK)) * np.sqrt(2 / _BLOCK)
    # Orthonormal, so that the way back is the transpose.
    matrix[0] /= np.sqrt(2)
    return matrix.astype(np.float32)


def _quantize_blocks(planes, steps: np.ndarray):
    """Rounds the blocks' coefficients to multiples of `steps`; 8 bits ``[..., H, W, planes]``."""
    *batch, height, width, count = planes.shape
    blocks = planes.reshape(*batch, height // _BLOCK, _BLOCK, width // _BLOCK, _BLOCK, count)
    cosines, steps = _cosines(), steps.reshape(_BLOCK, 1, _BLOCK, 1)
    steps = np.broadcast_to(steps, blocks.shape[len(batch) + 1 :])
    # Highest precision: accelerators multiply with fewer bits, and roundings would differ.
    transform = "ui,vj,...aibjc->...aubvc"
    # 128: the level shift of T.81, A.3.1.
    blocks = jnp.einsum(transform, cosines, cosines, blocks - 128.0, precision="highest")
    # Ranks are spelled out, here and below: the tests make rank promotion an error.
    steps = jnp.asarray(steps).reshape((1,) * (blocks.ndim - steps.ndim) + steps.shape)
    blocks = jnp.round(blocks / steps) * steps
    back = jnp.einsum(transform, cosines.T, cosines.T, blocks, precision="highest") + 128.0
    return _to_8_bits(back.reshape(planes.shape))


def _to_8_bits(values):
    return jnp.clip(jnp.round(values), 0.0, 255.0)


_FROM_RGB = np.array(  # JFIF 1.02, p. 3: rows are Y, Cb, Cr
    [
        [0.299, 0.587, 0.114],
        [-0.299 / 1.772, -0.587 / 1.772, 0.5],
        [0.5, -0.587 / 1.402, -0.114 / 1.402],
    ]
)
_CENTRE = np.array([0.0, 128.0, 128.0], np.float32)


def _to_ycbcr(pixels):
    matrix = _FROM_RGB.T.astype(np.float32)
    return _add_to_channels(jnp.matmul(pixels, matrix, precision="highest"), _CENTRE)


def _to_rgb(ycbcr):
    matrix = np.linalg.inv(_FROM_RGB).T.astype(np.float32)
    return jnp.matmul(_add_to_channels(ycbcr, -_CENTRE), matrix, precision="highest")


def _add_to_channels(images, values: np.ndarray):
    return images + jnp.asarray(values).reshape((1,) * (images.ndim - 1) + (3,))


def _halve(planes):
    """Means of 2 x 2 pixels."""
    *batch, height, width, count = planes.shape
    return planes.reshape(*batch, height // 2, 2, width // 2, 2, count).mean((-4, -2))


def _double(planes, axis: int):
    """Two pixels from each along an axis, 3/4 of it and 1/4 of the neighbour, as in libjpeg."""
    axis %= planes.ndim
    padding = [(0, 0)] * planes.ndim
    padding[axis] = (1, 1)
    padded, size = jnp.pad(planes, padding, mode="edge"), planes.shape[axis]
    near = 0.75 * planes
    before = near + 0.25 * lax.slice_in_dim(padded, 0, size, axis=axis)
    after = near + 0.25 * lax.slice_in_dim(padded, 2, size + 2, axis=axis)
    shape = (*planes.shape[:axis], 2 * size, *planes.shape[axis + 1 :])
    return jnp.stack([before, after], axis=axis + 1).reshape(shape)


def _pad_to_multiple(images, multiple: int):
    *batch, height, width, _ = images.shape
    padding = [(0, 0)] * len(batch) + [(0, -height % multiple), (0, -width % multiple), (0, 0)]
    return jnp.pad(images, padding, mode="edge")

"""An additive threat limited to a band of spatial frequencies."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import struct
from robust_ssl.frequencies import band_pass, radii
from robust_ssl.threats.balls import check, over_largest


@struct.dataclass
class Band:
    """An additive threat, limited to a band of spatial frequencies.

    A change is filtered and then scaled down until it fits the inner budget: band and budget hold
    together, exactly.  The final cut to [0, 1] may then leave the band a little, where the image
    is nearly black or white; for the same reason projecting twice may differ from projecting once
    there.  Frequencies are in cycles per pixel at the image's own size, so a perturbation that is
    resized keeps to the band of the new size.

    Attributes:
      threat: `Linf` or `L2`, or any threat with `epsilon` and ``norm(change)``.
      low: Lowest frequency, cycles per pixel; 0 is a low-pass.  A leaf.
      high: The frequency above; infinity is a high-pass.  A leaf.

    Example:
      >>> from robust_ssl.threats import Linf
      >>> smooth = Band(Linf(0.25), low=0.0, high=0.2)
      >>> stripes = jnp.zeros((8, 8, 3)).at[::2].set(1.0)  # a mean of 0.5, and 0.5 cycles per pixel
      >>> delta = smooth.project_delta(stripes)
      >>> round(float(delta.min()), 4), round(float(delta.max()), 4)
      (0.25, 0.25)

    References:
      Yin et al., "A Fourier Perspective on Model Robustness in Computer Vision", NeurIPS 2019;
      Sharma et al., "On the Effectiveness of Low Frequency Perturbations", IJCAI 2019.
    """

    threat: Any
    low: jax.Array | float = 0.0
    high: jax.Array | float = float("inf")

    @property
    def epsilon(self) -> jax.Array | float:
        """The inner budget, [0, 1] pixel units."""
        return self.threat.epsilon

    def check(self, image_shape: tuple[int, ...] | None = None) -> None:
        """Raises ValueError unless the inner threat is additive and the band holds anything."""
        if not (hasattr(self.threat, "norm") and hasattr(self.threat, "epsilon")):
            raise ValueError(
                "Band limits an additive threat, one with `epsilon` and `norm(change)` such as "
                f"Linf(8 / 255), got {_called(self.threat)}"
            )
        check(self.threat, image_shape)
        bands = np.broadcast_arrays(np.asarray(self.low), np.asarray(self.high))
        for low, high in zip(*(np.ravel(edge) for edge in bands), strict=True):
            if not 0 <= low < high:
                raise ValueError(
                    "a band needs 0 <= low < high in cycles per pixel (0.5 is the finest stripes), "
                    f"got low={low:g} and high={high:g}"
                )
            if image_shape is None:
                continue
            frequencies = np.asarray(radii(*image_shape[:2]))
            # In float32, as the filter compares: 7/20 there is a little below 7/20 in float64.
            first, last = np.float32(low), np.float32(high)
            if not np.any((frequencies >= first) & (frequencies < last)):
                raise ValueError(
                    f"an image of {image_shape[0]}x{image_shape[1]} has no frequency from {low:g} "
                    f"to {high:g} cycles per pixel; they are {1 / max(image_shape[:2]):.3g} apart "
                    "and end at 0.71"
                )

    def norm(self, change: jax.Array) -> jax.Array:
        """Returns what `epsilon` bounds, a scalar."""
        return self.threat.norm(change)

    def sample(self, key: jax.Array, image: jax.Array) -> jax.Array:
        """Returns an image with a random change in the band, as large as the inner threat's."""
        return jnp.clip(image + self.sample_delta(key, image.shape), 0.0, 1.0)

    def project(self, candidate: jax.Array, image: jax.Array) -> jax.Array:
        """Returns the image with the candidate's change filtered, scaled down and cut to [0, 1]."""
        return jnp.clip(image + self.project_delta(candidate - image), 0.0, 1.0)

    def steepest(self, gradient: jax.Array) -> jax.Array:
        """Returns the inner threat's steepest step for the gradient in the band, size one."""
        return self._of_size(self.threat.steepest(self._left_of(over_largest(gradient))), 1.0)

    def sample_delta(self, key: jax.Array, image_shape: tuple[int, ...]) -> jax.Array:
        """Returns a random change in the band, ``[H, W, 3]``, as large as the inner threat's."""
        gray = jnp.full(image_shape, 0.5)
        change = self.threat.sample(key, gray) - gray
        return self._of_size(change, self.norm(change))

    def project_delta(self, delta: jax.Array) -> jax.Array:
        """Returns what is in the band, scaled down if it exceeds the budget."""
        filtered = self.filter_delta(delta)
        size = self.norm(filtered)
        too_large = size > self.epsilon
        return filtered * jnp.where(too_large, self.epsilon / jnp.where(too_large, size, 1.0), 1.0)

    def delta_of(self, pattern: jax.Array) -> jax.Array:
        """Returns what of the pattern is in the band, as large as the budget allows."""
        return self._of_size(pattern, self.epsilon)

    def filter_delta(self, delta: jax.Array) -> jax.Array:
        """Returns what is in the band: linear and its own transpose, so gradients stay in it."""
        return band_pass(delta, self.low, self.high)

    def _left_of(self, change: jax.Array) -> jax.Array:
        """What is in the band; of a change outside it only rounding is left, which is nothing."""
        filtered = self.filter_delta(change)
        return jnp.where(self.norm(filtered) > 1e-5 * self.norm(change), filtered, 0.0)

    def _of_size(self, change: jax.Array, size: jax.Array | float) -> jax.Array:
        filtered = self._left_of(change)
        now = self.norm(filtered)
        something = now > 0
        return filtered * jnp.where(something, size / jnp.where(something, now, 1.0), 0.0)


def _called(inner: Any) -> str:
    """Returns what an error calls the inner threat, and what was meant by a budget in its place."""
    if not (hasattr(inner, "dtype") or isinstance(inner, int | float)):
        return type(inner).__name__
    return (
        "a number; where a threat is made of a budget, write the inner one: "
        "lambda epsilon: threats.Band(threats.Linf(epsilon), high=0.125)"
    )

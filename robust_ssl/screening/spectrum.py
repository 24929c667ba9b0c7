"""The energies of an image by spatial frequency: are they those of clean images?"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import frequencies, struct
from robust_ssl.screening.detector import Known
from robust_ssl.screening.template import ROUNDING
from robust_ssl.types import Model

# Gray, and two colors that are orthogonal to it and to each other.
_OPPONENT = np.array([[1, 1, 1], [1, -1, 0], [1, 1, -2]]) / np.sqrt([[3.0], [2.0], [6.0]])


@struct.dataclass
class Spectrum:
    r"""Compares the logarithm of the energy in each band with that of clean images.

    .. math:: \frac{1}{m} (e - \mu)^\top \Sigma^{-1} (e - \mu)

    over m energies: of gray and of color in each band.  About 1 for a clean image.  Both too much
    and too little energy count.  Make it with `fit_spectrum`.

    Attributes:
      bands: 1 where a wave is in a band, else 0, float ``[bands, H, W]``; not the mean.
      mean: Of the logarithms, float ``[2 bands]``.
      whitening: An inverse root of their covariance, float ``[2 bands, 2 bands]``.
    """

    bands: jax.Array
    mean: jax.Array
    whitening: jax.Array

    def score(self, key: jax.Array, model: Model, image: jax.Array) -> jax.Array:
        """Returns the mean square of the whitened logarithms of the energies."""
        del key, model
        return jnp.mean((self.whitening @ (log_energies(image, self.bands) - self.mean)) ** 2)


def fit_spectrum(
    key: jax.Array, model: Model, images: jax.Array, known: Known, *, num_bands: int = 8
) -> Spectrum:
    """Fits a `Spectrum` to clean images.

    Args:
      key: Not read, as are the next and `known`.
      model: ...
      images: Clean pixels, float ``[n, H, W, 3]``.
      known: ...
      num_bands: Of equal width from 0 to 0.71 cycles per pixel; those without a wave are left out.

    Example:
      >>> images = jax.random.uniform(jax.random.key(0), (64, 8, 8, 3))
      >>> detector = fit_spectrum(None, None, images, None, num_bands=4)
      >>> flat = detector.score(None, None, jnp.full((8, 8, 3), 0.5))
      >>> bool(flat > 10 * detector.score(None, None, images[0]))
      True

    Raises:
      ValueError: If there are fewer than two images or no bands.
    """
    del key, model, known
    if len(images) < 2 or num_bands < 1:
        raise ValueError(
            f"a spectrum needs at least two images and one band, got {len(images)} and {num_bands}"
        )
    radius = np.asarray(frequencies.radii(*images.shape[1:3]))
    edges = np.linspace(0, np.sqrt(0.5), num_bands + 1)
    # The mean is in no band: how bright an image is says nothing of an attack.
    place = np.where(radius > 0, np.digitize(radius, edges[1:-1], right=True), -1)
    bands = np.stack([place == number for number in range(num_bands) if (place == number).any()])
    bands = jnp.asarray(bands, jnp.float32)
    energies = np.asarray(jax.vmap(lambda image: log_energies(image, bands))(images), np.float64)
    mean, centered = energies.mean(axis=0), energies - energies.mean(axis=0)
    covariance = centered.T @ centered / len(images)
    values, vectors = np.linalg.eigh(covariance)
    # 1 % of the largest: few images leave directions in which they seem not to differ at all.
    roots = 1 / np.sqrt(np.maximum(values, max(1e-2 * values.max(), 1e-6)))
    whitening = vectors * roots @ vectors.T
    return Spectrum(bands, jnp.asarray(mean, jnp.float32), jnp.asarray(whitening, jnp.float32))


def log_energies(image: jax.Array, bands: jax.Array) -> jax.Array:
    """Returns the logarithm of the mean energy of gray, then of color, in each band.

    Args:
      image: Pixels, float ``[H, W, 3]``.
      bands: Float ``[bands, H, W]``.

    Returns:
      Float ``[2 bands]``; the noise of rounding keeps it finite.
    """
    opponent = jnp.einsum("yxc,dc->yxd", image, jnp.asarray(_OPPONENT, jnp.float32))
    squares = frequencies.transform(opponent) ** 2
    kinds = jnp.stack([squares[..., 0], squares[..., 1] + squares[..., 2]])
    sums = jnp.einsum("kyx,byx->kb", kinds, bands)
    counts = jnp.sum(bands, axis=(1, 2)).reshape(1, -1)
    return jnp.log(sums / counts + ROUNDING).reshape(-1)

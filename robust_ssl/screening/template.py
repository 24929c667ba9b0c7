"""The matched filter: does the image hold a perturbation that is known?"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import frequencies, struct
from robust_ssl.screening.detector import Known
from robust_ssl.types import Model

# Rounding to 8 bits leaves this much noise in every coefficient of an orthonormal transform, so no
# set of images, however smooth, has less.
ROUNDING = 1 / 12 / 255**2


@struct.dataclass
class Template:
    r"""Looks for known perturbations in the image, each weighed by how unusual its waves are.

    .. math:: \max_k \frac{d_k^\top \Sigma^{-1} (x - \mu)}{\sqrt{d_k^\top \Sigma^{-1} d_k}}

    with the mean and covariance of clean images.  In clean images each term has mean 0 and
    deviation 1; an image that holds :math:`d_k` is above by that filter's root.  Make it with
    `fit_template`.

    Attributes:
      filters: Float ``[attacks, H, W, 3]``.
      offsets: What each filter says of the mean clean image, float ``[attacks]``.
      active: 1 for filters that are used, else 0, float ``[attacks]``.
      names: The attack of each filter.

    References:
      Turin, "An Introduction to Matched Filters", 1960.
    """

    filters: jax.Array
    offsets: jax.Array
    active: jax.Array
    names: tuple[str, ...] = struct.field(pytree_node=False)

    def score(self, key: jax.Array, model: Model, image: jax.Array) -> jax.Array:
        """Returns the strongest response in deviations; 0 where no attack is known."""
        del key, model
        responses = jnp.einsum("kyxc,yxc->k", self.filters, image) - self.offsets
        known = jnp.max(jnp.where(self.active > 0, responses, -jnp.inf), initial=-jnp.inf)
        return jnp.where(jnp.isneginf(known), 0.0, known)  # NaN stays: it is suspicious

    def without(self, name: str) -> Template:
        """Returns the detector that does not know an attack."""
        others = jnp.asarray([float(own != name) for own in self.names])
        return self.replace(active=self.active * others)


def fit_template(
    key: jax.Array,
    model: Model,
    images: jax.Array,
    known: Known,
    *,
    ring_images: int = 16,
) -> Template:
    """Fits a `Template` to clean images and known attacks.

    Args:
      key: Not read.
      model: Not read.
      images: Clean pixels, float ``[n, H, W, 3]``.
      known: Its changes are the templates.
      ring_images: As how many images the mean over all waves of one frequency counts, against
        those of the wave itself; it steadies the covariance of few images.

    Example:
      >>> images = jax.random.uniform(jax.random.key(0), (64, 8, 8, 3))
      >>> stripes = jnp.zeros((1, 8, 8, 3)).at[:, ::2].set(0.5)
      >>> detector = fit_template(None, None, images, Known(stripes, ("stripes",)))
      >>> bool(detector.score(None, None, 0.5 * images[0] + stripes[0]) > 3)
      True
    """
    del key, model
    mean, whiten = fit_whitening(np.asarray(images), ring_images)
    changes = np.asarray(known.changes)
    filters = np.zeros(changes.shape)
    for place, change in enumerate(_waves(changes)):
        white = np.einsum("yxcd,yxd->yxc", whiten, change)
        length = np.linalg.norm(white)
        if length > 0:  # an attack that changes nothing matches nothing
            filters[place] = np.einsum("yxcd,yxc->yxd", whiten, white) / length
    filters = _waves(filters)  # the transform is its own transpose
    offsets = np.einsum("kyxc,yxc->k", filters, _waves(mean))
    arrays = (jnp.asarray(array, jnp.float32) for array in (filters, offsets))
    return Template(*arrays, jnp.ones(len(changes)), known.names)


def fit_whitening(images: np.ndarray, ring_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean wave and what makes the waves of clean images white.

    Different waves of images are nearly uncorrelated, the three colors of one wave are not; so the
    covariance has a block of 3 x 3 for each wave.

    Args:
      images: Pixels, float ``[n, H, W, 3]``.
      ring_images: As for `fit_template`.

    Returns:
      The mean of `frequencies.transform`, float64 ``[H, W, 3]``, and a matrix for each wave,
      float64 ``[H, W, 3, 3]``, symmetric.

    Raises:
      ValueError: If there are fewer than two images.
    """
    if len(images) < 2:
        raise ValueError(f"a covariance needs at least two images, got {len(images)}")
    waves = _waves(images)
    mean = waves.mean(axis=0)
    centered = waves - mean
    own = np.einsum("nyxc,nyxd->yxcd", centered, centered) / len(images)
    _, height, width, _ = images.shape
    radius = np.asarray(frequencies.radii(height, width), np.float64)
    _, ring = np.unique(np.round(radius * min(height, width)), return_inverse=True)
    ring = ring.reshape(height, width)
    by_ring = np.stack([own[ring == number].mean(axis=0) for number in range(ring.max() + 1)])
    covariance = (len(images) * own + ring_images * by_ring[ring]) / (len(images) + ring_images)
    values, vectors = np.linalg.eigh(covariance + ROUNDING * np.eye(3))
    roots = 1 / np.sqrt(np.maximum(values, ROUNDING))
    return mean, np.einsum("yxcd,yxd,yxed->yxce", vectors, roots, vectors)


def _waves(images: np.ndarray) -> np.ndarray:
    return np.asarray(frequencies.transform(jnp.asarray(images, jnp.float32)), np.float64)

"""An image and its augmented copies: do they have the same features and answers?"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from robust_ssl import struct
from robust_ssl.pretraining.augmentation import random_resized_crop
from robust_ssl.screening.detector import Known, cosine, divergence, first_and_others
from robust_ssl.types import Model


@struct.dataclass
class Neighbors:
    """How far the features and answers of augmented copies are from the image's own, on average.

    A copy is a random crop of most of the image with another contrast and some noise.  The key
    draws the copies; it is the same for all images, and the attacker may know it.

    Attributes:
      copies: How many.
      min_scale: Smallest share of the area that a crop keeps.
      contrast: Half-width of the factor's range.
      noise: Deviation of the noise, pixel units.

    Example:
      >>> from robust_ssl.types import Outputs
      >>> colors = lambda images: Outputs(features=jnp.mean(images, axis=(1, 2)))
      >>> bool(Neighbors().score(jax.random.key(0), colors, jnp.full((8, 8, 3), 0.5)) < 1e-3)
      True

    References:
      He et al., "Be Your Own Neighborhood: Detecting Adversarial Examples by the Neighborhood
      Relations Built on Self-Supervised Learning", ICML 2024.
    """

    copies: int = struct.field(pytree_node=False, default=4)
    min_scale: float = struct.field(pytree_node=False, default=0.6)
    contrast: float = struct.field(pytree_node=False, default=0.2)
    noise: float = struct.field(pytree_node=False, default=4 / 255)

    def score(self, key: jax.Array, model: Model, image: jax.Array) -> jax.Array:
        """Returns the mean of ``1 - cosine`` of features, plus that of answers if there are any."""
        keys = jax.random.split(key, self.copies)
        copies = jax.vmap(lambda key: self._copy(key, image))(keys)
        outputs = model(jnp.concatenate([image[None], copies]))
        first, others = first_and_others(outputs)
        turned = 1.0 - cosine(first.features, others.features)
        if outputs.logits is not None:
            turned = turned + divergence(first, others)
        return jnp.mean(turned)

    def _copy(self, key: jax.Array, image: jax.Array) -> jax.Array:
        crop_key, contrast_key, noise_key = jax.random.split(key, 3)
        whole = random_resized_crop(crop_key, image, scale=(self.min_scale, 1.0))
        factor = 1 + self.contrast * jax.random.uniform(contrast_key, minval=-1.0)
        mean = jnp.mean(whole)
        noise = self.noise * jax.random.normal(noise_key, image.shape)
        return jnp.clip(mean + factor * (whole - mean) + noise, 0.0, 1.0)


def fit_neighbors(
    key: jax.Array,
    model: Model,
    images: jax.Array,
    known: Known,
    *,
    copies: int = 4,
    min_scale: float = 0.6,
    contrast: float = 0.2,
    noise: float = 4 / 255,
) -> Neighbors:
    """Returns a `Neighbors`; nothing is fitted.

    Raises:
      ValueError: If there is no copy, or a crop would not keep a share in (0, 1] of the area.
    """
    del key, model, images, known
    if copies < 1 or not 0 < min_scale <= 1:
        raise ValueError(
            f"needs at least one copy and min_scale in (0, 1], got {copies} and {min_scale}"
        )
    return Neighbors(copies, min_scale, contrast, noise)

"""Feature squeezing: does the answer change where the image is made a little coarser?"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from robust_ssl import struct
from robust_ssl.models.preprocessing import JPEG, Quantize
from robust_ssl.screening.detector import Known, divergence, first_and_others
from robust_ssl.types import Model


@struct.dataclass
class Squeeze:
    """The largest change of the model's answer over three squeezers.

    They are fewer bits, a median of 3 x 3 pixels, and what JPEG does to an image, computed here
    and not by a library: so an attack has a gradient (straight through the rounding).

    Attributes:
      levels: Values per channel, 2 to 256.
      quality: Of JPEG, 1 to 100.

    Example:
      >>> from robust_ssl.types import Outputs
      >>> colors = lambda images: Outputs(features=jnp.mean(images, axis=(1, 2)))
      >>> round(float(Squeeze().score(None, colors, jnp.full((8, 8, 3), 0.5))), 4)
      0.0

    References:
      Xu et al., "Feature Squeezing: Detecting Adversarial Examples in Deep Neural Networks", NDSS
      2018, Sec. V (the largest over squeezers); He et al., "Adversarial Example Defenses: Ensembles
      of Weak Defenses are not Strong", WOOT 2017 (an adaptive attack on it).
    """

    levels: int = struct.field(pytree_node=False, default=32)  # 5 bits; Xu et al., CIFAR-10
    quality: int = struct.field(pytree_node=False, default=75)

    def score(self, key: jax.Array, model: Model, image: jax.Array) -> jax.Array:
        """Returns the largest divergence, in nats; for a model without logits of features."""
        del key
        squeezed = [Quantize(self.levels)(image), median(image), JPEG(self.quality)(image)]
        first, others = first_and_others(model(jnp.stack([image, *squeezed])))
        return jnp.max(divergence(first, others))


def fit_squeeze(
    key: jax.Array,
    model: Model,
    images: jax.Array,
    known: Known,
    *,
    levels: int = 32,
    quality: int = 75,
) -> Squeeze:
    """Returns a `Squeeze`; nothing is fitted.

    Raises:
      ValueError: If a squeezer cannot have these settings.
    """
    del key, model, images, known
    Quantize(levels), JPEG(quality)  # they check themselves
    return Squeeze(levels, quality)


# Exchanges after which the middle of nine values is in place 4 (Devillard, "Fast median search",
# 1998, opt_med9): fewer than a sort, and in a form that has a fast gradient.
_EXCHANGES = (
    *((1, 2), (4, 5), (7, 8), (0, 1), (3, 4), (6, 7), (1, 2), (4, 5), (7, 8), (0, 3)),
    *((5, 8), (4, 7), (3, 6), (1, 4), (2, 5), (4, 7), (4, 2), (6, 4), (4, 2)),
)


def median(image: jax.Array) -> jax.Array:
    """Returns the median of each pixel's 3 x 3 neighborhood, by channel; the edge goes on.

    Example:
      >>> speck = jnp.zeros((5, 5, 3)).at[2, 2].set(1.0)
      >>> float(median(speck).max())
      0.0
    """
    height, width, _ = image.shape
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    values = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    for low, high in _EXCHANGES:
        pair = values[low], values[high]
        values[low], values[high] = jnp.minimum(*pair), jnp.maximum(*pair)
    return values[4]

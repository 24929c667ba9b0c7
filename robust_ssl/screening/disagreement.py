"""Two classifiers on two encoders: do they say the same?"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from robust_ssl import struct
from robust_ssl.screening.detector import Known, divergence
from robust_ssl.types import Model


@struct.dataclass
class Disagreement:
    """How far the screened model's answer is from another classifier's of the same classes.

    Two encoders rarely fail together: a perturbation for one often leaves the other alone.

    Attributes:
      public: The other one, for example the usual classifier on the public encoder.
    """

    public: Any

    def score(self, key: jax.Array, model: Model, image: jax.Array) -> jax.Array:
        """Returns the divergence of both answers, in nats."""
        del key
        images = image[None]
        first, second = (m(images).without_taps() for m in (model, self.public))
        return jnp.sum(divergence(first, second))


def fit_disagreement(key: jax.Array, model: Model, images: jax.Array, known: Known) -> Disagreement:
    """Returns a `Disagreement` with the classifier that is known besides the model.

    Raises:
      ValueError: If there is none, or one of both has no logits or other classes.
    """
    del key
    if known.public is None:
        raise ValueError("there is no second classifier to compare with")
    both = [jax.eval_shape(m, images[:1]).logits for m in (model, known.public)]
    if None in both or both[0].shape != both[1].shape:
        shapes = [None if logits is None else logits.shape[1:] for logits in both]
        raise ValueError(f"both classifiers need logits of the same classes, got {shapes}")
    return Disagreement(known.public)

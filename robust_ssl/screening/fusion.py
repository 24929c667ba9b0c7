"""Scores of different units become one: how surprising each would be of a clean image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import struct
from robust_ssl.types import Model

_TAIL = 0.95  # above this quantile the clean scores are taken for exponential
_LEVELS = np.linspace(0.0, _TAIL, 20)


@struct.dataclass
class Surprise:
    r"""Turns a score into nats: minus the logarithm of the share of clean images above it.

    .. math:: s \mapsto -\log(1 - F(s))

    The clean distribution function F is interpolated between quantiles; a score that no clean image
    is below has no nats, however many images share it.  Above the 95th per cent it
    goes on as an exponential with the mean excess of the scores there, so that a score beyond all
    clean ones still counts, and has a gradient.

    Attributes:
      quantiles: Of the clean scores, rising, float ``[20]``.
      excess: Mean excess over the last of them, a scalar above 0.

    Example:
      >>> clean = -np.log1p(-(np.arange(2000) + 0.5) / 2000)  # exponential: already in nats
      >>> surprise = Surprise.fit(clean)
      >>> [round(float(surprise(score)), 1) for score in (1.0, 3.0, 9.0)]
      [1.0, 3.0, 9.0]
    """

    quantiles: jax.Array
    excess: jax.Array

    @classmethod
    def fit(cls, clean: np.ndarray) -> Surprise:
        """Fits it to the scores of clean images, float ``[n]``.

        Raises:
          ValueError: If there are none, or one is not finite.
        """
        clean = np.asarray(clean, np.float64)
        if not clean.size or not np.isfinite(clean).all():
            raise ValueError(f"needs finite scores of clean images, got {clean.size}")
        quantiles = np.quantile(clean, _LEVELS)
        above = clean[clean > quantiles[-1]] - quantiles[-1]
        # Where all scores are equal there is no excess; any other one is then beyond all.
        excess = max(above.mean() if above.size else 0.0, 1e-3 * float(np.ptp(clean)), 1e-6)
        return cls(jnp.asarray(quantiles, jnp.float32), jnp.float32(excess))

    def __call__(self, score: jax.Array) -> jax.Array:
        """Returns nats, at least 0, the shape of `score`."""
        nats = jnp.asarray(-np.log1p(-_LEVELS), jnp.float32)
        inside = jnp.interp(score, self.quantiles, nats)
        # A score that many clean images share is as surprising as the least of its quantiles.
        first = jnp.searchsorted(self.quantiles, score, side="left").clip(max=len(nats) - 1)
        inside = jnp.where(self.quantiles[first] == score, nats[first], inside)
        beyond = jnp.maximum(score - self.quantiles[-1], 0.0) / self.excess
        return inside + beyond


@struct.dataclass
class Calibrated:
    """A detector whose score is in nats; see `Surprise`.

    Attributes:
      detector: The detector.
      surprise: Fitted to its scores of clean images.
    """

    detector: Any
    surprise: Surprise

    def score(self, key: jax.Array, model: Model, image: jax.Array) -> jax.Array:
        """Returns nats, at least 0."""
        return self.surprise(self.detector.score(key, model, image))


@struct.dataclass
class Fused:
    """The most surprising of several detectors.

    Attributes:
      members: Calibrated ones by name.

    Example:
      >>> brightness = struct.dataclass(
      ...     type("Brightness", (), {"score": lambda self, key, model, image: jnp.mean(image)})
      ... )
      >>> member = Calibrated(brightness(), Surprise.fit(np.linspace(0.0, 0.1, 100)))
      >>> bool(Fused({"brightness": member}).score(None, None, jnp.ones((8, 8, 3))) > 100)
      True
    """

    members: Mapping[str, Calibrated]

    def scores(self, key: jax.Array, model: Model, image: jax.Array) -> dict[str, jax.Array]:
        """Returns each member's nats."""
        return {name: member.score(key, model, image) for name, member in self.members.items()}

    def score(self, key: jax.Array, model: Model, image: jax.Array) -> jax.Array:
        """Returns the largest, in nats; 0 where there is no member."""
        own = self.scores(key, model, image)
        return jnp.max(jnp.stack([jnp.zeros(()), *own.values()]))

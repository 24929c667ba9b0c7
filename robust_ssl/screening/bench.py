"""What detectors are tried on: a model, sets of images, and how results are kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl.attacks.per_image import attack_batch
from robust_ssl.evaluation.metrics import (
    check_finite,
    compiled,
    padded,
    predictions,
    settled,
    to_pixels,
)
from robust_ssl.screening.detector import Detector, scores

Arrays = dict[str, np.ndarray]


class Images(NamedTuple):
    """The sets; no two share an image.

    Attributes:
      fit: What detectors were fitted on; adaptive universal attacks are fitted on it too.
      calibration: Clean images by which scores are calibrated and thresholds chosen.
      clean: Clean images that are scored and attacked, uint8 ``[n, H, W, 3]``.
      labels: Of `clean`, int32 ``[n]``.
      shifted: Clean images of another set, which no alarm should be about; or None.
    """

    fit: np.ndarray
    calibration: np.ndarray
    clean: np.ndarray
    labels: np.ndarray
    shifted: np.ndarray | None = None


class Case(NamedTuple):
    """An attack that does not know the detectors.

    Attributes:
      attack: Its name; a detector that knows it is scored without.
      value: What is called, ``value(key, model, image, label)``.
      facts: What the result says of it besides: seed, family, threat, epsilon, ...
    """

    attack: str
    value: Any
    facts: Mapping[str, Any]


def compute_always(name: str, compute: Callable[[], Arrays]) -> Arrays:
    """Keeps nothing."""
    del name
    return compute()


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where detectors are tried.

    Attributes:
      model: The screened classifier.
      images: The sets.
      key: Of detectors and attacks.
      parallel: A `robust_ssl.parallel.Parallel`.
      batch_size: Images at a time.
      keep: ``keep(name, compute) -> arrays``: returns what was computed under a name before, or
        computes and keeps it.
    """

    model: Any
    images: Images
    key: jax.Array
    parallel: Any
    batch_size: int = 250
    keep: Callable[[str, Callable[[], Arrays]], Arrays] = compute_always

    @property
    def detector_key(self) -> jax.Array:
        """The key that all detectors draw with."""
        return jax.random.fold_in(self.key, 0)

    def scores(self, detector: Detector, images: np.ndarray) -> np.ndarray:
        """Returns the scores of a set, float64 ``[n]``."""
        return scores(
            *(detector, self.detector_key, self.model, images),
            parallel=self.parallel,
            batch_size=self.batch_size,
        )

    def attack(self, value: Any, count: int | None = None) -> Arrays:
        """Attacks the first `count` clean images; None is all.

        Returns:
          ``images``, uint8 as a file holds them, and ``answers``, int32.

        Raises:
          ValueError: If the attack makes pixels that are not finite.
        """
        clean, labels = self.images.clean[:count], self.images.labels[:count]
        function = compiled(self.parallel, _attacked)
        key = jax.random.fold_in(self.key, 1)
        constants = self.parallel.replicate((key, self.model, settled(value)))
        parts = []
        for n, batch in padded(_batches(clean, labels, self.batch_size)):
            pixels, answers, finite = function(constants, batch)
            check_finite(type(value).__name__, value, batch["indices"][:n][~finite[:n]])
            parts.append((pixels[:n], answers[:n]))
        images, answers = (np.concatenate(some) for some in zip(*parts, strict=True))
        return {"images": images, "answers": answers}

    def answers(self) -> np.ndarray:
        """Returns what the model says of the clean images, int32 ``[n]``."""
        function, parts = compiled(self.parallel, _answers), []
        model = self.parallel.replicate(self.model)
        for n, batch in padded(_batches(self.images.clean, self.images.labels, self.batch_size)):
            parts.append(function(model, batch)[:n])
        return np.concatenate(parts)


def _batches(images: np.ndarray, labels: np.ndarray, size: int):
    for start in range(0, len(images), size):
        stop = start + size
        yield {"images": images[start:stop], "labels": labels[start:stop]}


def _answers(model: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    return predictions(model, batch["images"])


def _attacked(constants: Any, batch: Mapping[str, jax.Array]):
    key, model, attack = constants
    moved = attack_batch(
        attack, key, model, to_pixels(batch["images"]), batch["labels"], batch["indices"]
    )
    finite = jnp.isfinite(moved).all(axis=(1, 2, 3))
    # As a file holds them: a detector of what rounding would remove is none.
    pixels = jnp.round(255 * jnp.clip(moved, 0.0, 1.0)).astype(jnp.uint8)
    return pixels, predictions(model, pixels), finite

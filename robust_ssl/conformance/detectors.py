"""The laws of detectors: of what they say about one image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl.build import resolve
from robust_ssl.conformance.laws import (
    Laws,
    check_batch,
    made_of,
    made_up_images,
    name_of,
    one_by_one,
    small_model,
)
from robust_ssl.screening import Detector, Known
from robust_ssl.types import Model

_OTHER = 1000  # added to the seed of the second classifier


def check_detector(
    detector: Detector | Callable[..., Detector] | str,
    *,
    model: Model | None = None,
    image_size: int = 8,
    batch: int = 4,
    seed: int = 0,
) -> None:
    """Checks that a detector keeps the laws of detectors.

    Its score must be a finite float scalar, of black, white and gray images too, with a finite
    gradient that is not zero everywhere: an adaptive attack follows it.  The same key gives the
    same score, under `jax.jit` too and whatever the neighbors in the batch.  It may not be the same
    for all images.  `without`, if it is there, returns a detector of the same structure, so nothing
    compiles again.

    Args:
      detector: A fitted detector; a function ``fit(key, model, images, known)`` that makes one, or
        ``"module:function"``.
      model: Screened; None takes a small one with 4 classes.
      image_size: Height and width of the made-up images, pixels.
      batch: Number of made-up images, at least 4.
      seed: Of the made-up images and of the keys.

    Raises:
      AssertionError: Names the detector and the law it breaks.

    Example:
      >>> check_detector("robust_ssl.screening:fit_spectrum")
    """
    check_batch(batch, 4)
    random = np.random.default_rng(seed)
    images = made_up_images(random, batch, image_size)
    model = small_model(random, image_size) if model is None else model
    key = jax.random.key(seed)
    detector = _fitted(detector, key, model, images, seed)
    laws = Laws.of(detector, "score")
    # A black, a white and a gray one, which have no waves and no spread.
    images = images.at[1].set(0.0).at[2].set(1.0).at[3].set(0.5)

    @jax.jit
    def score(image):
        return detector.score(key, model, image)

    alone = one_by_one(score, images)
    laws.hold(alone.ndim == 1, f".score must return a scalar, got {alone.shape[1:]}")
    laws.hold(jnp.issubdtype(alone.dtype, jnp.floating), f".score must be float: {alone.dtype}")
    laws.finite(alone, ".score is not finite")
    laws.hold(jnp.ptp(alone) > 0, ".score is the same for all images")
    laws.close(one_by_one(score, images), alone, ".score differs for the same key", 0.0)
    together = jax.jit(jax.vmap(score))
    laws.close(together(images), alone, ".score differs under jax.vmap", 1e-3)
    turned = together(images[::-1])[::-1]
    laws.close(turned, together(images), ".score depends on the neighbors in the batch")
    gradients = jax.jit(jax.vmap(jax.grad(score)))(images)
    laws.finite(gradients, ".score has a gradient that is not finite")
    laws.moves(gradients, ".score has a gradient of zero: an attack that adapts would see nothing")
    if hasattr(detector, "without"):
        same = jax.tree.structure(detector.without("x")) == jax.tree.structure(detector)
        laws.hold(same, ".without must keep the structure")


def _fitted(detector: Any, key: jax.Array, model: Model, images: jax.Array, seed: int) -> Any:
    """Returns a detector as it is, or fitted to the images, an attack and a second model."""
    fit = resolve(detector) if isinstance(detector, str) else detector
    if hasattr(fit, "score") and not isinstance(fit, type):
        return fit
    if isinstance(fit, type):
        return made_of(fit)
    random = np.random.default_rng(seed + _OTHER)
    change = jnp.asarray(random.choice([-0.1, 0.1], images.shape[1:]), jnp.float32)
    known = Known(change[None], ("made_up",), small_model(random, images.shape[1]))
    fitted = fit(key, model, images, known)
    Laws(name_of(fit)).hold(hasattr(fitted, "score"), "must return a detector with a score")
    return fitted

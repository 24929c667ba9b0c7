"""What a detector is, and what all of them share: the known attacks, scores, divergences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import struct
from robust_ssl.evaluation.metrics import compiled, to_pixels
from robust_ssl.pixels import check_images
from robust_ssl.types import Model, Outputs


@runtime_checkable
class Detector(Protocol):
    """A pytree value that says how suspicious one image is; `jax.vmap` makes it a batch.

    A field `names` and a method ``without(name)`` are used where they are there: `names` are the
    attacks that it knows, and ``without(name)`` returns the detector that does not know one of
    them, by which it is scored on that attack.
    """

    def score(self, key: jax.Array, model: Model, image: jax.Array) -> jax.Array:
        """Returns a scalar; higher is more suspicious."""


@struct.dataclass
class Known:
    """What the defender knows besides the model and clean images.

    Attributes:
      changes: What each known attack does to an image on average, float ``[attacks, H, W, 3]``,
        pixel units; none is ``[0, H, W, 3]``.
      names: The attack of each change; seeds and budgets of one attack have one name.
      public: Another classifier of the same classes, for example on the public encoder; or None.

    Example:
      >>> Known.of({}, jnp.zeros((2, 8, 8, 3))).changes.shape
      (0, 8, 8, 3)
    """

    changes: jax.Array
    names: tuple[str, ...] = struct.field(pytree_node=False, default=())
    public: Any = None

    @classmethod
    def of(
        cls,
        perturbations: Mapping[str, Sequence[Any]],
        images: jax.Array,
        public: Model | None = None,
    ) -> Known:
        """Measures what universal perturbations do to clean images.

        Args:
          perturbations: `attacks.UniversalPerturbation` values by attack, any threat: a patch has a
            mean change like anything that is added.
          images: Clean, uint8 or pixels in [0, 1], ``[n, H, W, 3]``.
          public: As the attribute.

        Raises:
          ValueError: If images are of another kind.
        """
        check_images(images)
        images = to_pixels(images)
        changes, names = [], []
        for name, some in perturbations.items():
            for perturbation in some:
                # On the images and not from `delta`: what [0, 1] cuts off is never seen.
                changes.append(jnp.mean(perturbation.apply(images) - images, axis=0))
                names.append(name)
        none = jnp.zeros((0, *images.shape[1:]))
        return cls(jnp.stack(changes) if changes else none, tuple(names), public)


def scores(
    detector: Detector,
    key: jax.Array,
    model: Model,
    images: np.ndarray,
    *,
    parallel: Any,
    batch_size: int = 250,
) -> np.ndarray:
    """Scores a set of images, each by itself.

    All images get the same key: an image's score must not depend on its place, and the attacker is
    assumed to know the key.

    Args:
      detector: What scores.
      key: Of detectors that draw augmentations.
      model: The screened model.
      images: uint8, or pixels in [0, 1], ``[n, H, W, 3]``.
      parallel: A `robust_ssl.parallel.Parallel`.
      batch_size: Images at a time.

    Returns:
      float64 ``[n]``.

    Raises:
      ValueError: If a score is not finite, images are of another kind, or there are none.
    """
    images = np.asarray(images)
    check_images(images)
    if not len(images):
        raise ValueError("there are no images to screen")
    function, values = compiled(parallel, _scores), []
    constants = parallel.replicate((detector, key, model))
    batch_size = min(batch_size, len(images))
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        missing = batch_size - len(batch)  # one shape, one compile
        padded = np.concatenate([batch, np.repeat(batch[:1], missing, axis=0)])
        values.append(np.asarray(function(constants, {"images": padded}))[: len(batch)])
    result = np.concatenate(values).astype(np.float64)
    if not np.isfinite(result).all():
        bad = np.flatnonzero(~np.isfinite(result))
        raise ValueError(
            f"{type(detector).__name__}: the score of image(s) {bad[:5].tolist()} of "
            f"{len(result)} is not finite; look at what the model gives for them"
        )
    return result


def _scores(constants: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    detector, key, model = constants
    return jax.vmap(lambda image: detector.score(key, model, image))(to_pixels(batch["images"]))


def divergence(first: Outputs, second: Outputs) -> jax.Array:
    r"""Measures how far two answers are apart, in nats.

    .. math:: \sum_c (p_c - q_c) (\log p_c - \log q_c)

    of the probabilities, the sum of both Kullback-Leibler divergences.  Not their L1 distance,
    which Xu et al. took: its gradient fades where both answers are sure, and an attacker that
    follows it would seem to be held off.  A model without logits is compared by its features,
    ``1 - cosine``.

    Args:
      first: Outputs, ``[..., classes]`` or ``[..., dim]``.
      second: Of the same model or another one of the same classes, broadcast.

    Returns:
      At least 0, the shape of the batch.
    """
    if first.logits is None or second.logits is None:
        return 1.0 - cosine(first.features, second.features)
    log_p, log_q = (jax.nn.log_softmax(o.logits, axis=-1) for o in (first, second))
    log_p, log_q = jnp.broadcast_arrays(log_p, log_q)
    return jnp.sum((jnp.exp(log_p) - jnp.exp(log_q)) * (log_p - log_q), axis=-1)


def cosine(first: jax.Array, second: jax.Array) -> jax.Array:
    """Returns the cosine of two feature vectors along the last axis; 0 where one is zero."""
    first, second = jnp.broadcast_arrays(first, second)
    product = jnp.sum(first * second, axis=-1)
    squares = jnp.sum(first**2, axis=-1) * jnp.sum(second**2, axis=-1)
    # Inside the root: its slope at zero is infinite.
    return product * jax.lax.rsqrt(squares + 1e-12)


def first_and_others(outputs: Outputs) -> tuple[Outputs, Outputs]:
    """Splits the outputs of an image and its variants: ``[1, ...]`` and ``[variants, ...]``."""
    bare = outputs.without_taps()
    return jax.tree.map(lambda x: x[:1], bare), jax.tree.map(lambda x: x[1:], bare)

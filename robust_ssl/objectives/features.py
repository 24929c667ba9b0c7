"""Objectives on features: what an attacker maximizes who has the encoder only."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from robust_ssl.objectives.vectors import safe_norm, unit_vectors
from robust_ssl.types import AttackInputs


def feature_l2(inputs: AttackInputs) -> jax.Array:
    r"""Measures how far the attack has moved each feature vector, ``||z' - z||``.

    Zero is a stationary point: an attack on it needs a random start.

    Args:
      inputs: Reads ``adversarial.features`` and ``clean.features``.

    Returns:
      Mean over the batch, at least 0; the gradient at equality is zero.

    Example:
      >>> from robust_ssl.types import Outputs
      >>> clean, moved = Outputs(jnp.zeros((1, 2))), Outputs(jnp.array([[3.0, 4.0]]))
      >>> image = jnp.zeros((1, 8, 8, 3))
      >>> float(feature_l2(AttackInputs(clean, moved, image, image)))
      5.0
    """
    return jnp.mean(safe_norm(inputs.adversarial.features - inputs.clean.features, axis=-1))


def feature_cosine_distance(inputs: AttackInputs) -> jax.Array:
    r"""Measures how far the attack has turned each feature vector, ``1 - cos(z', z)``.

    0 means "same direction", 2 means "opposite".  Only direction counts, because a downstream probe
    on normalized features sees nothing else.  Zero is a stationary point: an attack on it needs a
    random start.

    Args:
      inputs: Reads ``adversarial.features`` and ``clean.features``.

    Returns:
      Mean over the batch, in [0, 2].  A zero feature vector has no direction; its distance is 1.

    Example:
      >>> from robust_ssl.types import Outputs
      >>> clean, moved = Outputs(jnp.array([[1.0, 0.0]])), Outputs(jnp.array([[0.0, 3.0]]))
      >>> image = jnp.zeros((1, 8, 8, 3))
      >>> float(feature_cosine_distance(AttackInputs(clean, moved, image, image)))
      1.0
    """
    products = unit_vectors(inputs.adversarial.features) * unit_vectors(inputs.clean.features)
    return 1.0 - jnp.mean(jnp.sum(products, axis=-1))


def info_nce(
    inputs: AttackInputs,
    *,
    temperature: float = 0.1,  # AdvEncoder's released code
) -> jax.Array:
    r"""Measures how hard it has become to find each clean image's own adversarial image.

    .. math:: -\frac1n \sum_i \log
              \frac{\exp(\cos(z_i, z'_i) / t)}{\sum_j \exp(\cos(z_i, z'_j) / t)}

    Near 0 each adversarial feature vector is still closest to its own clean one; ``log(n)`` means
    that all look alike; more means that others are closer.  A universal perturbation gets there
    without pointing away from the clean features, by making all images alike.

    Args:
      inputs: Reads ``clean.features`` (the queries) and ``adversarial.features`` (the keys; the
        other images' are the negatives).
      temperature: Divides the cosines, above 0.

    Returns:
      Mean over the batch, at least 0.

    Raises:
      ValueError: If there is one image only: without negatives the value is 0 whatever one does.
        If `temperature` is not above 0 and finite.

    Example:
      >>> from robust_ssl.types import Outputs
      >>> outputs, image = Outputs(jnp.ones((4, 2))), jnp.zeros((4, 8, 8, 3))
      >>> round(float(info_nce(AttackInputs(outputs, outputs, image, image))), 4)  # log(4)
      1.3863

    References:
      Zhou et al., "Downstream-agnostic Adversarial Examples", ICCV 2023, and its released code.
    """
    # A negative one would make the attack bring each image nearer to its own clean features.
    if not isinstance(temperature, jax.core.Tracer) and not 0 < temperature < float("inf"):
        raise ValueError(
            f"info_nce: temperature must be above 0 and finite, got {temperature}; usual is 0.1"
        )
    clean, adversarial = inputs.clean.features, inputs.adversarial.features
    if clean.shape[0] < 2:
        raise ValueError(
            "info_nce compares images with each other and needs a batch of at least 2, got 1; in "
            "a per-image attack take feature_cosine_distance or feature_l2"
        )
    cosines = unit_vectors(clean) @ unit_vectors(adversarial).T
    places = jnp.arange(clean.shape[0])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(cosines / temperature, places))

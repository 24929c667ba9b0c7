"""Objectives that need labels and logits: what a white-box attacker maximises."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from robust_ssl.types import AttackInputs


def _labelled_logits(inputs: AttackInputs, name: str) -> tuple[jax.Array, jax.Array]:
    if inputs.labels is None:
        raise ValueError(
            f"objective {name} needs labels, but the attack was called without them; pass labels, "
            "or take an objective on features such as feature_l2"
        )
    if inputs.adversarial.logits is None:
        raise ValueError(
            f"objective {name} needs logits, but the model has no head; attack a Classifier, or "
            "take an objective on features such as feature_l2"
        )
    return inputs.adversarial.logits, inputs.labels


def cross_entropy(inputs: AttackInputs) -> jax.Array:
    """Measures how improbable the true class has become, in nats.

    Args:
      inputs: Reads ``adversarial.logits`` and ``labels``.

    Returns:
      Mean over the batch, at least 0; ``log(classes)`` where all classes look alike.

    Raises:
      ValueError: If there are no labels or no logits.

    Example:
      >>> from robust_ssl.types import Outputs
      >>> outputs = Outputs(features=jnp.zeros((1, 2)), logits=jnp.zeros((1, 4)))
      >>> image = jnp.zeros((1, 8, 8, 3))
      >>> inputs = AttackInputs(outputs, outputs, image, image, labels=jnp.array([1]))
      >>> round(float(cross_entropy(inputs)), 4)  # log(4)
      1.3863

    References:
      Madry et al., ICLR 2018, Section 2.
    """
    logits, labels = _labelled_logits(inputs, "cross_entropy")
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def margin(inputs: AttackInputs) -> jax.Array:
    """Measures by how much the best wrong logit exceeds the true one.

    Positive means misclassified.  Unlike the cross-entropy its gradient does not fade where the
    model is very sure.

    Args:
      inputs: Reads ``adversarial.logits`` and ``labels``.

    Returns:
      Mean over the batch, in logit units.

    Raises:
      ValueError: If there are no labels or no logits.

    Example:
      >>> from robust_ssl.types import Outputs
      >>> outputs = Outputs(features=jnp.zeros((1, 2)), logits=jnp.array([[1.0, 4.0, 3.0]]))
      >>> image = jnp.zeros((1, 8, 8, 3))
      >>> float(margin(AttackInputs(outputs, outputs, image, image, labels=jnp.array([1]))))
      -1.0

    References:
      Carlini and Wagner, "Towards Evaluating the Robustness of Neural Networks", S&P 2017,
      Section V, objective f6.
    """
    logits, labels = _labelled_logits(inputs, "margin")
    true = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    right = jnp.sum(jnp.where(true, logits, 0.0), axis=-1)
    return jnp.mean(jnp.max(jnp.where(true, -jnp.inf, logits), axis=-1) - right)

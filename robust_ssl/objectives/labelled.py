"""Objectives that need labels and logits: what a white-box attacker maximizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from robust_ssl.types import AttackInputs

_STABILIZER = 1e-12  # Croce and Hein's code: the spread of equal logits is not zero


def _labelled_logits(inputs: AttackInputs, name: str) -> tuple[jax.Array, jax.Array]:
    if inputs.labels is None:
        raise ValueError(
            f"objective {name} needs labels, and this attack was given none. robust_ssl.attack and "
            "others that need the encoder only take none: take an objective on features, such as "
            "feature_l2. robust_ssl.measure, attacks.attack_batch and the batches of attacks.fit "
            "take labels"
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
    return jnp.mean(_margins(*_labelled_logits(inputs, "margin")))


def _margins(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Best wrong logit minus the true one, ``[batch]``."""
    true = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    right = jnp.sum(jnp.where(true, logits, 0.0), axis=-1)
    return jnp.max(jnp.where(true, -jnp.inf, logits), axis=-1) - right


def dlr(inputs: AttackInputs) -> jax.Array:
    r"""Measures the margin in units of the spread of the logits: difference of logits ratio.

    .. math:: -\frac{z_y - \max_{i \ne y} z_i}{z_{\pi_1} - z_{\pi_3}}

    with the logits sorted down along :math:`\pi`.  Positive means misclassified.  Neither a shift
    nor a positive factor of the logits changes it, so a model cannot hide its gradient by scaling.

    Args:
      inputs: Reads ``adversarial.logits`` and ``labels``; at least 3 classes.

    Returns:
      Mean over the batch, each in [-1, 0] where the class is right and exactly 1, without a
      gradient, where it has become the third likeliest; 0 where all logits are equal.

    Raises:
      ValueError: If there are no labels or no logits, or fewer than 3 classes.

    Example:
      >>> from robust_ssl.types import Outputs
      >>> outputs = Outputs(features=jnp.zeros((1, 2)), logits=jnp.array([[1.0, 5.0, 3.0, 0.0]]))
      >>> image = jnp.zeros((1, 8, 8, 3))
      >>> float(dlr(AttackInputs(outputs, outputs, image, image, labels=jnp.array([1]))))
      -0.5

    References:
      Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
      parameter-free attacks", ICML 2020, equation (6).
    """
    logits, labels = _labelled_logits(inputs, "dlr")
    _check_classes(logits, 3, "dlr", "margin")
    best = jax.lax.top_k(logits, 3)[0]
    spread = best[..., 0] - best[..., 2] + _STABILIZER
    return jnp.mean(_margins(logits, labels) / spread)


def margin_targeted(inputs: AttackInputs, rank: jax.Array | int = 1) -> jax.Array:
    """Measures by how much the logit of one wrong class, the target, exceeds the true one.

    The target is the wrong class at place `rank` by the logits of the *clean* image.

    Args:
      inputs: Reads ``clean.logits``, ``adversarial.logits`` and ``labels``.
      rank: 1 is the likeliest wrong class, ``classes - 1`` the least likely; int32 scalar.  An
        array beyond either end, whose value nobody can look at, means that end.

    Returns:
      Mean over the batch, in logit units.

    Raises:
      ValueError: If there are no labels or no logits, fewer than 2 classes, or a plain number
        `rank` is out of range.

    Example:
      >>> from robust_ssl.types import Outputs
      >>> outputs = Outputs(features=jnp.zeros((1, 2)), logits=jnp.array([[1.0, 4.0, 3.0]]))
      >>> image = jnp.zeros((1, 8, 8, 3))
      >>> inputs = AttackInputs(outputs, outputs, image, image, labels=jnp.array([1]))
      >>> float(margin_targeted(inputs, rank=2))
      -3.0
    """
    return jnp.mean(_targeted_margins(inputs, rank, "margin_targeted"))


def dlr_targeted(inputs: AttackInputs, rank: jax.Array | int = 1) -> jax.Array:
    r"""Measures the margin of one wrong class, the target, in units of the spread of the logits.

    .. math:: -\frac{z_y - z_t}{z_{\pi_1} - (z_{\pi_3} + z_{\pi_4}) / 2}

    The target :math:`t` is the wrong class at place `rank` by the logits of the *clean* image.

    Args:
      inputs: Reads ``clean.logits``, ``adversarial.logits`` and ``labels``; at least 4 classes.
      rank: 1 is the likeliest wrong class, ``classes - 1`` the least likely; int32 scalar.  An
        array beyond either end, whose value nobody can look at, means that end.

    Returns:
      Mean over the batch; 0 where the best logits are all equal.

    Raises:
      ValueError: If there are no labels or no logits, fewer than 4 classes, or a plain number
        `rank` is out of range.

    Example:
      >>> from robust_ssl.types import Outputs
      >>> outputs = Outputs(features=jnp.zeros((1, 2)), logits=jnp.array([[1.0, 5.0, 4.0, 0.0]]))
      >>> image = jnp.zeros((1, 8, 8, 3))
      >>> inputs = AttackInputs(outputs, outputs, image, image, labels=jnp.array([1]))
      >>> round(float(dlr_targeted(inputs, rank=1)), 4)  # (4 - 5) / (5 - (1 + 0) / 2)
      -0.2222

    References:
      Croce and Hein, ICML 2020, equation (7).
    """
    logits, _ = _labelled_logits(inputs, "dlr_targeted")
    _check_classes(logits, 4, "dlr_targeted", "margin_targeted")
    best = jax.lax.top_k(logits, 4)[0]
    spread = best[..., 0] - (best[..., 2] + best[..., 3]) / 2 + _STABILIZER
    return jnp.mean(_targeted_margins(inputs, rank, "dlr_targeted") / spread)


def _targeted_margins(inputs: AttackInputs, rank: jax.Array | int, name: str) -> jax.Array:
    """Target logit minus the true one, ``[batch]``."""
    logits, labels = _labelled_logits(inputs, name)
    _check_classes(logits, 2, name, "feature_l2")
    classes = logits.shape[-1]
    if isinstance(rank, int | np.integer) and not 1 <= rank < classes:
        raise ValueError(
            f"objective {name}: rank must be between 1 and classes - 1 = {classes - 1}, got {rank}"
        )
    true = jax.nn.one_hot(labels, classes, dtype=bool)
    order = jnp.argsort(jnp.where(true, jnp.inf, -inputs.clean.logits), axis=-1)
    # A traced rank cannot be refused; out of range it must not make the true class the target.
    place = jnp.clip(rank, 1, classes - 1) - 1
    target = jax.nn.one_hot(jnp.take(order, place, axis=-1), classes, dtype=bool)
    return jnp.sum(jnp.where(target, logits, 0.0) - jnp.where(true, logits, 0.0), axis=-1)


def _check_classes(logits: jax.Array, least: int, name: str, instead: str) -> None:
    if logits.shape[-1] < least:
        raise ValueError(
            f"objective {name} needs at least {least} classes, but the model has "
            f"{logits.shape[-1]}; take objective {instead}"
        )

"""How good features are without fine-tuning: k nearest neighbours and a linear probe."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax


def _unit(features: jax.Array) -> jax.Array:
    return features / jnp.maximum(jnp.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def feature_std(features: jax.Array) -> jax.Array:
    """Tells collapse: the spread of normalized features, scalar.

    1 when directions are spread evenly, 0 when all images have the same features.

    Args:
      features: Float ``[n, dim]``.

    Returns:
      ``sqrt(dim)`` times the mean over features of the standard deviation over images.

    Example:
      >>> feature_std(jnp.ones((4, 3))).item()
      0.0

    References:
      Chen & He, "Exploring Simple Siamese Representation Learning", CVPR 2021, Sec. 4.1.
    """
    return jnp.mean(jnp.std(_unit(features), axis=0)) * np.sqrt(features.shape[1])


def effective_rank(features: jax.Array) -> jax.Array:
    """The exponential of the entropy of the normalized singular values, scalar in [1, dim].

    Args:
      features: Float ``[n, dim]``.

    Returns:
      Number of directions that the centered features really use.

    Example:
      >>> effective_rank(jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])).item()
      2.0

    References:
      Roy & Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """
    centered = features - jnp.mean(features, axis=0, keepdims=True)
    values = jnp.linalg.svd(centered, compute_uv=False)
    shares = values / jnp.maximum(jnp.sum(values), 1e-12)
    return jnp.exp(-jnp.sum(jnp.where(shares > 0, shares * jnp.log(shares + 1e-20), 0.0)))


def knn_accuracy(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    features: np.ndarray,
    labels: np.ndarray,
    *,
    neighbours: int = 20,
    temperature: float = 0.07,  # Wu et al. 2018, Sec. 3.4; both as in solo-learn
    chunk: int = 500,
) -> float:
    """Classifies by a weighted vote of the nearest training images.

    Args:
      train_features: Float ``[n, dim]``.
      train_labels: Integer ``[n]``.
      features: Float ``[m, dim]``.
      labels: Integer ``[m]``.
      neighbours: How many vote.
      temperature: A vote weighs ``exp(cosine / temperature)``.
      chunk: Images compared at once.

    Returns:
      Share of `labels` predicted, in [0, 1].

    Example:
      >>> x, y = np.eye(4, dtype=np.float32), np.array([0, 1, 2, 3])
      >>> knn_accuracy(x, y, x, y, neighbours=1)
      1.0

    References:
      Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR
      2018, Sec. 3.4.
    """
    num_classes = int(max(np.max(train_labels), np.max(labels))) + 1
    neighbours = min(neighbours, len(train_features))
    bank, bank_labels = _unit(jnp.asarray(train_features)), jnp.asarray(train_labels)

    @jax.jit
    def vote(queries):
        similarity, nearest = jax.lax.top_k(_unit(queries) @ bank.T, neighbours)
        weights = jnp.exp((similarity - 1.0) / temperature)
        one_hot = jax.nn.one_hot(bank_labels[nearest], num_classes)
        return jnp.argmax(jnp.einsum("nk,nkc->nc", weights, one_hot), axis=1)

    correct = 0
    for start in range(0, len(features), chunk):
        part = np.asarray(vote(jnp.asarray(features[start : start + chunk])))
        correct += int(np.sum(part == labels[start : start + chunk]))
    return correct / len(labels)


def linear_accuracy(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    features: np.ndarray,
    labels: np.ndarray,
    *,
    num_steps: int = 200,
    weight_decay: float = 1e-6,
) -> float:
    """Fits multinomial logistic regression on frozen features with L-BFGS and scores it.

    The problem is convex and solved on the whole training set, so there is no learning rate to
    choose.  Features are standardised with the training set's mean and deviation.

    Args:
      train_features: Float ``[n, dim]``.
      train_labels: Integer ``[n]``.
      features: Float ``[m, dim]``.
      labels: Integer ``[m]``.
      num_steps: L-BFGS iterations.
      weight_decay: Weight of the kernel's squared norm.

    Returns:
      Share of `labels` predicted, in [0, 1].

    Example:
      >>> x, y = np.eye(4, dtype=np.float32), np.array([0, 1, 2, 3])
      >>> linear_accuracy(x, y, x, y)
      1.0
    """
    mean, std = train_features.mean(0, keepdims=True), train_features.std(0, keepdims=True) + 1e-6
    x, y = jnp.asarray((train_features - mean) / std), jnp.asarray(train_labels)
    num_classes = int(max(np.max(train_labels), np.max(labels))) + 1
    kernel, bias = _logistic_regression(x, y, num_classes, num_steps, weight_decay)
    logits = (features - mean) / std @ np.asarray(kernel) + np.asarray(bias)[None]
    return float(np.mean(np.argmax(logits, axis=1) == labels))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _logistic_regression(x, y, num_classes, num_steps, weight_decay):
    def loss(params):
        kernel, bias = params
        logits = x @ kernel + bias[None]
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return jnp.mean(cross_entropy) + weight_decay * jnp.sum(kernel**2)

    tx = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def update(carry, _):
        params, state = carry
        value, gradient = value_and_grad(params, state=state)
        updates, state = tx.update(
            gradient, state, params, value=value, grad=gradient, value_fn=loss
        )
        return (optax.apply_updates(params, updates), state), None

    params = (jnp.zeros((x.shape[1], num_classes)), jnp.zeros((num_classes,)))
    (params, _), _ = jax.lax.scan(update, (params, tx.init(params)), length=num_steps)
    return params

"""How the images of a batch lie to each other: distances, neighbors, and how far they change."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_STABILIZER = 1e-6  # keeps logarithms finite; far below 1 / batch, the size of a row's entries


def _off_diagonal(size: int) -> jax.Array:
    return ~jnp.eye(size, dtype=bool)


def local_distances(outputs: jax.Array) -> jax.Array:
    """Cosine distances minus each row's nearest one, ``[batch, batch]``; the diagonal is junk."""
    squared = jnp.sum(jnp.square(outputs), axis=-1, keepdims=True)
    nonzero = squared > 1e-24
    # Two `where`s: the gradient of the branch not taken must be finite too.
    directions = jnp.where(nonzero, outputs * jax.lax.rsqrt(jnp.where(nonzero, squared, 1.0)), 0.0)
    distances = 1.0 - directions @ directions.T
    others = jnp.where(_off_diagonal(len(outputs)), distances, 4.0)  # 4: beyond every distance
    return distances - jnp.min(others, axis=-1, keepdims=True)


def pulled_to_labels(distances: jax.Array, error: jax.Array, labels: jax.Array) -> jax.Array:
    """Replaces distances by what labels say where the reference predicts labels badly."""
    doubt = jnp.tanh((error[:, None] + error[None, :]) / 32.0)
    sign = jnp.where(labels[:, None] == labels[None, :], -1.0, 1.0)
    return (1.0 - doubt) * distances + 2.0 * sign * doubt


def neighbor_shares(distances: jax.Array) -> jax.Array:
    """Distances to similarities in [0, 1] whose rows, without the diagonal, sum to 1."""
    similarities = 1.0 - jnp.clip(distances, 0.0, 2.0) / 2.0
    similarities = jnp.where(_off_diagonal(len(distances)), similarities, 0.0)
    total = jnp.sum(similarities, axis=-1, keepdims=True)
    return similarities / jnp.maximum(total, _STABILIZER)


def bernoulli_divergence(p: jax.Array, q: jax.Array) -> jax.Array:
    """Symmetric KL of Bernoulli variables, summed over each row: ``(p - q)(logit p - logit q)``."""
    p = jnp.clip(p, _STABILIZER, 1.0 - _STABILIZER)
    q = jnp.clip(q, _STABILIZER, 1.0 - _STABILIZER)
    logit_difference = jnp.log(p) - jnp.log1p(-p) - jnp.log(q) + jnp.log1p(-q)
    return jnp.sum((p - q) * logit_difference, axis=-1)

"""Losses on the axes of projections: each varies, and no two of them together."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from robust_ssl.pretraining.method import check_pair, normalize


def _off_diagonal(matrix: jax.Array) -> jax.Array:
    return jnp.where(jnp.eye(len(matrix), dtype=bool), 0.0, matrix)


def barlow_twins_loss(
    first: jax.Array,
    second: jax.Array,
    *,
    redundancy: float = 0.0051,  # Zbontar et al. 2021, Sec. 2.2; lambda
    scale: float = 0.1,  # solo-learn, CIFAR
) -> jax.Array:
    r"""How far the cross-correlation of two views is from the identity.

    .. math:: s \Big(\sum_i (1 - C_{ii})^2 + \lambda \sum_{i \ne j} C_{ij}^2\Big)

    where C correlates axis i of one view with axis j of the other over the batch.

    Args:
      first: Projections of one view, float ``[batch, dim]``, of the global batch.
      second: Projections of the other view, ``[batch, dim]``.
      redundancy: Weight of the correlations between different axes.
      scale: Of the whole, for the optimizer's sake.

    Returns:
      The batch's one number for every image, ``[batch]``; ``scale * dim`` for constant
      projections.

    Raises:
      AssertionError: If the shapes differ or are not rank 2.

    Example:
      >>> z = jnp.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
      >>> barlow_twins_loss(z, z).round(4).tolist()
      [0.0, 0.0, 0.0, 0.0]

    References:
      Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", ICML 2021,
      Eq. 1 and 2.
    """
    check_pair(first, second)
    n = len(first)
    correlation = _standardised(first).T @ _standardised(second) / n
    apart = jnp.sum(_off_diagonal(correlation) ** 2)
    together = jnp.sum((1 - jnp.diagonal(correlation)) ** 2)
    return jnp.broadcast_to(scale * (together + redundancy * apart), (n,))


def _standardised(x: jax.Array) -> jax.Array:
    """Mean 0 and variance 1 on each axis, as by batch norm."""
    x = x - jnp.mean(x, axis=0, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=0, keepdims=True) + 1e-5)


def variance_hinge(projections: jax.Array, *, stabilizer: float = 1e-4) -> jax.Array:
    r"""How far the axes' standard deviations fall short of 1, on average.

    .. math:: \frac{1}{d} \sum_j \max\big(0,\; 1 - \sqrt{\mathrm{Var}(z_j) + \epsilon}\big)

    Args:
      projections: Float ``[batch, dim]`` of the global batch, at least two images.
      stabilizer: Added to the variance, so that a constant axis has a gradient that is finite.

    Returns:
      A scalar in [0, 1); 0 when every axis varies enough.

    Example:
      >>> round(float(variance_hinge(jnp.array([[0.0], [0.0]]))), 4)
      0.99

    References:
      Bardes et al., "VICReg: Variance-Invariance-Covariance Regularization", ICLR 2022, Eq. 1, 2.
    """
    check_several(projections)
    deviation = jnp.sqrt(jnp.var(projections, axis=0, ddof=1) + stabilizer)
    return jnp.mean(jax.nn.relu(1 - deviation))


def covariance_penalty(projections: jax.Array) -> jax.Array:
    r"""The squared covariances between different axes, summed, per axis.

    .. math:: \frac{1}{d} \sum_{i \ne j} \mathrm{Cov}(z)_{ij}^2

    Args:
      projections: Float ``[batch, dim]`` of the global batch, at least two images.

    Returns:
      A scalar, at least 0; 0 when no two axes covary.

    Example:
      >>> covariance_penalty(jnp.array([[1.0, 1.0], [-1.0, -1.0]])).item()  # both are 2
      4.0

    References:
      Bardes et al., ICLR 2022, Eq. 3 and 4.
    """
    check_several(projections)
    n, dim = projections.shape
    centered = projections - jnp.mean(projections, axis=0, keepdims=True)
    return jnp.sum(_off_diagonal(centered.T @ centered / (n - 1)) ** 2) / dim


def check_several(projections: jax.Array) -> None:
    """Raises ValueError for one image, which has no variance."""
    if len(projections) < 2:
        raise ValueError(f"one image has no variance: need at least two, got {len(projections)}")


def correlation_penalty(projections: jax.Array) -> jax.Array:
    r"""The squared correlations between different axes, as a mean over all pairs of axes.

    .. math:: \frac{1}{d^2} \sum_{i \ne j} \mathrm{Corr}(z)_{ij}^2

    Unlike `covariance_penalty` it neither grows with the scale nor with the number of axes.

    Args:
      projections: Float ``[batch, dim]`` of the global batch.

    Returns:
      A scalar in [0, 1); a constant axis correlates with none.

    Example:
      >>> correlation_penalty(jnp.array([[3.0, 1.0], [-3.0, -1.0]])).round(4).item()  # half of 1
      0.5

    References:
      Lee and Aune, "VIbCReg: Variance-Invariance-better-Covariance Regularization for
      Self-Supervised Learning on Time Series", 2021, Sec. 3.
    """
    centered = projections - jnp.mean(projections, axis=0, keepdims=True)
    directions = normalize(centered.T)
    return jnp.mean(_off_diagonal(directions @ directions.T) ** 2)


def vicreg_loss(
    first: jax.Array,
    second: jax.Array,
    *,
    invariance: float = 25.0,  # Bardes et al. 2022, Sec. 4.2
    variance: float = 25.0,  # the same
    covariance: float = 1.0,  # the same
) -> jax.Array:
    r"""Two views agree, every axis varies, no two axes vary together.

    .. math:: \ell_i = \lambda \frac{\|z_i - z_i'\|^2}{d} + \mu \big(v(Z) + v(Z')\big)
                       + \nu \big(c(Z) + c(Z')\big)

    with `variance_hinge` v and `covariance_penalty` c.

    Args:
      first: Projections of one view, float ``[batch, dim]``, of the global batch.
      second: Projections of the other view, ``[batch, dim]``.
      invariance: Weight of the first term.
      variance: Weight of the second, which is the same for all images.
      covariance: Weight of the third, which is the same for all images.

    Returns:
      One loss per image, ``[batch]``, at least 0.

    Raises:
      AssertionError: If the shapes differ or are not rank 2.

    Example:
      >>> vicreg_loss(jnp.zeros((2, 3)), jnp.zeros((2, 3))).tolist()  # 25 * 0.99 for each view
      [49.5, 49.5]

    References:
      Bardes et al., ICLR 2022, Eq. 6.
    """
    return _three_terms(first, second, covariance_penalty, (invariance, variance, covariance))


def vibcreg_loss(
    first: jax.Array,
    second: jax.Array,
    *,
    invariance: float = 25.0,  # solo-learn, CIFAR
    variance: float = 25.0,  # the same
    covariance: float = 200.0,  # the same
) -> jax.Array:
    """`vicreg_loss` with `correlation_penalty` in the place of `covariance_penalty`.

    Args:
      first: Projections of one view, float ``[batch, dim]``, of the global batch.
      second: Projections of the other view, ``[batch, dim]``.
      invariance: Weight of the mean squared difference.
      variance: Weight of `variance_hinge`, which is the same for all images.
      covariance: Weight of `correlation_penalty`, which is the same for all images.

    Returns:
      One loss per image, ``[batch]``, at least 0.

    Raises:
      AssertionError: If the shapes differ or are not rank 2.

    Example:
      >>> vibcreg_loss(jnp.zeros((2, 3)), jnp.zeros((2, 3))).tolist()  # 25 * 0.99 for each view
      [49.5, 49.5]

    References:
      Lee and Aune, 2021, Sec. 3.
    """
    return _three_terms(first, second, correlation_penalty, (invariance, variance, covariance))


def _three_terms(first, second, penalty, weights) -> jax.Array:
    check_pair(first, second)
    invariance, variance, covariance = weights
    losses = invariance * jnp.mean((first - second) ** 2, axis=1)
    losses += variance * (variance_hinge(first) + variance_hinge(second))
    return losses + covariance * (penalty(first) + penalty(second))

"""Barlow Twins, VICReg, VIbCReg and W-MSE: views agree while the projections' axes stay apart."""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp
from flax import struct
from jax.scipy.linalg import solve_triangular

from robust_ssl import parallel
from robust_ssl.pretraining.augmentation import ASYMMETRIC, View, random_views
from robust_ssl.pretraining.distillation import GeluMLP
from robust_ssl.pretraining.method import (
    MLP,
    MethodUpdate,
    PretrainInputs,
    apply_network,
    encode,
    init_networks,
    normalise,
)
from robust_ssl.types import Encoder, Variables

# --- Losses -----------------------------------------------------------------------------------


def _check_pair(first: jax.Array, second: jax.Array) -> None:
    chex.assert_rank([first, second], 2)
    chex.assert_equal_shape([first, second])


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
      scale: Of the whole, for the optimiser's sake.

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
    _check_pair(first, second)
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
      >>> variance_hinge(jnp.array([[0.0], [0.0]])).round(4).item()
      0.9900000095367432

    References:
      Bardes et al., "VICReg: Variance-Invariance-Covariance Regularization", ICLR 2022, Eq. 1, 2.
    """
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
    n, dim = projections.shape
    centred = projections - jnp.mean(projections, axis=0, keepdims=True)
    return jnp.sum(_off_diagonal(centred.T @ centred / (n - 1)) ** 2) / dim


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
    centred = projections - jnp.mean(projections, axis=0, keepdims=True)
    directions = normalise(centred.T)
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
    _check_pair(first, second)
    losses = invariance * jnp.mean((first - second) ** 2, axis=1)
    losses += variance * (variance_hinge(first) + variance_hinge(second))
    return losses + covariance * (covariance_penalty(first) + covariance_penalty(second))


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
    _check_pair(first, second)
    losses = invariance * jnp.mean((first - second) ** 2, axis=1)
    losses += variance * (variance_hinge(first) + variance_hinge(second))
    return losses + covariance * (correlation_penalty(first) + correlation_penalty(second))


def wmse_loss(first: jax.Array, second: jax.Array) -> jax.Array:
    r"""The squared distance between the directions of two whitened projections.

    .. math:: \ell_i = \left\| \frac{w_i}{\|w_i\|} - \frac{w_i'}{\|w_i'\|} \right\|^2

    Alone it would collapse; `whiten` is what holds the projections apart.

    Args:
      first: Whitened projections of one view, float ``[batch, dim]``.
      second: Of the other view, ``[batch, dim]``.

    Returns:
      One loss in [0, 4] per image, ``[batch]``.

    Raises:
      AssertionError: If the shapes differ or are not rank 2.

    Example:
      >>> wmse_loss(jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 1.0]])).round(4).tolist()
      [2.0]

    References:
      Ermolov et al., "Whitening for Self-Supervised Representation Learning", ICML 2021, Eq. 5, 6.
    """
    _check_pair(first, second)
    return jnp.sum((normalise(first) - normalise(second)) ** 2, axis=1)


# --- Whitening --------------------------------------------------------------------------------


def whiten(x: jax.Array, *, stabilizer: float = 1e-6) -> jax.Array:
    r"""Makes the covariance of a batch the identity, with a triangular matrix.

    .. math:: W (x - \bar x), \qquad W = L^{-1}, \quad L L^\top = \mathrm{Cov}(x)

    Args:
      x: Float ``[batch, dim]``; more images than axes.
      stabilizer: Share of the total variance that is added to each axis, so that the covariance
        has a Cholesky factor in float32 also where the axes depend on one another.

    Returns:
      Float32 ``[batch, dim]`` with mean 0; 0 for a constant batch.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (64, 3)) @ jnp.array(
      ...     [[1.0, 2.0, 0.0], [0.0, 1.0, 5.0], [0.0, 0.0, 3.0]])
      >>> bool(jnp.allclose(jnp.cov(whiten(x).T), jnp.eye(3), atol=0.01))
      True

    References:
      Ermolov et al., ICML 2021, Eq. 7 and App.; Siarohin et al., "Whitening and Coloring Batch
      Transform for GANs", ICLR 2019.
    """
    chex.assert_rank(x, 2)
    n, dim = x.shape
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=0, keepdims=True)
    covariance = jnp.matmul(x.T, x, precision="highest") / (n - 1)
    # Relative to the variance, as rounding errors are; the absolute part serves a constant batch.
    floor = stabilizer * jnp.trace(covariance) + 1e-12
    factor = jnp.linalg.cholesky(covariance + floor * jnp.eye(dim))
    return solve_triangular(factor, x.T, lower=True).T


def iterative_normalisation(
    x: jax.Array,
    *,
    group_size: int = 32,  # solo-learn: 64 groups of 2048 axes
    num_steps: int = 5,  # Huang et al. 2019, Sec. 4
    stabilizer: float = 1e-5,  # solo-learn
) -> jax.Array:
    r"""Whitens groups of axes approximately, with Newton's iteration for the inverse root.

    .. math:: P_{k+1} = \tfrac{1}{2} (3 P_k - P_k^3 \Sigma_N), \quad
              \Sigma_N = \Sigma / \mathrm{tr} \Sigma, \quad
              \hat x = P_T (x - \bar x) / \sqrt{\mathrm{tr} \Sigma}

    Args:
      x: Float ``[batch, dim]`` of the global batch.
      group_size: Axes that are whitened together; the greatest common divisor with dim is taken.
      num_steps: Newton steps; few of them leave the small eigenvalues small.
      stabilizer: Added to the variances.

    Returns:
      Float32 ``[batch, dim]`` with mean 0; 0 for a constant batch.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (64, 4)) * jnp.array([[1.0, 2.0, 3.0, 4.0]])
      >>> whitened = iterative_normalisation(x, num_steps=9)
      >>> bool(jnp.allclose(whitened.T @ whitened / 64, jnp.eye(4), atol=0.01))
      True

    References:
      Huang et al., "Iterative Normalization: Beyond Standardization towards Efficient Whitening",
      CVPR 2019, Algorithm 1; Higham, "Stable Iterations for the Matrix Square Root", Numerical
      Algorithms 15, 1997.
    """
    chex.assert_rank(x, 2)
    n, dim = x.shape
    size = math.gcd(group_size, dim)
    x = x.astype(jnp.float32)
    x = (x - jnp.mean(x, axis=0, keepdims=True)).reshape(n, dim // size, size)

    def multiply(*operands):
        return jnp.einsum(*operands, precision="highest")

    identity = jnp.eye(size).reshape(1, size, size)
    covariance = multiply("ngi,ngj->gij", x, x) / n + stabilizer * identity
    trace = jnp.trace(covariance, axis1=1, axis2=2).reshape(-1, 1, 1)
    # Huang et al.'s P is the inverse root below.  Stepping the root beside it gives the same values
    # in exact arithmetic, and unlike P alone does not blow up rounding errors (Higham 1997).
    root, inverse_root = covariance / trace, jnp.broadcast_to(identity, covariance.shape)
    for _ in range(num_steps):
        step = 1.5 * identity - 0.5 * multiply("gij,gjk->gik", inverse_root, root)
        root = multiply("gij,gjk->gik", root, step)
        inverse_root = multiply("gij,gjk->gik", step, inverse_root)
    return multiply("gij,ngj->ngi", inverse_root * jax.lax.rsqrt(trace), x).reshape(n, dim)


# --- Methods ----------------------------------------------------------------------------------


def _project(
    projector: MLP, variables: Variables, encoder: Encoder, inputs: PretrainInputs
) -> tuple[jax.Array, jax.Array, MethodUpdate]:
    """Projections of the two views of the global batch, and the new statistics."""
    features, statistics = encode(encoder, inputs.views, inputs.axis_name)
    both, variables = apply_network(
        projector, variables, "projector", jnp.concatenate(features), inputs.axis_name
    )
    first, second = parallel.gather(tuple(jnp.split(both, 2)), inputs.axis_name)
    return first, second, MethodUpdate(statistics, variables["batch_stats"])


@struct.dataclass
class BarlowTwins:
    """The method as a value: see `robust_ssl.pretraining.method.Method`.

    Attributes:
      redundancy: Of `barlow_twins_loss`.
      scale: Of `barlow_twins_loss`.
      hidden: Width of the projector's two hidden layers.
      projection_dim: Size of the projections.
      min_scale: Smallest share of the area that a view's crop keeps.

    References:
      Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", ICML 2021.
    """

    # Defaults are those of solo-learn's CIFAR recipe.
    redundancy: float = struct.field(pytree_node=False, default=0.0051)
    scale: float = struct.field(pytree_node=False, default=0.1)
    hidden: int = struct.field(pytree_node=False, default=2048)
    projection_dim: int = struct.field(pytree_node=False, default=2048)
    min_scale: float = struct.field(pytree_node=False, default=0.08)

    @property
    def _projector(self) -> MLP:
        return MLP((self.hidden, self.hidden, self.projection_dim))

    def init(self, key: jax.Array, encoder: Encoder, num_images: int) -> Variables:
        """Returns the method's own variables, ``{"params": {"projector": ...}, ...}``."""
        return init_networks(key, {"projector": (self._projector, encoder.dim)})

    def views(self, key: jax.Array, image: jax.Array) -> tuple[jax.Array, ...]:
        """Returns two random views of one image, ``[H, W, 3]`` each."""
        views = [view.replace(min_scale=self.min_scale) for view in ASYMMETRIC]
        return random_views(key, image, views)

    def loss(
        self, variables: Variables, encoder: Encoder, inputs: PretrainInputs
    ) -> tuple[jax.Array, MethodUpdate]:
        """Returns `barlow_twins_loss` of the global batch."""
        first, second, update = _project(self._projector, variables, encoder, inputs)
        losses = barlow_twins_loss(first, second, redundancy=self.redundancy, scale=self.scale)
        return losses, update


# solo-learn's CIFAR recipes of VICReg and VIbCReg.
_VICREG_VIEW = View(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, solarise=0.1)


@struct.dataclass
class VICReg:
    """The method as a value: see `robust_ssl.pretraining.method.Method`.

    Attributes:
      invariance: Of `vicreg_loss`.
      variance: Of `vicreg_loss`.
      covariance: Of `vicreg_loss`.
      hidden: Width of the projector's two hidden layers.
      projection_dim: Size of the projections.
      min_scale: Smallest share of the area that a view's crop keeps.

    References:
      Bardes et al., "VICReg: Variance-Invariance-Covariance Regularization", ICLR 2022.
    """

    # Defaults are those of solo-learn's CIFAR recipe.
    invariance: float = struct.field(pytree_node=False, default=25.0)
    variance: float = struct.field(pytree_node=False, default=25.0)
    covariance: float = struct.field(pytree_node=False, default=1.0)
    hidden: int = struct.field(pytree_node=False, default=2048)
    projection_dim: int = struct.field(pytree_node=False, default=2048)
    min_scale: float = struct.field(pytree_node=False, default=0.2)

    @property
    def _projector(self) -> MLP:
        return MLP((self.hidden, self.hidden, self.projection_dim))

    def init(self, key: jax.Array, encoder: Encoder, num_images: int) -> Variables:
        """Returns the method's own variables, ``{"params": {"projector": ...}, ...}``."""
        return init_networks(key, {"projector": (self._projector, encoder.dim)})

    def views(self, key: jax.Array, image: jax.Array) -> tuple[jax.Array, ...]:
        """Returns two random views of one image, ``[H, W, 3]`` each."""
        return random_views(key, image, (_VICREG_VIEW.replace(min_scale=self.min_scale),) * 2)

    def loss(
        self, variables: Variables, encoder: Encoder, inputs: PretrainInputs
    ) -> tuple[jax.Array, MethodUpdate]:
        """Returns `vicreg_loss` per image of the global batch."""
        first, second, update = _project(self._projector, variables, encoder, inputs)
        losses = vicreg_loss(
            first,
            second,
            invariance=self.invariance,
            variance=self.variance,
            covariance=self.covariance,
        )
        return losses, update


@struct.dataclass
class VIbCReg:
    """The method as a value: see `robust_ssl.pretraining.method.Method`.

    The projector ends in `iterative_normalisation`, of each view by itself over the global batch,
    and a scale and shift per axis.

    Attributes:
      invariance: Of `vibcreg_loss`.
      variance: Of `vibcreg_loss`.
      covariance: Of `vibcreg_loss`.
      hidden: Width of the projector's two hidden layers.
      projection_dim: Size of the projections.
      group_size: Of `iterative_normalisation`.
      min_scale: Smallest share of the area that a view's crop keeps.

    References:
      Lee and Aune, "VIbCReg: Variance-Invariance-better-Covariance Regularization for
      Self-Supervised Learning on Time Series", 2021.
    """

    # Defaults are those of solo-learn's CIFAR recipe.
    invariance: float = struct.field(pytree_node=False, default=25.0)
    variance: float = struct.field(pytree_node=False, default=25.0)
    covariance: float = struct.field(pytree_node=False, default=200.0)
    hidden: int = struct.field(pytree_node=False, default=2048)
    projection_dim: int = struct.field(pytree_node=False, default=2048)
    group_size: int = struct.field(pytree_node=False, default=32)
    min_scale: float = struct.field(pytree_node=False, default=0.2)

    @property
    def _projector(self) -> GeluMLP:
        return GeluMLP((self.hidden, self.hidden, self.projection_dim))

    def init(self, key: jax.Array, encoder: Encoder, num_images: int) -> Variables:
        """Returns the projector, and the scale and bias that follow the normalisation."""
        variables = init_networks(key, {"projector": (self._projector, encoder.dim)})
        variables["params"]["normalisation"] = {
            "scale": jnp.ones(self.projection_dim),
            "bias": jnp.zeros(self.projection_dim),
        }
        return variables

    def views(self, key: jax.Array, image: jax.Array) -> tuple[jax.Array, ...]:
        """Returns two random views of one image, ``[H, W, 3]`` each."""
        return random_views(key, image, (_VICREG_VIEW.replace(min_scale=self.min_scale),) * 2)

    def loss(
        self, variables: Variables, encoder: Encoder, inputs: PretrainInputs
    ) -> tuple[jax.Array, MethodUpdate]:
        """Returns `vibcreg_loss` per image of the global batch."""
        first, second, update = _project(self._projector, variables, encoder, inputs)
        affine = variables["params"]["normalisation"]
        scale, bias = affine["scale"].reshape(1, -1), affine["bias"].reshape(1, -1)
        first, second = (
            iterative_normalisation(view, group_size=self.group_size) * scale + bias
            for view in (first, second)
        )
        losses = vibcreg_loss(
            first,
            second,
            invariance=self.invariance,
            variance=self.variance,
            covariance=self.covariance,
        )
        return losses, update


@struct.dataclass
class WMSE:
    """The method as a value: see `robust_ssl.pretraining.method.Method`.

    Attributes:
      hidden: Width of the projector's hidden layer.
      projection_dim: Size of the projections; at most half of `whitening_size` is advised.
      whitening_size: Images that are whitened together, at random; a smaller batch is whitened
        whole.
      stabilizer: Of `whiten`.
      min_scale: Smallest share of the area that a view's crop keeps.

    References:
      Ermolov et al., "Whitening for Self-Supervised Representation Learning", ICML 2021.
    """

    # Defaults are those of solo-learn's CIFAR recipe unless said.
    hidden: int = struct.field(pytree_node=False, default=1024)
    projection_dim: int = struct.field(pytree_node=False, default=64)
    whitening_size: int = struct.field(pytree_node=False, default=128)
    stabilizer: float = struct.field(pytree_node=False, default=1e-6)  # solo-learn: 0, can be NaN
    min_scale: float = struct.field(pytree_node=False, default=0.2)

    @property
    def _projector(self) -> MLP:
        return MLP((self.hidden, self.projection_dim))

    def init(self, key: jax.Array, encoder: Encoder, num_images: int) -> Variables:
        """Returns the method's own variables, ``{"params": {"projector": ...}, ...}``."""
        return init_networks(key, {"projector": (self._projector, encoder.dim)})

    def views(self, key: jax.Array, image: jax.Array) -> tuple[jax.Array, ...]:
        """Returns two random views of one image, ``[H, W, 3]`` each."""
        return random_views(key, image, (View(min_scale=self.min_scale),) * 2)

    def loss(
        self, variables: Variables, encoder: Encoder, inputs: PretrainInputs
    ) -> tuple[jax.Array, MethodUpdate]:
        """Returns `wmse_loss` per image of the global batch.

        Raises:
          ValueError: If the global batch is no multiple of `whitening_size`.
        """
        first, second, update = _project(self._projector, variables, encoder, inputs)
        order = jax.random.permutation(inputs.key, len(first))
        losses = wmse_loss(self._whiten(first[order]), self._whiten(second[order]))
        return jnp.zeros_like(losses).at[order].set(losses), update

    def _whiten(self, projections: jax.Array) -> jax.Array:
        """Whitens each run of `whitening_size` images by itself."""
        n, dim = projections.shape
        size = min(self.whitening_size, n)
        if n % size:
            raise ValueError(
                f"a batch of {n} does not divide into parts of whitening_size="
                f"{self.whitening_size}; change one of them"
            )
        parts = projections.reshape(-1, size, dim)
        whitened = jax.vmap(lambda part: whiten(part, stabilizer=self.stabilizer))(parts)
        return whitened.reshape(n, dim)

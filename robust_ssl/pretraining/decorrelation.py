"""Barlow Twins, VICReg, VIbCReg and W-MSE: views agree while the projections' axes stay apart."""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from robust_ssl import struct
from robust_ssl.pretraining.augmentation import ASYMMETRIC, View
from robust_ssl.pretraining.covariance import (
    barlow_twins_loss,
    check_several,
    vibcreg_loss,
    vicreg_loss,
)
from robust_ssl.pretraining.method import (
    MLP,
    MethodUpdate,
    PretrainInputs,
    check_pair,
    normalize,
    option,
)
from robust_ssl.pretraining.two_views import TwoViews
from robust_ssl.types import Encoder, Variables

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

    Raises:
      ValueError: If there is one image only, which has no variance.

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
    check_several(x)
    n, dim = x.shape
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=0, keepdims=True)
    covariance = jnp.matmul(x.T, x, precision="highest") / (n - 1)
    # Relative to the variance, as rounding errors are; the absolute part serves a constant batch.
    floor = stabilizer * jnp.trace(covariance) + 1e-12
    factor = jnp.linalg.cholesky(covariance + floor * jnp.eye(dim))
    return solve_triangular(factor, x.T, lower=True).T


def iterative_normalization(
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
      >>> whitened = iterative_normalization(x, num_steps=9)
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
    check_pair(first, second)
    return jnp.sum((normalize(first) - normalize(second)) ** 2, axis=1)


# --- Methods ----------------------------------------------------------------------------------


@struct.dataclass
class BarlowTwins(TwoViews):
    """The method as a value: see `robust_ssl.pretraining.method.Method` and `TwoViews`.

    Attributes:
      redundancy: Of `barlow_twins_loss`.
      scale: Of `barlow_twins_loss`.
      projection_dim: Size of the projections.

    References:
      Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", ICML 2021.
    """

    # Defaults are those of solo-learn's CIFAR recipe.
    redundancy: float = option(0.0051)
    scale: float = option(0.1)
    projection_dim: int = option(2048)

    augmentations = ASYMMETRIC
    hidden_layers = 2
    projector = MLP(())

    def loss(
        self, variables: Variables, encoder: Encoder, inputs: PretrainInputs
    ) -> tuple[jax.Array, MethodUpdate]:
        """Returns `barlow_twins_loss` of the global batch."""
        first, second, update = self.projections(variables, encoder, inputs)
        losses = barlow_twins_loss(first, second, redundancy=self.redundancy, scale=self.scale)
        return losses, update


@struct.dataclass
class VICReg(TwoViews):
    """The method as a value: see `robust_ssl.pretraining.method.Method` and `TwoViews`.

    Attributes:
      invariance: Of `vicreg_loss`.
      variance: Of `vicreg_loss`.
      covariance: Of `vicreg_loss`.
      projection_dim: Size of the projections.
      min_scale: Smallest share of the area that a view's crop keeps.

    References:
      Bardes et al., "VICReg: Variance-Invariance-Covariance Regularization", ICLR 2022.
    """

    # Defaults are those of solo-learn's CIFAR recipe.
    invariance: float = option(25.0)
    variance: float = option(25.0)
    covariance: float = option(1.0)
    projection_dim: int = option(2048)
    min_scale: float = option(0.2)

    # solo-learn's CIFAR recipes of VICReg and VIbCReg.
    augmentations = (View(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, solarise=0.1),) * 2
    hidden_layers = 2
    projector = MLP(())

    def loss(
        self, variables: Variables, encoder: Encoder, inputs: PretrainInputs
    ) -> tuple[jax.Array, MethodUpdate]:
        """Returns `vicreg_loss` per image of the global batch."""
        first, second, update = self.projections(variables, encoder, inputs)
        losses = vicreg_loss(
            first,
            second,
            invariance=self.invariance,
            variance=self.variance,
            covariance=self.covariance,
        )
        return losses, update


@struct.dataclass
class VIbCReg(VICReg):
    """`VICReg` on whitened projections, with correlations in the place of covariances.

    The projector ends in `iterative_normalization`, of each view by itself over the global batch,
    and a scale and shift per axis.  Further attributes: those of `VICReg`, of `vibcreg_loss` here.

    Attributes:
      covariance: Of `vibcreg_loss`.
      group_size: Of `iterative_normalization`.

    References:
      Lee and Aune, "VIbCReg: Variance-Invariance-better-Covariance Regularization for
      Self-Supervised Learning on Time Series", 2021.
    """

    # Defaults are those of solo-learn's CIFAR recipe.
    covariance: float = option(200.0)
    group_size: int = option(32)

    projector = MLP((), activation="gelu")

    def init(self, key: jax.Array, encoder: Encoder, num_images: int) -> Variables:
        """Returns the projector, and the scale and bias that follow the normalization."""
        variables = super().init(key, encoder, num_images)
        variables["params"]["normalization"] = {
            "scale": jnp.ones(self.projection_dim),
            "bias": jnp.zeros(self.projection_dim),
        }
        return variables

    def loss(
        self, variables: Variables, encoder: Encoder, inputs: PretrainInputs
    ) -> tuple[jax.Array, MethodUpdate]:
        """Returns `vibcreg_loss` per image of the global batch."""
        first, second, update = self.projections(variables, encoder, inputs)
        affine = variables["params"]["normalization"]
        scale, bias = affine["scale"].reshape(1, -1), affine["bias"].reshape(1, -1)
        first, second = (
            iterative_normalization(view, group_size=self.group_size) * scale + bias
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
class WMSE(TwoViews):
    """The method as a value: see `robust_ssl.pretraining.method.Method` and `TwoViews`.

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

    # Defaults are those of solo-learn's CIFAR recipe unless another source is named.
    hidden: int = option(1024)
    projection_dim: int = option(64)
    whitening_size: int = option(128)
    stabilizer: float = option(1e-6)  # solo-learn: 0, can be NaN
    min_scale: float = option(0.2)

    augmentations = (View(),) * 2
    projector = MLP(())

    def loss(
        self, variables: Variables, encoder: Encoder, inputs: PretrainInputs
    ) -> tuple[jax.Array, MethodUpdate]:
        """Returns `wmse_loss` per image of the global batch.

        Raises:
          ValueError: If the global batch is no multiple of `whitening_size`.
        """
        first, second, update = self.projections(variables, encoder, inputs)
        # Other images are whitened together in every step, the same for both views.
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

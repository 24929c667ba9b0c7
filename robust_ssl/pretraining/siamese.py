"""One view predicts the other, with no negatives: BYOL (NeurIPS 2020), SimSiam (CVPR 2021)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from robust_ssl import parallel, struct
from robust_ssl.pretraining.augmentation import ASYMMETRIC, SYMMETRIC_WEAK
from robust_ssl.pretraining.method import (
    MLP,
    MethodUpdate,
    PretrainInputs,
    check_pair,
    normalize,
    option,
)
from robust_ssl.pretraining.momentum_copy import WithCopy
from robust_ssl.pretraining.two_views import TwoViews, crossed
from robust_ssl.types import Encoder, Variables


def byol_loss(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    r"""The squared distance between the directions of a prediction and its target.

    .. math:: \ell_i = \left\| \frac{p_i}{\|p_i\|} - \frac{t_i}{\|t_i\|} \right\|^2
                     = 2 - 2 \cos(p_i, t_i)

    0 for one direction, 2 for orthogonal ones, 4 for opposite ones.

    Args:
      predictions: From one view, float ``[batch, dim]``.
      targets: Projections of the other view by the momentum copy, ``[batch, dim]``.  A constant:
        no gradient flows into it.

    Returns:
      One loss per image, ``[batch]``, in [0, 4]; 2 where one of the two is zero.

    Raises:
      AssertionError: If the shapes differ or are not rank 2.

    Example:
      >>> predictions = jnp.array([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
      >>> byol_loss(predictions, jnp.array([[1.0, 0.0]] * 3)).tolist()
      [0.0, 2.0, 4.0]

    References:
      Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020, Eq. 2.
    """
    check_pair(predictions, targets)
    targets = normalize(jax.lax.stop_gradient(targets))
    return 2 - 2 * jnp.sum(normalize(predictions) * targets, axis=1)


def simsiam_loss(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    r"""The negative cosine between a prediction and its target.

    .. math:: \ell_i = -\cos(p_i, t_i)

    -1 for one direction, 0 for orthogonal ones, 1 for opposite ones.

    Args:
      predictions: From one view, float ``[batch, dim]``.
      targets: Projections of the other view, ``[batch, dim]``.  A constant: no gradient flows
        into it, without which all projections would become equal.

    Returns:
      One loss per image, ``[batch]``, in [-1, 1]; 0 where one of the two is zero.

    Raises:
      AssertionError: If the shapes differ or are not rank 2.

    Example:
      >>> predictions = jnp.array([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
      >>> simsiam_loss(predictions, jnp.array([[1.0, 0.0]] * 3)).tolist()
      [-1.0, -0.0, 1.0]

    References:
      Chen and He, "Exploring Simple Siamese Representation Learning", CVPR 2021, Eqs. 1 and 3.
    """
    check_pair(predictions, targets)
    targets = normalize(jax.lax.stop_gradient(targets))
    return -jnp.sum(normalize(predictions) * targets, axis=1)


@struct.dataclass
class BYOL(WithCopy):
    """A prediction of the momentum copy's projections: see `byol_loss` and `method.Method`.

    The loss is the sum of both directions.  Further attributes: those of `WithCopy`.

    Attributes:
      hidden: Width of the projector's hidden layer.
      predictor_hidden: Width of the predictor's hidden layer.
    """

    # Defaults: solo-learn, scripts/pretrain/cifar/byol.yaml.
    hidden: int = option(4096)
    predictor_hidden: int = option(4096)

    augmentations = ASYMMETRIC
    projector = MLP(())

    def loss(
        self, variables: Variables, encoder: Encoder, inputs: PretrainInputs
    ) -> tuple[jax.Array, MethodUpdate]:
        """Returns `byol_loss` per image of the global batch."""
        (_, predictions), update = self.forward(variables, encoder, inputs)
        targets, copy = self.targets(variables, encoder, inputs)
        losses = crossed(byol_loss, jnp.split(predictions, 2), targets)
        losses = parallel.gather(losses, inputs.axis_name)
        return losses, update.replace(state={"momentum": copy})


@struct.dataclass
class SimSiam(TwoViews):
    """A prediction of the other view's projection, held constant: see `simsiam_loss`.

    The loss is the mean of both directions.  Further attributes: those of `TwoViews`.

    Attributes:
      predictor_hidden: Width of the predictor's hidden layer, a bottleneck.
      projection_dim: Size of the projections and predictions.
    """

    # Defaults: solo-learn, scripts/pretrain/cifar/simsiam.yaml.
    predictor_hidden: int = option(512)
    projection_dim: int = option(2048)

    augmentations = SYMMETRIC_WEAK
    hidden_layers = 2
    projector = MLP((), output_norm="plain")

    def loss(
        self, variables: Variables, encoder: Encoder, inputs: PretrainInputs
    ) -> tuple[jax.Array, MethodUpdate]:
        """Returns `simsiam_loss` per image of the global batch."""
        (projections, predictions), update = self.forward(variables, encoder, inputs)
        targets = jnp.split(projections, 2)
        losses = crossed(simsiam_loss, jnp.split(predictions, 2), targets) / 2
        return parallel.gather(losses, inputs.axis_name), update

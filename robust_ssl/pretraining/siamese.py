"""One view predicts the other, with no negatives: BYOL (NeurIPS 2020), SimSiam (CVPR 2021)."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from robust_ssl import parallel, struct
from robust_ssl.pretraining.augmentation import ASYMMETRIC, SYMMETRIC_WEAK, random_views
from robust_ssl.pretraining.method import (
    MLP,
    MethodUpdate,
    PretrainInputs,
    apply_network,
    encode,
    init_networks,
    momentum_schedule,
    normalize,
)
from robust_ssl.pretraining.momentum_copy import apply_copy, init_copy, move_copy
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
    chex.assert_rank([predictions, targets], 2)
    chex.assert_equal_shape([predictions, targets])
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
    chex.assert_rank([predictions, targets], 2)
    chex.assert_equal_shape([predictions, targets])
    targets = normalize(jax.lax.stop_gradient(targets))
    return -jnp.sum(normalize(predictions) * targets, axis=1)


@struct.dataclass
class BYOL:
    """A prediction of the momentum copy's projections: see `byol_loss` and `method.Method`.

    The loss is the sum of both directions.

    Attributes:
      hidden: Width of the projector's hidden layer.
      predictor_hidden: Width of the predictor's hidden layer.
      projection_dim: Size of the projections and predictions.
      momentum: Of the copy, at the start.
      final_momentum: At the end.
      min_scale: Smallest share of the area that a view's crop keeps.
    """

    # Defaults: solo-learn, scripts/pretrain/cifar/byol.yaml.
    hidden: int = struct.field(pytree_node=False, default=4096)
    predictor_hidden: int = struct.field(pytree_node=False, default=4096)
    projection_dim: int = struct.field(pytree_node=False, default=256)
    momentum: float = struct.field(pytree_node=False, default=0.99)
    final_momentum: float = struct.field(pytree_node=False, default=1.0)
    min_scale: float = struct.field(pytree_node=False, default=0.08)

    @property
    def _projector(self) -> MLP:
        return MLP((self.hidden, self.projection_dim))

    @property
    def _predictor(self) -> MLP:
        return MLP((self.predictor_hidden, self.projection_dim))

    def init(self, key: jax.Array, encoder: Encoder, num_images: int) -> Variables:
        """Returns projector and predictor, and ``state["momentum"]``, the copy."""
        networks = {
            "projector": (self._projector, encoder.dim),
            "predictor": (self._predictor, self.projection_dim),
        }
        own = init_networks(key, networks)
        return {**own, "state": {"momentum": init_copy(encoder, own)}}

    def views(self, key: jax.Array, image: jax.Array) -> tuple[jax.Array, ...]:
        """Returns two random views of one image, ``[H, W, 3]`` each."""
        return random_views(key, image, ASYMMETRIC, min_scale=self.min_scale)

    def loss(
        self, variables: Variables, encoder: Encoder, inputs: PretrainInputs
    ) -> tuple[jax.Array, MethodUpdate]:
        """Returns `byol_loss` per image of the global batch."""
        axis_name = inputs.axis_name
        features, statistics = encode(encoder, inputs.views, axis_name)
        projections, variables = apply_network(
            self._projector, variables, "projector", jnp.concatenate(features), axis_name
        )
        predictions, variables = apply_network(
            self._predictor, variables, "predictor", projections, axis_name
        )
        first, second = jnp.split(predictions, 2)
        targets, copy = apply_copy(
            self._projector, variables["state"]["momentum"], encoder, inputs.views, axis_name
        )
        losses = byol_loss(first, targets[1]) + byol_loss(second, targets[0])
        losses = parallel.gather(losses, axis_name)
        return losses, MethodUpdate(statistics, variables["batch_stats"], {"momentum": copy})

    def after_update(
        self, variables: Variables, encoder: Encoder, progress: jax.Array
    ) -> Variables:
        """Returns the variables with the copy moved."""
        momentum = momentum_schedule(self.momentum, progress, self.final_momentum)
        return move_copy(variables, encoder, momentum)


@struct.dataclass
class SimSiam:
    """A prediction of one's own projections, held constant: see `simsiam_loss`, `method.Method`.

    The loss is the mean of both directions.

    Attributes:
      hidden: Width of the projector's two hidden layers.
      predictor_hidden: Width of the predictor's hidden layer, a bottleneck.
      projection_dim: Size of the projections and predictions.
      min_scale: Smallest share of the area that a view's crop keeps.
    """

    # Defaults: solo-learn, scripts/pretrain/cifar/simsiam.yaml.
    hidden: int = struct.field(pytree_node=False, default=2048)
    predictor_hidden: int = struct.field(pytree_node=False, default=512)
    projection_dim: int = struct.field(pytree_node=False, default=2048)
    min_scale: float = struct.field(pytree_node=False, default=0.08)

    @property
    def _projector(self) -> MLP:
        return MLP((self.hidden, self.hidden, self.projection_dim), output_norm="plain")

    @property
    def _predictor(self) -> MLP:
        return MLP((self.predictor_hidden, self.projection_dim))

    def init(self, key: jax.Array, encoder: Encoder, num_images: int) -> Variables:
        """Returns the method's own variables, those of projector and predictor."""
        networks = {
            "projector": (self._projector, encoder.dim),
            "predictor": (self._predictor, self.projection_dim),
        }
        return init_networks(key, networks)

    def views(self, key: jax.Array, image: jax.Array) -> tuple[jax.Array, ...]:
        """Returns two random views of one image, ``[H, W, 3]`` each."""
        return random_views(key, image, SYMMETRIC_WEAK, min_scale=self.min_scale)

    def loss(
        self, variables: Variables, encoder: Encoder, inputs: PretrainInputs
    ) -> tuple[jax.Array, MethodUpdate]:
        """Returns `simsiam_loss` per image of the global batch."""
        axis_name = inputs.axis_name
        features, statistics = encode(encoder, inputs.views, axis_name)
        projections, variables = apply_network(
            self._projector, variables, "projector", jnp.concatenate(features), axis_name
        )
        predictions, variables = apply_network(
            self._predictor, variables, "predictor", projections, axis_name
        )
        targets, (first, second) = jnp.split(projections, 2), jnp.split(predictions, 2)
        losses = (simsiam_loss(first, targets[1]) + simsiam_loss(second, targets[0])) / 2
        losses = parallel.gather(losses, axis_name)
        return losses, MethodUpdate(statistics, variables["batch_stats"])

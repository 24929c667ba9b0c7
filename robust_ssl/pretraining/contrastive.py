"""Contrast with labels and with neighbours: SupCon (NeurIPS 2020), NNCLR (ICCV 2021).

Also the queues of rows of earlier batches, which NNCLR, MoCo v2+ and ReSSL look things up in.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from robust_ssl import parallel, struct
from robust_ssl.pretraining.augmentation import ASYMMETRIC, SYMMETRIC, random_views
from robust_ssl.pretraining.method import (
    MLP,
    MethodUpdate,
    PretrainInputs,
    apply_network,
    encode,
    enqueue,
    init_networks,
    normalize,
)
from robust_ssl.types import Encoder, Variables

# --- Losses -----------------------------------------------------------------------------------


def supcon_loss(
    first: jax.Array, second: jax.Array, labels: jax.Array, *, temperature: float = 0.2
) -> jax.Array:
    r"""The supervised contrastive loss: all views of all images of a class agree.

    .. math:: \ell_i = -\frac{1}{|P(i)|} \sum_{p \in P(i)} \log
        \frac{\exp(\cos(z_i, z_p) / \tau)}{\sum_{k \ne i} \exp(\cos(z_i, z_k) / \tau)}

    where P(i) are the other projections with the label of i and k runs over all others of both
    views; averaged over an image's two views.  With n images it is ``log(2 n - 1)`` when all
    projections are equal; where no two images share a label it is `nt_xent`.  The mean over
    positives stands outside the logarithm, which the paper finds better than inside.

    Args:
      first: Projections of one view, float ``[batch, dim]``, of the global batch.
      second: Projections of the other view, ``[batch, dim]``.
      labels: Classes, int32 ``[batch]``.
      temperature: How sharply near negatives are pushed away; 0.2 is solo-learn's on CIFAR.

    Returns:
      One loss per image, ``[batch]``, at least 0.

    Raises:
      AssertionError: If the shapes differ or are not rank 2, or `labels` are not ``[batch]``.

    Example:
      >>> losses = supcon_loss(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.array([0, 0]))
      >>> losses.shape, round(float(losses[0]), 4)  # log 3
      ((2,), 1.0986)

    References:
      Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, Eq. 2.
    """
    chex.assert_rank([first, second, labels], [2, 2, 1])
    chex.assert_equal_shape([first, second])
    chex.assert_equal_shape_prefix([first, labels], 1)
    n = first.shape[0]
    both = normalize(jnp.concatenate([first, second]))
    classes = jnp.concatenate([labels, labels])
    others = ~jnp.eye(2 * n, dtype=bool)
    similarity = jnp.where(others, both @ both.T / temperature, -jnp.inf)
    log_shares = similarity - jax.nn.logsumexp(similarity, axis=1, keepdims=True)
    positives = others & (classes.reshape(-1, 1) == classes.reshape(1, -1))
    total = jnp.sum(jnp.where(positives, log_shares, 0.0), axis=1)
    losses = -total / jnp.sum(positives, axis=1)  # an image's other view is always there
    return (losses[:n] + losses[n:]) / 2


def nnclr_loss(
    neighbours: jax.Array, predictions: jax.Array, *, temperature: float = 0.2
) -> jax.Array:
    r"""Picks out, by an image's neighbour, the prediction of its other view among all images'.

    .. math:: \ell_i = -\log \frac{\exp(\cos(q_i, p_i) / \tau)}
                                  {\sum_k \exp(\cos(q_i, p_k) / \tau)}

    With n images it is ``log(n)`` when all predictions are equal.

    Args:
      neighbours: Of one view's projections, float ``[batch, dim]``, see `nearest`.
      predictions: Of the other view, ``[batch, dim]``, of the global batch.
      temperature: How sharply near negatives are pushed away; 0.2 is solo-learn's on CIFAR.

    Returns:
      One loss per image, ``[batch]``, at least 0.

    Raises:
      AssertionError: If the shapes differ or are not rank 2.

    Example:
      >>> losses = nnclr_loss(jnp.ones((2, 3)), jnp.ones((2, 3)))
      >>> losses.shape, round(float(losses[0]), 4)  # log 2
      ((2,), 0.6931)

    References:
      Dwibedi et al., "With a Little Help from My Friends", ICCV 2021, Eq. 3.
    """
    chex.assert_rank([neighbours, predictions], 2)
    chex.assert_equal_shape([neighbours, predictions])
    logits = normalize(neighbours) @ normalize(predictions).T / temperature
    return jax.nn.logsumexp(logits, axis=1) - jnp.diagonal(logits)


# --- Queues -----------------------------------------------------------------------------------


def random_queue(key: jax.Array, size: int, dim: int) -> jax.Array:
    """Returns random directions, float ``[size, dim]``: what a queue starts with.

    Example:
      >>> queue = random_queue(jax.random.key(0), 4, 2)
      >>> queue.shape, bool(jnp.allclose(jnp.linalg.norm(queue, axis=1), 1.0))
      ((4, 2), True)
    """
    return normalize(jax.random.normal(key, (size, dim)))


def nearest(projections: jax.Array, queue: jax.Array) -> jax.Array:
    """Finds each projection's nearest row of a queue by direction; a constant.

    Args:
      projections: Float ``[batch, dim]``.
      queue: Rows of length 1, ``[queue size, dim]``.

    Returns:
      Rows of the queue, ``[batch, dim]``, without gradient.

    Raises:
      AssertionError: If the arrays are not rank 2.

    Example:
      >>> nearest(jnp.array([[3.0, 1.0]]), jnp.eye(2)).tolist()
      [[1.0, 0.0]]

    References:
      Dwibedi et al., ICCV 2021, Eq. 4: the same row, since all rows have one length.
    """
    chex.assert_rank([projections, queue], 2)
    return jax.lax.stop_gradient(queue[jnp.argmax(projections @ queue.T, axis=1)])


# --- Methods ----------------------------------------------------------------------------------


@struct.dataclass
class SupCon:
    """SimCLR with labels: see `supcon_loss` and `robust_ssl.pretraining.method.Method`.

    Attributes:
      temperature: Of `supcon_loss`.
      hidden: Width of the projector's hidden layer.
      projection_dim: Size of the projections.
      min_scale: Smallest share of the area that a view's crop keeps.
    """

    # Defaults: solo-learn, scripts/pretrain/cifar/supcon.yaml.
    temperature: float = struct.field(pytree_node=False, default=0.2)
    hidden: int = struct.field(pytree_node=False, default=2048)
    projection_dim: int = struct.field(pytree_node=False, default=256)
    min_scale: float = struct.field(pytree_node=False, default=0.08)

    needs_labels = True

    @property
    def _projector(self) -> MLP:
        return MLP((self.hidden, self.projection_dim), batch_norm=False)

    def init(self, key: jax.Array, encoder: Encoder, num_images: int) -> Variables:
        """Returns the method's own variables, ``{"params": {"projector": ...}, ...}``."""
        return init_networks(key, {"projector": (self._projector, encoder.dim)})

    def views(self, key: jax.Array, image: jax.Array) -> tuple[jax.Array, ...]:
        """Returns two random views of one image, ``[H, W, 3]`` each."""
        return random_views(key, image, SYMMETRIC, min_scale=self.min_scale)

    def loss(
        self, variables: Variables, encoder: Encoder, inputs: PretrainInputs
    ) -> tuple[jax.Array, MethodUpdate]:
        """Returns `supcon_loss` per image of the global batch."""
        features, statistics = encode(encoder, inputs.views, inputs.axis_name)
        both, _ = apply_network(
            self._projector, variables, "projector", jnp.concatenate(features), inputs.axis_name
        )
        first, second, labels = parallel.gather(
            (*jnp.split(both, 2), inputs.labels), inputs.axis_name
        )
        losses = supcon_loss(first, second, labels, temperature=self.temperature)
        return losses, MethodUpdate(statistics)


@struct.dataclass
class NNCLR:
    """Nearest neighbours as positives: see `nnclr_loss` and `pretraining.method.Method`.

    The neighbours come from a queue of the first view's projections of earlier batches.  The loss
    is the mean of both directions.

    Attributes:
      temperature: Of `nnclr_loss`.
      hidden: Width of the projector's two hidden layers.
      predictor_hidden: Width of the predictor's hidden layer.
      projection_dim: Size of the projections and predictions.
      queue_size: Rows among which a neighbour is looked for; at least one batch.
      min_scale: Smallest share of the area that a view's crop keeps.
    """

    # Defaults: solo-learn, scripts/pretrain/cifar/nnclr.yaml.
    temperature: float = struct.field(pytree_node=False, default=0.2)
    hidden: int = struct.field(pytree_node=False, default=2048)
    predictor_hidden: int = struct.field(pytree_node=False, default=4096)
    projection_dim: int = struct.field(pytree_node=False, default=256)
    queue_size: int = struct.field(pytree_node=False, default=65536)
    min_scale: float = struct.field(pytree_node=False, default=0.08)

    @property
    def _projector(self) -> MLP:
        return MLP((self.hidden, self.hidden, self.projection_dim), output_norm="affine")

    @property
    def _predictor(self) -> MLP:
        return MLP((self.predictor_hidden, self.projection_dim))

    def init(self, key: jax.Array, encoder: Encoder, num_images: int) -> Variables:
        """Returns projector and predictor, and ``state["queue"]`` of random directions."""
        network_key, queue_key = jax.random.split(key)
        networks = {
            "projector": (self._projector, encoder.dim),
            "predictor": (self._predictor, self.projection_dim),
        }
        queue = random_queue(queue_key, self.queue_size, self.projection_dim)
        return {**init_networks(network_key, networks), "state": {"queue": queue}}

    def views(self, key: jax.Array, image: jax.Array) -> tuple[jax.Array, ...]:
        """Returns two random views of one image, ``[H, W, 3]`` each."""
        return random_views(key, image, ASYMMETRIC, min_scale=self.min_scale)

    def loss(
        self, variables: Variables, encoder: Encoder, inputs: PretrainInputs
    ) -> tuple[jax.Array, MethodUpdate]:
        """Returns `nnclr_loss` per image of the global batch."""
        axis_name, queue = inputs.axis_name, variables["state"]["queue"]
        features, statistics = encode(encoder, inputs.views, axis_name)
        projections, variables = apply_network(
            self._projector, variables, "projector", jnp.concatenate(features), axis_name
        )
        predictions, variables = apply_network(
            self._predictor, variables, "predictor", projections, axis_name
        )
        # Looked up before gathering: each device searches the queue for its own images only.
        neighbours = nearest(projections, queue)
        parts = [*jnp.split(neighbours, 2), *jnp.split(predictions, 2)]
        newest = normalize(jnp.split(projections, 2)[0])
        *parts, newest = parallel.gather((*parts, newest), axis_name)
        losses = (
            nnclr_loss(parts[0], parts[3], temperature=self.temperature)
            + nnclr_loss(parts[1], parts[2], temperature=self.temperature)
        ) / 2
        state = {"queue": enqueue(queue, newest)}
        return losses, MethodUpdate(statistics, variables["batch_stats"], state)

"""Contrast with labels and with neighbours: SupCon (NeurIPS 2020), NNCLR (ICCV 2021).

Also the queues of rows of earlier batches, which NNCLR, MoCo v2+ and ReSSL look things up in.
"""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp

from robust_ssl import parallel, struct
from robust_ssl.pretraining.augmentation import ASYMMETRIC
from robust_ssl.pretraining.method import (
    MLP,
    MethodUpdate,
    PretrainInputs,
    check_pair,
    enqueue,
    normalize,
    option,
)
from robust_ssl.pretraining.two_views import TwoViews, crossed
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
    check_pair(neighbours, predictions)
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
class SupCon(TwoViews):
    """SimCLR with labels: see `supcon_loss`, `robust_ssl.pretraining.method.Method`, `TwoViews`.

    Attributes:
      temperature: Of `supcon_loss`.
    """

    # Defaults, those of `TwoViews` too: solo-learn, scripts/pretrain/cifar/supcon.yaml.
    temperature: float = option(0.2)

    needs_labels = True

    def loss(
        self, variables: Variables, encoder: Encoder, inputs: PretrainInputs
    ) -> tuple[jax.Array, MethodUpdate]:
        """Returns `supcon_loss` per image of the global batch."""
        first, second, update = self.projections(variables, encoder, inputs)
        labels = parallel.gather(inputs.labels, inputs.axis_name)
        return supcon_loss(first, second, labels, temperature=self.temperature), update


@struct.dataclass
class NNCLR(TwoViews):
    """Nearest neighbours as positives: see `nnclr_loss` and `pretraining.method.Method`.

    The neighbours come from a queue of the first view's projections of earlier batches.  The loss
    is the mean of both directions.  Further attributes: those of `TwoViews`.

    Attributes:
      temperature: Of `nnclr_loss`.
      predictor_hidden: Width of the predictor's hidden layer.
      queue_size: Rows among which a neighbour is looked for; at least one batch.
    """

    # Defaults: solo-learn, scripts/pretrain/cifar/nnclr.yaml.
    temperature: float = option(0.2)
    predictor_hidden: int = option(4096)
    queue_size: int = option(65536)

    augmentations = ASYMMETRIC
    hidden_layers = 2
    projector = MLP((), output_norm="affine")

    def init(self, key: jax.Array, encoder: Encoder, num_images: int) -> Variables:
        """Returns projector and predictor, and ``state["queue"]`` of random directions."""
        network_key, queue_key = jax.random.split(key)
        queue = random_queue(queue_key, self.queue_size, self.projection_dim)
        networks = super().init(network_key, encoder, num_images)
        return {**networks, "state": {"queue": queue}}

    def loss(
        self, variables: Variables, encoder: Encoder, inputs: PretrainInputs
    ) -> tuple[jax.Array, MethodUpdate]:
        """Returns `nnclr_loss` per image of the global batch."""
        queue = variables["state"]["queue"]
        (projections, predictions), update = self.forward(variables, encoder, inputs)
        # Looked up before gathering: each device searches the queue for its own images only.
        neighbours = jnp.split(nearest(projections, queue), 2)
        newest = normalize(jnp.split(projections, 2)[0])
        neighbours, predictions, newest = parallel.gather(
            (neighbours, jnp.split(predictions, 2), newest), inputs.axis_name
        )
        loss = functools.partial(nnclr_loss, temperature=self.temperature)
        losses = crossed(loss, neighbours, predictions) / 2
        return losses, update.replace(state={"queue": enqueue(queue, newest)})

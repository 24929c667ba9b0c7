"""Momentum contrast and relations: MoCo v2+ (2020), MoCo v3 (ICCV 2021), ReSSL (NeurIPS 2021)."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from robust_ssl import parallel, struct
from robust_ssl.pretraining.augmentation import (
    ASYMMETRIC,
    STRONG_AND_WEAK,
    SYMMETRIC_WEAK,
    random_views,
)
from robust_ssl.pretraining.contrastive import random_queue
from robust_ssl.pretraining.method import (
    MLP,
    MethodUpdate,
    PretrainInputs,
    apply_network,
    encode,
    enqueue,
    init_networks,
    momentum_schedule,
    normalize,
)
from robust_ssl.pretraining.momentum_copy import apply_copy, init_copy, move_copy
from robust_ssl.types import Encoder, Variables

# --- Losses -----------------------------------------------------------------------------------


def moco_v2_loss(
    queries: jax.Array, keys: jax.Array, queue: jax.Array, *, temperature: float = 0.2
) -> jax.Array:
    r"""Picks out an image's key among the keys of earlier batches.

    .. math:: \ell_i = -\log \frac{\exp(\cos(q_i, k_i) / \tau)}
        {\exp(\cos(q_i, k_i) / \tau) + \sum_j \exp(\cos(q_i, m_j) / \tau)}

    With K rows in the queue it is ``log(K + 1)`` when the key and all of them are equal.

    Args:
      queries: Projections of one view by the trained encoder, float ``[batch, dim]``.
      keys: Of the other view by its momentum copy, ``[batch, dim]``.  A constant: no gradient
        flows into it.
      queue: Earlier keys, rows of length 1, ``[queue size, dim]``.  A constant.
      temperature: How sharply near negatives are pushed away; 0.2 is solo-learn's on CIFAR.

    Returns:
      One loss per image, ``[batch]``, at least 0.

    Raises:
      AssertionError: If the shapes differ or are not rank 2.

    Example:
      >>> ones = jnp.ones((2, 4))
      >>> losses = moco_v2_loss(ones, ones, jnp.full((3, 4), 0.5))
      >>> losses.shape, round(float(losses[0]), 4)  # log 4
      ((2,), 1.3863)

    References:
      He et al., "Momentum Contrast", CVPR 2020, Eq. 1; symmetric, which is the "+", in Chen and
      He, "Exploring Simple Siamese Representation Learning", CVPR 2021, Table 4.
    """
    chex.assert_rank([queries, keys, queue], 2)
    chex.assert_equal_shape([queries, keys])
    queries, keys = normalize(queries), normalize(jax.lax.stop_gradient(keys))
    positive = jnp.sum(queries * keys, axis=1, keepdims=True)
    negatives = queries @ jax.lax.stop_gradient(queue).T
    logits = jnp.concatenate([positive, negatives], axis=1) / temperature
    return jax.nn.logsumexp(logits, axis=1) - logits[:, 0]


def moco_v3_loss(queries: jax.Array, keys: jax.Array, *, temperature: float = 0.2) -> jax.Array:
    r"""Picks out an image's key among the keys of its batch.

    .. math:: \ell_i = -2 \tau \log \frac{\exp(\cos(q_i, k_i) / \tau)}
                                         {\sum_j \exp(\cos(q_i, k_j) / \tau)}

    The factor makes the gradient's size independent of the temperature.  With n images it is
    ``2 temperature log(n)`` when all keys are equal.

    Args:
      queries: Predictions from one view, float ``[batch, dim]``.
      keys: Projections of the other view by the momentum copy, ``[batch, dim]``, of the global
        batch.  A constant: no gradient flows into it.
      temperature: How sharply near negatives are pushed away; 0.2 is solo-learn's on CIFAR.

    Returns:
      One loss per image, ``[batch]``, at least 0.

    Raises:
      AssertionError: If the shapes differ or are not rank 2.

    Example:
      >>> losses = moco_v3_loss(jnp.ones((2, 3)), jnp.ones((2, 3)), temperature=0.5)
      >>> losses.shape, round(float(losses[0]), 4)  # log 2
      ((2,), 0.6931)

    References:
      Chen et al., "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV
      2021, Eq. 1 and Algorithm 1.
    """
    chex.assert_rank([queries, keys], 2)
    chex.assert_equal_shape([queries, keys])
    logits = normalize(queries) @ normalize(jax.lax.stop_gradient(keys)).T / temperature
    return 2 * temperature * (jax.nn.logsumexp(logits, axis=1) - jnp.diagonal(logits))


def ressl_loss(
    queries: jax.Array,
    keys: jax.Array,
    queue: jax.Array,
    *,
    temperature: float = 0.1,
    key_temperature: float = 0.04,
) -> jax.Array:
    r"""The cross-entropy between two views' relations to earlier images.

    .. math:: \ell_i = -\sum_j p_j(k_i; \tau_k) \log p_j(q_i; \tau), \qquad
              p_j(z; \tau) = \frac{\exp(\cos(z, m_j) / \tau)}{\sum_l \exp(\cos(z, m_l) / \tau)}

    No image is a negative: the strong view is to be as far from each earlier image as the weak
    view is.  With K equal rows in the queue it is ``log(K)``.

    Args:
      queries: Projections of the strong view by the trained encoder, float ``[batch, dim]``.
      keys: Of the weak view by its momentum copy, ``[batch, dim]``.  A constant: no gradient
        flows into it.
      queue: Earlier keys, rows of length 1, ``[queue size, dim]``.  A constant.
      temperature: Of the queries' relations; 0.1 is the paper's.
      key_temperature: Of the keys'; lower, so that the target is sharper; 0.04 is the paper's.

    Returns:
      One loss per image, ``[batch]``, at least the entropy of the keys' relation.

    Raises:
      AssertionError: If the shapes differ or are not rank 2.

    Example:
      >>> ones = jnp.ones((2, 4))
      >>> losses = ressl_loss(ones, ones, jnp.full((3, 4), 0.5))
      >>> losses.shape, round(float(losses[0]), 4)  # log 3
      ((2,), 1.0986)

    References:
      Zheng et al., "ReSSL: Relational Self-Supervised Learning with Weak Augmentation", NeurIPS
      2021, Sec. 3.2.
    """
    chex.assert_rank([queries, keys, queue], 2)
    chex.assert_equal_shape([queries, keys])
    keys, queue = jax.lax.stop_gradient((keys, queue))
    targets = jax.nn.softmax(normalize(keys) @ queue.T / key_temperature, axis=1)
    log_shares = jax.nn.log_softmax(normalize(queries) @ queue.T / temperature, axis=1)
    return -jnp.sum(targets * log_shares, axis=1)


# --- Methods ----------------------------------------------------------------------------------


@struct.dataclass
class MoCoV2Plus:
    """Momentum contrast with a queue for each view: see `moco_v2_loss` and `method.Method`.

    The loss is the mean of both directions.  Batch statistics are those of the global batch, so
    keys need not be shuffled over the devices.

    Attributes:
      temperature: Of `moco_v2_loss`.
      hidden: Width of the projector's hidden layer.
      projection_dim: Size of the projections.
      queue_size: Keys that each view is compared with; at least one batch.
      momentum: Of the copy, at the start.
      final_momentum: At the end.
      min_scale: Smallest share of the area that a view's crop keeps.
    """

    # Defaults: solo-learn, scripts/pretrain/cifar/mocov2plus.yaml.
    temperature: float = struct.field(pytree_node=False, default=0.2)
    hidden: int = struct.field(pytree_node=False, default=2048)
    projection_dim: int = struct.field(pytree_node=False, default=256)
    queue_size: int = struct.field(pytree_node=False, default=32768)
    momentum: float = struct.field(pytree_node=False, default=0.99)
    final_momentum: float = struct.field(pytree_node=False, default=0.999)
    min_scale: float = struct.field(pytree_node=False, default=0.08)

    @property
    def _projector(self) -> MLP:
        return MLP((self.hidden, self.projection_dim), batch_norm=False)

    def init(self, key: jax.Array, encoder: Encoder, num_images: int) -> Variables:
        """Returns the projector, and in ``state`` the copy and a queue for each view."""
        network_key, *queue_keys = jax.random.split(key, 3)
        own = init_networks(network_key, {"projector": (self._projector, encoder.dim)})
        queues = [random_queue(key, self.queue_size, self.projection_dim) for key in queue_keys]
        return {
            **own,
            "state": {
                "momentum": init_copy(encoder, own),
                "queues": {"first": queues[0], "second": queues[1]},
            },
        }

    def views(self, key: jax.Array, image: jax.Array) -> tuple[jax.Array, ...]:
        """Returns two random views of one image, ``[H, W, 3]`` each."""
        return random_views(key, image, SYMMETRIC_WEAK, min_scale=self.min_scale)

    def loss(
        self, variables: Variables, encoder: Encoder, inputs: PretrainInputs
    ) -> tuple[jax.Array, MethodUpdate]:
        """Returns `moco_v2_loss` per image of the global batch."""
        axis_name, queues = inputs.axis_name, variables["state"]["queues"]
        features, statistics = encode(encoder, inputs.views, axis_name)
        queries, variables = apply_network(
            self._projector, variables, "projector", jnp.concatenate(features), axis_name
        )
        first, second = jnp.split(queries, 2)
        keys, copy = apply_copy(
            self._projector, variables["state"]["momentum"], encoder, inputs.views, axis_name
        )
        # Each device compares its own images with the queues; only losses and keys travel.
        losses = (
            moco_v2_loss(first, keys[1], queues["second"], temperature=self.temperature)
            + moco_v2_loss(second, keys[0], queues["first"], temperature=self.temperature)
        ) / 2
        losses, keys = parallel.gather((losses, [normalize(k) for k in keys]), axis_name)
        queues = {
            "first": enqueue(queues["first"], keys[0]),
            "second": enqueue(queues["second"], keys[1]),
        }
        state = {"momentum": copy, "queues": queues}
        return losses, MethodUpdate(statistics, variables["batch_stats"], state)

    def after_update(
        self, variables: Variables, encoder: Encoder, progress: jax.Array
    ) -> Variables:
        """Returns the variables with the copy moved."""
        momentum = momentum_schedule(self.momentum, progress, self.final_momentum)
        return move_copy(variables, encoder, momentum)


@struct.dataclass
class MoCoV3:
    """Momentum contrast within the batch, with a predictor: see `moco_v3_loss`, `method.Method`.

    The loss is the sum of both directions.  Projector and predictor are those for residual
    networks; the paper's frozen patch embedding of vision transformers is left to the optimizer.

    Attributes:
      temperature: Of `moco_v3_loss`.
      hidden: Width of the projector's hidden layer.
      predictor_hidden: Width of the predictor's hidden layer.
      projection_dim: Size of the projections and predictions.
      momentum: Of the copy, at the start.
      final_momentum: At the end.
      min_scale: Smallest share of the area that a view's crop keeps.
    """

    # Defaults: solo-learn, scripts/pretrain/cifar/mocov3.yaml.
    temperature: float = struct.field(pytree_node=False, default=0.2)
    hidden: int = struct.field(pytree_node=False, default=4096)
    predictor_hidden: int = struct.field(pytree_node=False, default=4096)
    projection_dim: int = struct.field(pytree_node=False, default=256)
    momentum: float = struct.field(pytree_node=False, default=0.99)
    final_momentum: float = struct.field(pytree_node=False, default=1.0)
    min_scale: float = struct.field(pytree_node=False, default=0.08)

    @property
    def _projector(self) -> MLP:
        return MLP((self.hidden, self.projection_dim), output_norm="plain")

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
        """Returns `moco_v3_loss` per image of the global batch."""
        axis_name = inputs.axis_name
        features, statistics = encode(encoder, inputs.views, axis_name)
        projections, variables = apply_network(
            self._projector, variables, "projector", jnp.concatenate(features), axis_name
        )
        queries, variables = apply_network(
            self._predictor, variables, "predictor", projections, axis_name
        )
        keys, copy = apply_copy(
            self._projector, variables["state"]["momentum"], encoder, inputs.views, axis_name
        )
        (first, second), keys = parallel.gather((jnp.split(queries, 2), keys), axis_name)
        losses = moco_v3_loss(first, keys[1], temperature=self.temperature) + moco_v3_loss(
            second, keys[0], temperature=self.temperature
        )
        return losses, MethodUpdate(statistics, variables["batch_stats"], {"momentum": copy})

    def after_update(
        self, variables: Variables, encoder: Encoder, progress: jax.Array
    ) -> Variables:
        """Returns the variables with the copy moved."""
        momentum = momentum_schedule(self.momentum, progress, self.final_momentum)
        return move_copy(variables, encoder, momentum)


@struct.dataclass
class ReSSL:
    """A strong view learns a weak view's relations: see `ressl_loss` and `method.Method`.

    The trained encoder sees the strong view only, its momentum copy the weak one only.

    Attributes:
      temperature: Of the strong view's relations.
      key_temperature: Of the weak view's.
      hidden: Width of the projector's hidden layer.
      projection_dim: Size of the projections.
      queue_size: Earlier keys that relations are to; at least one batch.
      momentum: Of the copy, at the start.
      final_momentum: At the end.
      min_scale: Smallest share of the area that a view's crop keeps.
    """

    # Defaults: solo-learn, scripts/pretrain/cifar/ressl.yaml; it takes queue_size from
    # solo/methods/ressl.py.
    temperature: float = struct.field(pytree_node=False, default=0.1)
    key_temperature: float = struct.field(pytree_node=False, default=0.04)
    hidden: int = struct.field(pytree_node=False, default=4096)
    projection_dim: int = struct.field(pytree_node=False, default=256)
    queue_size: int = struct.field(pytree_node=False, default=65536)
    momentum: float = struct.field(pytree_node=False, default=0.99)
    final_momentum: float = struct.field(pytree_node=False, default=1.0)
    min_scale: float = struct.field(pytree_node=False, default=0.08)

    @property
    def _projector(self) -> MLP:
        return MLP((self.hidden, self.projection_dim), batch_norm=False)

    def init(self, key: jax.Array, encoder: Encoder, num_images: int) -> Variables:
        """Returns the projector, and in ``state`` the copy and the queue."""
        network_key, queue_key = jax.random.split(key)
        own = init_networks(network_key, {"projector": (self._projector, encoder.dim)})
        queue = random_queue(queue_key, self.queue_size, self.projection_dim)
        return {**own, "state": {"momentum": init_copy(encoder, own), "queue": queue}}

    def views(self, key: jax.Array, image: jax.Array) -> tuple[jax.Array, ...]:
        """Returns a strong and a weak random view of one image, ``[H, W, 3]`` each."""
        return random_views(key, image, STRONG_AND_WEAK, min_scale=self.min_scale)

    def loss(
        self, variables: Variables, encoder: Encoder, inputs: PretrainInputs
    ) -> tuple[jax.Array, MethodUpdate]:
        """Returns `ressl_loss` per image of the global batch."""
        axis_name, queue = inputs.axis_name, variables["state"]["queue"]
        strong, weak = inputs.views
        (features,), statistics = encode(encoder, [strong], axis_name)
        queries, variables = apply_network(
            self._projector, variables, "projector", features, axis_name
        )
        (keys,), copy = apply_copy(
            self._projector, variables["state"]["momentum"], encoder, [weak], axis_name
        )
        # Each device compares its own images with the queue; only losses and keys travel.
        losses = ressl_loss(
            queries,
            keys,
            queue,
            temperature=self.temperature,
            key_temperature=self.key_temperature,
        )
        losses, keys = parallel.gather((losses, normalize(keys)), axis_name)
        state = {"momentum": copy, "queue": enqueue(queue, keys)}
        return losses, MethodUpdate(statistics, variables["batch_stats"], state)

    def after_update(
        self, variables: Variables, encoder: Encoder, progress: jax.Array
    ) -> Variables:
        """Returns the variables with the copy moved."""
        momentum = momentum_schedule(self.momentum, progress, self.final_momentum)
        return move_copy(variables, encoder, momentum)

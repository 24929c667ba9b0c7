"""Momentum contrast and relations: MoCo v2+ (2020), MoCo v3 (ICCV 2021), ReSSL (NeurIPS 2021)."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp

from robust_ssl import parallel, struct
from robust_ssl.pretraining.augmentation import ASYMMETRIC, STRONG_AND_WEAK, SYMMETRIC_WEAK
from robust_ssl.pretraining.contrastive import random_queue
from robust_ssl.pretraining.method import (
    MLP,
    MethodUpdate,
    PretrainInputs,
    check_pair,
    enqueue,
    normalize,
    option,
)
from robust_ssl.pretraining.momentum_copy import WithCopy
from robust_ssl.pretraining.two_views import crossed
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
    check_pair(queries, keys)
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
class MoCoV2Plus(WithCopy):
    """Momentum contrast with a queue for each view: see `moco_v2_loss` and `method.Method`.

    The loss is the mean of both directions.  Batch statistics are those of the global batch, so
    keys need not be shuffled over the devices.  Further attributes: those of `WithCopy`.

    Attributes:
      temperature: Of `moco_v2_loss`.
      queue_size: Keys that each view is compared with; at least one batch.
      final_momentum: Of the copy, at the end.
    """

    # Defaults: solo-learn, scripts/pretrain/cifar/mocov2plus.yaml.
    temperature: float = option(0.2)
    queue_size: int = option(32768)
    final_momentum: float = option(0.999)

    augmentations = SYMMETRIC_WEAK

    def init(self, key: jax.Array, encoder: Encoder, num_images: int) -> Variables:
        """Returns the projector, and in ``state`` the copy and a queue for each view."""
        network_key, *queue_keys = jax.random.split(key, 3)
        variables = super().init(network_key, encoder, num_images)
        queues = [random_queue(key, self.queue_size, self.projection_dim) for key in queue_keys]
        queues = dict(zip(("first", "second"), queues, strict=True))
        return {**variables, "state": {**variables["state"], "queues": queues}}

    def loss(
        self, variables: Variables, encoder: Encoder, inputs: PretrainInputs
    ) -> tuple[jax.Array, MethodUpdate]:
        """Returns `moco_v2_loss` per image of the global batch."""
        queues = variables["state"]["queues"]
        (queries,), update = self.forward(variables, encoder, inputs)
        first, second = jnp.split(queries, 2)
        keys, copy = self.targets(variables, encoder, inputs)
        # Each device compares its own images with the queues; only losses and keys travel.
        losses = (
            moco_v2_loss(first, keys[1], queues["second"], temperature=self.temperature)
            + moco_v2_loss(second, keys[0], queues["first"], temperature=self.temperature)
        ) / 2
        keys = [normalize(view) for view in keys]
        losses, keys = parallel.gather((losses, keys), inputs.axis_name)
        queues = {
            "first": enqueue(queues["first"], keys[0]),
            "second": enqueue(queues["second"], keys[1]),
        }
        return losses, update.replace(state={"momentum": copy, "queues": queues})


@struct.dataclass
class MoCoV3(WithCopy):
    """Momentum contrast within the batch, with a predictor: see `moco_v3_loss`, `method.Method`.

    The loss is the sum of both directions.  Projector and predictor are those for residual
    networks; the paper's frozen patch embedding of vision transformers is left to the optimizer.
    Further attributes: those of `WithCopy`.

    Attributes:
      temperature: Of `moco_v3_loss`.
      hidden: Width of the projector's hidden layer.
      predictor_hidden: Width of the predictor's hidden layer.
    """

    # Defaults: solo-learn, scripts/pretrain/cifar/mocov3.yaml.
    temperature: float = option(0.2)
    hidden: int = option(4096)
    predictor_hidden: int = option(4096)

    augmentations = ASYMMETRIC
    projector = MLP((), output_norm="plain")

    def loss(
        self, variables: Variables, encoder: Encoder, inputs: PretrainInputs
    ) -> tuple[jax.Array, MethodUpdate]:
        """Returns `moco_v3_loss` per image of the global batch."""
        (_, queries), update = self.forward(variables, encoder, inputs)
        keys, copy = self.targets(variables, encoder, inputs)
        # The keys of all images are negatives, so both travel before they are compared.
        queries, keys = parallel.gather((jnp.split(queries, 2), keys), inputs.axis_name)
        loss = functools.partial(moco_v3_loss, temperature=self.temperature)
        return crossed(loss, queries, keys), update.replace(state={"momentum": copy})


@struct.dataclass
class ReSSL(WithCopy):
    """A strong view learns a weak view's relations: see `ressl_loss` and `method.Method`.

    The trained encoder sees the strong view only, its momentum copy the weak one only.  Further
    attributes: those of `WithCopy`.

    Attributes:
      temperature: Of the strong view's relations.
      key_temperature: Of the weak view's.
      hidden: Width of the projector's hidden layer.
      queue_size: Earlier keys that relations are to; at least one batch.
    """

    # Defaults: solo-learn, scripts/pretrain/cifar/ressl.yaml; it takes queue_size from
    # solo/methods/ressl.py.
    temperature: float = option(0.1)
    key_temperature: float = option(0.04)
    hidden: int = option(4096)
    queue_size: int = option(65536)

    augmentations = STRONG_AND_WEAK

    def init(self, key: jax.Array, encoder: Encoder, num_images: int) -> Variables:
        """Returns the projector, and in ``state`` the copy and the queue."""
        network_key, queue_key = jax.random.split(key)
        variables = super().init(network_key, encoder, num_images)
        queue = random_queue(queue_key, self.queue_size, self.projection_dim)
        return {**variables, "state": {**variables["state"], "queue": queue}}

    def loss(
        self, variables: Variables, encoder: Encoder, inputs: PretrainInputs
    ) -> tuple[jax.Array, MethodUpdate]:
        """Returns `ressl_loss` per image of the global batch."""
        strong, weak = inputs.views
        queue = variables["state"]["queue"]
        (queries,), update = self.forward(variables, encoder, inputs, (strong,))
        (keys,), copy = self.targets(variables, encoder, inputs, (weak,))
        # Each device compares its own images with the queue; only losses and keys travel.
        losses = ressl_loss(
            queries,
            keys,
            queue,
            temperature=self.temperature,
            key_temperature=self.key_temperature,
        )
        losses, keys = parallel.gather((losses, normalize(keys)), inputs.axis_name)
        return losses, update.replace(state={"momentum": copy, "queue": enqueue(queue, keys)})

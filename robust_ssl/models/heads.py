"""Heads: what a downstream team puts on an encoder's features."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from robust_ssl.types import Classifier, Encoder


class LinearHead(nn.Module):
    """One dense layer."""

    num_classes: int

    @nn.compact
    def __call__(self, features: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns logits, float32 ``[batch, num_classes]``."""
        del train
        return nn.Dense(self.num_classes, name="linear")(features)


class MLPHead(nn.Module):
    """Gen-AF's head: dense, ReLU, dropout, dense, ReLU, dense.

    Attributes:
      num_classes: Number of logits.
      hidden: Width of both hidden layers.
      dropout: Share of the first hidden layer that is dropped in training.
    """

    num_classes: int
    hidden: int = 512  # Zhou et al., S&P 2024, released code
    dropout: float = 0.2  # the same

    @nn.compact
    def __call__(self, features: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns logits, float32 ``[batch, num_classes]``."""
        x = nn.relu(nn.Dense(self.hidden, name="dense1")(features))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = nn.relu(nn.Dense(self.hidden, name="dense2")(x))
        return nn.Dense(self.num_classes, name="output")(x)


HEADS = {"linear": LinearHead, "mlp": MLPHead}


def classifier(
    key: jax.Array, encoder: Encoder, num_classes: int, *, head: str | nn.Module = "mlp"
) -> Classifier:
    """Puts a fresh head on an encoder.

    Args:
      key: Random key of the head's initialization.
      encoder: The feature extractor; its weights are not touched.
      num_classes: Number of logits, at least 2.
      head: ``"linear"``, ``"mlp"`` (Gen-AF's 512-512-classes) or a linen module that maps
        ``(features, train=...)`` to logits.

    Returns:
      A `Classifier`.

    Raises:
      ValueError: If there are fewer than two classes or the head's name is not known.

    Example:
      >>> from robust_ssl import models
      >>> encoder = models.resnet18(jax.random.key(0), width=8, image_size=16)
      >>> net = classifier(jax.random.key(1), encoder, 3, head="linear")
      >>> net(jnp.zeros((2, 16, 16, 3))).logits.shape
      (2, 3)
    """
    if num_classes < 2:
        raise ValueError(f"a classifier needs at least two classes, got {num_classes}")
    if isinstance(head, str):
        if head not in HEADS:
            raise ValueError(f"head must be one of {sorted(HEADS)} or a module, got {head!r}")
        head = HEADS[head](num_classes)
    # The features' number is all that a head needs of its encoder, which is therefore not run.
    variables = _init(head, key, encoder.dim)
    return Classifier(encoder=encoder, head_variables=variables, head=head, num_classes=num_classes)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _init(head: nn.Module, key: jax.Array, dim: int) -> Any:
    """A head's first weights, in one program: one by one they are some twenty."""
    return head.init(key, jnp.zeros((1, dim)))

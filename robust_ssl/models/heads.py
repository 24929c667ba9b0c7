"""Heads: what a downstream team puts on an encoder's features."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from robust_ssl.keys import check_key
from robust_ssl.models.contract import check_head, check_module
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


@dataclasses.dataclass(frozen=True)
class Reordered:
    """A head whose logits come in another order: that of another data set's classes.

    Attributes:
      head: The head.
      order: Which of its logits comes first, second, ...
    """

    head: nn.Module
    order: tuple[int, ...]

    def apply(self, variables, *args, **options) -> jax.Array:
        """Returns logits, float32 ``[batch, num_classes]``."""
        return self._turned(self.head.apply(variables, *args, **options))

    def copy(self, **options) -> Callable[..., jax.Array]:
        """Returns it as a part of an ensemble's module."""
        part = self.head.copy(**options)
        return lambda *args, **kwargs: self._turned(part(*args, **kwargs))

    def _turned(self, logits: jax.Array) -> jax.Array:
        return logits[..., jnp.array(self.order)]


def in_order_of(classifier: Classifier, class_names: Sequence[str]) -> Classifier:
    """Returns a classifier whose logits come in the order of these class names.

    Args:
      classifier: One that knows what its logits stand for.
      class_names: The same names in any order.

    Raises:
      ValueError: If they are not the same.

    Example:
      >>> from robust_ssl import models
      >>> encoder = models.resnet18(jax.random.key(0), width=8, image_size=16)
      >>> net = classifier(jax.random.key(1), encoder, 2, class_names=("cat", "dog"))
      >>> image = jnp.zeros((16, 16, 3))
      >>> turned = in_order_of(net, ("dog", "cat"))
      >>> bool((turned(image).logits == net(image).logits[::-1]).all())
      True
    """
    class_names = tuple(class_names)
    if class_names == classifier.class_names:
        return classifier
    if sorted(class_names) != sorted(classifier.class_names):
        raise ValueError(
            f"the logits stand for {classifier.class_names}, which are not {class_names}"
        )
    order = tuple(classifier.class_names.index(name) for name in class_names)
    head = classifier.head
    if isinstance(head, Reordered):
        head, order = head.head, tuple(head.order[place] for place in order)
    if order != tuple(range(len(order))):
        head = Reordered(head, order)
    return classifier.replace(head=head, class_names=class_names)


def classifier(
    key: jax.Array,
    encoder: Encoder,
    num_classes: int,
    *,
    head: str | nn.Module = "mlp",
    class_names: Sequence[str] = (),
) -> Classifier:
    """Puts a fresh head on an encoder.

    Args:
      key: Random key of the head's initialization.
      encoder: The feature extractor; its weights are not touched.
      num_classes: Number of logits, at least 2.
      head: ``"linear"``, ``"mlp"`` (Gen-AF's 512-512-classes) or a linen module that maps
        ``(features, train=...)`` to logits.
      class_names: What each logit stands for, such as ``train.class_names``; kept with the
        classifier, on disk too.

    Returns:
      A `Classifier`.

    Raises:
      ValueError: If there are fewer than two classes, another number of names, or the head's name
        is not known.

    Example:
      >>> from robust_ssl import models
      >>> encoder = models.resnet18(jax.random.key(0), width=8, image_size=16)
      >>> net = classifier(jax.random.key(1), encoder, 3, head="linear")
      >>> net(jnp.zeros((2, 16, 16, 3))).logits.shape
      (2, 3)
    """
    check_key(key)
    if num_classes < 2:
        raise ValueError(f"a classifier needs at least two classes, got {num_classes}")
    class_names = tuple(class_names)
    if class_names and len(class_names) != num_classes:
        raise ValueError(f"{num_classes} classes have {len(class_names)} names: {class_names[:5]}")
    if isinstance(head, str):
        if head not in HEADS:
            raise ValueError(f"head must be one of {sorted(HEADS)} or a module, got {head!r}")
        head = HEADS[head](num_classes)
    check_module(head)
    # The features' number is all that a head needs of its encoder, which is therefore not run.
    variables = _init(head, key, encoder.dim)
    if type(head).__module__ != __name__:
        check_head(head, variables, encoder.dim, num_classes)
    return Classifier(encoder, variables, head, num_classes, class_names)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _init(head: nn.Module, key: jax.Array, dim: int) -> Any:
    """A head's first weights, in one program: one by one they are some twenty."""
    return head.init(key, jnp.zeros((1, dim)))

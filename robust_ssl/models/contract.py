"""What a network must be to be an encoder or a head here, and what to do where it is not."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl.types import Encoder

_BATCH = 8  # as many as the losses of a recipe are traced on: the network is traced once for both
_ADVICE = {  # by a part of the error's message
    "unexpected keyword argument 'train'": "its __call__ must take train=False, and is told True "
    "in training",
    "unexpected keyword argument 'axis_name'": "its module needs a field axis_name: str | None = "
    "None, for batch norm on several devices",
    "to unpack": "its module must return (features, taps): float [batch, dim], and a dictionary "
    "of intermediate activations, which may be empty",
    "has no attribute 'shape'": "each tap must be an array, with the batch as its first axis",
    "PRNG": "it may draw random numbers under the name dropout alone",
    "immutable": "in training it may change the collection batch_stats alone",
}


def check_module(head: Any) -> None:
    """Raises ValueError unless a head is a module of ``flax.linen``."""
    if not isinstance(head, nn.Module):
        what = head.__name__ if isinstance(head, type) else type(head).__name__
        raise ValueError(
            "a head is a flax.linen.Module, or what a function of the number of classes returns is "
            f"one; got {what}"
        )


def check_head(head: nn.Module, variables: Mapping[str, Any], dim: int, classes: int) -> None:
    """Raises ValueError unless a head makes ``[batch, classes]`` logits, in training too.

    Args:
      head: The module.
      variables: What its ``init`` returned.
      dim: Number of features.
      classes: Number of logits.
    """
    name = type(head).__name__
    if other := sorted({*variables} - {"params"}):
        raise ValueError(
            f"the head {name} keeps {', '.join(other)}, which nothing updates; it may have params "
            "alone: take layer norm for batch norm"
        )
    features = jax.ShapeDtypeStruct((_BATCH, dim), jnp.float32)
    for train in (False, True):
        call = functools.partial(head.apply, train=train, rngs={"dropout": jax.random.key(0)})
        try:
            logits = jax.eval_shape(call, variables, features)
        except Exception as error:
            hint = "; it is called as head(features, train=...), and draws under dropout alone"
            raise ValueError(f"the head {name} cannot be called: {_first(error)}{hint}") from error
        if getattr(logits, "shape", None) != (_BATCH, classes):
            got = getattr(logits, "shape", type(logits).__name__)
            raise ValueError(
                f"the head {name} must return logits [batch, {classes}], and returned {got} for "
                f"{_BATCH} images"
            )


def _first(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def advice(error: Exception) -> str:
    """Returns what to do about an error that a network raised, ``"; ..."``, or nothing.

    Example:
      >>> advice(ValueError("too many values to unpack (expected 2)"))[:36]
      '; its module must return (features, '
    """
    message = f"{type(error).__name__} {error}"
    return next((f"; {hint}" for part, hint in _ADVICE.items() if part in message), "")


def check_network(encoder: Encoder) -> None:
    """Raises ValueError unless an encoder can be trained; nothing is computed.

    It gives ``[batch, dim]`` features, in training too, and its weights are float32.

    Args:
      encoder: Its variables may be shapes.
    """
    images = jax.ShapeDtypeStruct((_BATCH, encoder.image_size, encoder.image_size, 3), jnp.float32)
    train = functools.partial(encoder.apply_train, key=jax.random.key(0))
    try:
        shape = jax.eval_shape(encoder, images).features.shape
        if not type(encoder.module).__module__.startswith("robust_ssl."):  # those are known
            jax.eval_shape(train, images)
    except Exception as error:
        raise ValueError(
            f"the encoder {encoder.name!r} cannot be called: {_first(error)}{advice(error)}"
        ) from error
    kinds = {leaf.dtype for leaf in jax.tree.leaves(encoder.variables)}
    floats = {np.dtype(kind).name for kind in kinds if jnp.issubdtype(kind, jnp.floating)}
    if other := sorted(floats - {"float32"}):
        raise ValueError(
            f"the encoder {encoder.name!r} has weights of {', '.join(other)}; training takes "
            "float32 alone: keep them in that, and compute in another by the module's own dtype"
        )
    if shape != (_BATCH, encoder.dim):
        raise ValueError(
            f"the encoder {encoder.name!r} has dim={encoder.dim}, and its features of {_BATCH} "
            f"images have the shape {shape}; they must be [batch, dim]"
        )

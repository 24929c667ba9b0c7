"""What a network must be to be an encoder here, and what to do where it is not."""

from __future__ import annotations

import jax
import jax.numpy as jnp

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


def advice(error: Exception) -> str:
    """Returns what to do about an error that a network raised, ``"; ..."``, or nothing.

    Example:
      >>> advice(ValueError("too many values to unpack (expected 2)"))[:36]
      '; its module must return (features, '
    """
    message = f"{type(error).__name__} {error}"
    return next((f"; {hint}" for part, hint in _ADVICE.items() if part in message), "")


def check_network(encoder: Encoder) -> None:
    """Raises ValueError unless an encoder gives ``[batch, dim]`` features; nothing is computed.

    Args:
      encoder: Its variables may be shapes.
    """
    images = jax.ShapeDtypeStruct((_BATCH, encoder.image_size, encoder.image_size, 3), jnp.float32)
    try:
        shape = jax.eval_shape(encoder, images).features.shape
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"the encoder {encoder.name!r} cannot be called: {type(error).__name__}: {first}"
            f"{advice(error)}"
        ) from error
    if shape != (_BATCH, encoder.dim):
        raise ValueError(
            f"the encoder {encoder.name!r} has dim={encoder.dim}, and its features of {_BATCH} "
            f"images have the shape {shape}; they must be [batch, dim]"
        )

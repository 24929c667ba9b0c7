"""A batch that is run in parts, one after the other: less memory, the same numbers to rounding.

Losses still see the whole batch.  Only the outputs of the encoder are kept for it; what a gradient
needs of a part is computed again when its turn comes, and the parts' gradients add up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from robust_ssl.types import Classifier, Encoder


def in_parts(function: Callable[[Any], Any], parts: int, batch: Any) -> Any:
    """Runs a function of a batch on equal parts of it, in turn.

    Args:
      function: Arrays ``[n, ...]`` to arrays ``[n, ...]``; each row must depend on its own alone.
      parts: How many; 1 is the function itself.
      batch: A tree of arrays ``[batch, ...]``.

    Returns:
      What ``function(batch)`` returns, to rounding.  A gradient keeps no more than one part's
      activations, and costs one forward pass more.

    Raises:
      ValueError: If the batch does not divide.

    Example:
      >>> in_parts(lambda x: x**2, 2, jnp.arange(4.0)).tolist()
      [0.0, 1.0, 4.0, 9.0]

    References:
      Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
      RepL4NLP 2021 (GradCache), whose two passes are these.
    """
    if parts == 1:
        return function(batch)
    count = len(jax.tree.leaves(batch)[0])
    if count % parts:
        raise ValueError(
            f"accumulate={parts} does not divide the {count} images of a batch on each device; "
            "take a number that does, or another batch_size"
        )
    split = jax.tree.map(lambda x: x.reshape(parts, count // parts, *x.shape[1:]), batch)
    # Inside a loop nothing can be merged with the first pass, so no barrier is needed.
    results = jax.lax.map(jax.checkpoint(function, prevent_cse=False), split)
    return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), results)


def check(template: Classifier, parts: int, batch_statistics: str) -> None:
    """Raises ValueError unless a classifier's outputs are the same in parts as in one.

    Args:
      template: The classifier.
      parts: How many.
      batch_statistics: As `make_step` takes them.
    """
    if parts < 1:
        raise ValueError(f"accumulate must be at least 1, got {parts}")
    if parts == 1 or batch_statistics == "frozen":
        return
    if template.variables.get("batch_stats", {}).get("encoder"):
        raise ValueError(
            f"accumulate={parts} with batch_statistics={batch_statistics!r}: this encoder has "
            "batch norm, which would normalize each part by itself, to other numbers; take "
            'batch_statistics="frozen", or remat, which saves memory too'
        )
    if draws_in_training(template.encoder):
        raise ValueError(
            f"accumulate={parts}: this encoder draws random numbers in training mode (dropout), "
            'which parts would draw differently; take batch_statistics="frozen", or remat'
        )


def draws_in_training(encoder: Encoder) -> bool:
    """Returns whether an encoder uses its random key in training mode."""
    images = jax.ShapeDtypeStruct((2, encoder.image_size, encoder.image_size, 3), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    program = jax.make_jaxpr(lambda key, x: encoder.apply_train(x, key=key))(key, images).jaxpr
    return any(program.invars[0] is variable for eqn in program.eqns for variable in eqn.invars)


def rematerialized(template: Classifier) -> Classifier:
    """Returns the classifier whose encoder keeps only its blocks' inputs for a gradient.

    Raises:
      ValueError: If the encoder's module has no field `remat`.
    """
    module = template.encoder.module
    if not hasattr(module, "remat"):
        raise ValueError(
            f"remat: {type(module).__name__} has no field `remat`, as ResNet, ViT and ConvNeXt "
            "of this package have; leave it out, or give the module one (flax.linen.remat)"
        )
    return template.replace(encoder=template.encoder.replace(module=module.clone(remat=True)))

"""L2-SP: weight decay towards the pre-trained weights instead of towards zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from robust_ssl.optimizers.layerwise import match_paths


def pull_to_start(
    start: Mapping[str, Any], weight: jax.Array | float, *, anchored: str = "encoder/**"
) -> optax.GradientTransformation:
    r"""Adds the pull of L2-SP to the gradient: a spring from every weight to where it started.

    .. math:: g \leftarrow g + \alpha\,(w - w^0), \quad
        \text{the gradient of}\ \tfrac{\alpha}{2}\,\|w - w^0\|^2

    Put it before the optimizer, ``optax.chain(pull_to_start(...), optimizer)``.  It takes the place
    of weight decay on what it anchors; the paper's second term, :math:`\beta/2\,\|w\|^2` on the new
    head, is plain weight decay there.  Weight 0 changes nothing; a large one keeps the encoder
    where it is.

    Args:
      start: The parameters that training starts from, as ``classifier.variables["params"]``.  A
        copy on the host is kept: what a compiled step holds must not sit on one device.
      weight: :math:`\alpha`, at least 0; may be traced.
      anchored: Pattern of the paths that are pulled, as in `match_paths`.  Others are untouched.

    Returns:
      An optax transformation without state.

    Raises:
      ValueError: If the weight is negative or not finite, or the pattern matches nothing; in an
        update, if it gets no parameters.

    Example:
      >>> start = {"encoder": {"kernel": jnp.ones(2)}, "head": {"bias": jnp.zeros(1)}}
      >>> moved = {"encoder": {"kernel": jnp.array([1.0, 3.0])}, "head": {"bias": jnp.ones(1)}}
      >>> tx = pull_to_start(start, 0.5)
      >>> gradient = jax.tree.map(jnp.zeros_like, start)
      >>> updates, _ = tx.update(gradient, tx.init(start), moved)
      >>> updates["encoder"]["kernel"].tolist(), updates["head"]["bias"].tolist()
      ([0.0, 1.0], [0.0])

    References:
      Li, Grandvalet & Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional
      Networks", ICML 2018 (L2-SP).
    """
    if not isinstance(weight, jax.core.Tracer) and not 0 <= float(weight) < float("inf"):
        raise ValueError(f"the weight of L2-SP must be at least 0 and finite, got {weight}")
    flat = flatten_dict(start, sep="/")
    # Copies: the caller may use or donate the memory of `start` again.
    origins = {path: np.array(flat[path]) for path in match_paths(flat, anchored)}

    def add_pull(updates: Mapping[str, Any], params: Mapping[str, Any] | None) -> dict[str, Any]:
        if params is None:
            raise ValueError(
                "pull_to_start needs the parameters: tx.update(updates, state, params)"
            )
        weights, flat = flatten_dict(params, sep="/"), flatten_dict(updates, sep="/")
        for path, origin in origins.items():
            pull = weight * (weights[path] - origin)
            flat[path] = flat[path] + pull.astype(flat[path].dtype)
        return unflatten_dict(flat, sep="/")

    return optax.stateless(add_pull)

"""A slow copy of encoder and projector, the teacher of every momentum method.

It lives in a method's ``state["momentum"]``: `init_copy` makes it, `apply_copy` asks it, and
`move_copy` moves it after each update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from robust_ssl.pretraining.method import apply_network, encode, momentum_average
from robust_ssl.types import Encoder, Variables


def init_copy(encoder: Encoder, own: Variables) -> dict[str, Any]:
    """Copies the encoder and the projector, with which a momentum network begins.

    Args:
      encoder: The network.
      own: The method's variables, as `init_networks` made them; with ``"projector"``.

    Returns:
      ``{"encoder": {"params": ..., "batch_stats": ...}, "projector": (the same)}``, in arrays of
      its own.

    Example:
      >>> from robust_ssl import models
      >>> encoder = models.resnet18(jax.random.key(0), width=8, image_size=8)
      >>> from robust_ssl.pretraining.method import MLP, init_networks
      >>> own = init_networks(jax.random.key(1), {"projector": (MLP((8, 4)), encoder.dim)})
      >>> sorted(init_copy(encoder, own))
      ['encoder', 'projector']
    """
    shared = {
        "encoder": {c: encoder.variables.get(c, {}) for c in ("params", "batch_stats")},
        "projector": {c: own[c].get("projector", {}) for c in ("params", "batch_stats")},
    }
    return jax.tree.map(jnp.copy, shared)  # a step that donates its state gives each array once


def apply_copy(
    projector: nn.Module,
    copy: Variables,
    encoder: Encoder,
    views: Sequence[jax.Array],
    axis_name: str | None,
) -> tuple[list[jax.Array], dict[str, Any]]:
    """Runs a momentum network in training mode: this batch's statistics, no gradient.

    Args:
      projector: The module of its projector.
      copy: As `init_copy` made it.
      encoder: The trained encoder, for its module and its normalization only.
      views: This device's, float ``[batch, H, W, 3]`` each.
      axis_name: The device axis.

    Returns:
      Projections of each view, ``[batch, dim]``, and the copy with its new batch statistics.
    """
    slow = encoder.replace(variables={c: tree for c, tree in copy["encoder"].items() if tree})
    own = {c: {"projector": tree} for c, tree in copy["projector"].items() if tree}
    features, statistics = encode(slow, views, axis_name)
    projections, own = apply_network(
        projector, own, "projector", jnp.concatenate(features), axis_name
    )
    new = {
        "encoder": {**copy["encoder"], "batch_stats": statistics},
        "projector": {
            **copy["projector"],
            "batch_stats": own.get("batch_stats", {}).get("projector", {}),
        },
    }
    return jnp.split(jax.lax.stop_gradient(projections), len(views)), new


def move_copy(variables: Variables, encoder: Encoder, momentum: jax.Array) -> Variables:
    """Moves ``state["momentum"]`` towards the trained weights; its batch statistics stay its own.

    Args:
      variables: The method's, with the trained projector.
      encoder: With the trained weights.
      momentum: Share of the old copy that is kept, scalar in [0, 1].

    Returns:
      The method's variables with the moved copy.
    """
    copy = variables["state"]["momentum"]
    trained = {
        "encoder": encoder.variables["params"],
        "projector": variables["params"]["projector"],
    }
    moved = {
        part: {**copy[part], "params": momentum_average(copy[part]["params"], params, momentum)}
        for part, params in trained.items()
    }
    return {**variables, "state": {**variables["state"], "momentum": moved}}

"""A slow copy of encoder and projector, the teacher of every momentum method.

It lives in a method's ``state["momentum"]``: `init_copy` makes it, `apply_copy` runs it, and
`move_copy` moves it after each update.  `WithCopy` is a method that does all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from robust_ssl import struct
from robust_ssl.pretraining.method import (
    PretrainInputs,
    apply_network,
    encode,
    momentum_average,
    momentum_schedule,
    option,
)
from robust_ssl.pretraining.two_views import TwoViews
from robust_ssl.types import Encoder, Variables


def init_copy(encoder: Encoder, networks: Variables) -> dict[str, Any]:
    """Copies the encoder and the projector, with which a momentum network begins.

    Args:
      encoder: The network.
      networks: The method's variables, as `init_networks` made them; with ``"projector"``.

    Returns:
      ``{"encoder": {"params": ..., "batch_stats": ...}, "projector": (the same)}``, in new arrays.

    Example:
      >>> from robust_ssl import models
      >>> encoder = models.resnet18(jax.random.key(0), width=8, image_size=8)
      >>> from robust_ssl.pretraining.method import MLP, init_networks
      >>> networks = init_networks(jax.random.key(1), {"projector": (MLP((8, 4)), encoder.dim)})
      >>> sorted(init_copy(encoder, networks))
      ['encoder', 'projector']
    """
    shared = {
        "encoder": {c: encoder.variables.get(c, {}) for c in ("params", "batch_stats")},
        "projector": {c: networks[c].get("projector", {}) for c in ("params", "batch_stats")},
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
    networks = {c: {"projector": tree} for c, tree in copy["projector"].items() if tree}
    features, statistics = encode(slow, views, axis_name)
    projections, networks = apply_network(
        projector, networks, "projector", jnp.concatenate(features), axis_name
    )
    new = {
        "encoder": {**copy["encoder"], "batch_stats": statistics},
        "projector": {
            **copy["projector"],
            "batch_stats": networks.get("batch_stats", {}).get("projector", {}),
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


@struct.dataclass
class WithCopy(TwoViews):
    """`TwoViews` with a momentum copy of encoder and projector.

    Attributes:
      momentum: Of the copy, at the start.
      final_momentum: At the end.
    """

    momentum: float = option(0.99)
    final_momentum: float = option(1.0)

    def init(self, key: jax.Array, encoder: Encoder, num_images: int) -> Variables:
        """Returns the networks, and ``state["momentum"]``, the copy."""
        networks = super().init(key, encoder, num_images)
        return {**networks, "state": {"momentum": init_copy(encoder, networks)}}

    def targets(
        self,
        variables: Variables,
        encoder: Encoder,
        inputs: PretrainInputs,
        views: Sequence[jax.Array] | None = None,
    ) -> tuple[list[jax.Array], dict[str, Any]]:
        """Returns the copy's projections of each view (None: all), and the copy: `apply_copy`."""
        views = inputs.views if views is None else views
        copy = variables["state"]["momentum"]
        return apply_copy(self.networks["projector"], copy, encoder, views, inputs.axis_name)

    def after_update(
        self, variables: Variables, encoder: Encoder, progress: jax.Array
    ) -> Variables:
        """Returns the variables with the copy moved."""
        momentum = momentum_schedule(self.momentum, progress, self.final_momentum)
        return move_copy(variables, encoder, momentum)

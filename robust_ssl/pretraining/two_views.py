"""What most methods share: how views are made, and the networks that they go through."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from robust_ssl import parallel, struct
from robust_ssl.pretraining.augmentation import SYMMETRIC, random_views
from robust_ssl.pretraining.method import (
    MLP,
    MethodUpdate,
    PretrainInputs,
    apply_network,
    encode,
    init_networks,
    option,
)
from robust_ssl.types import Encoder, Variables


@struct.dataclass
class TwoViews:
    """All of a method but its loss: two views of an image, an encoder, a projector.

    A method that derives from it says what is different: views, layers, defaults.

    Attributes:
      hidden: Width of the projector's hidden layers.
      projection_dim: Size of the projections.
      min_scale: Smallest share of the area that a view's crop keeps.
    """

    hidden: int = option(2048)
    projection_dim: int = option(256)
    min_scale: float = option(0.08)

    # Without annotations these are no fields: they are what a class is, not how it is set.
    augmentations = SYMMETRIC
    hidden_layers = 1
    projector = MLP((), batch_norm=False)  # its widths are fields
    predictor_hidden = None  # a field where a method has a predictor

    @property
    def networks(self) -> dict[str, MLP]:
        """The method's networks by name; each takes the output of the one before it."""
        widths = (self.hidden,) * self.hidden_layers + (self.projection_dim,)
        networks = {"projector": self.projector.clone(widths=widths)}
        if self.predictor_hidden is not None:
            networks["predictor"] = MLP((self.predictor_hidden, self.projection_dim))
        return networks

    def init(self, key: jax.Array, encoder: Encoder, num_images: int) -> Variables:
        """Returns the variables of the networks, ``{"params": {"projector": ...}, ...}``."""
        networks, dim = {}, encoder.dim
        for name, network in self.networks.items():
            networks[name] = (network, dim)
            dim = network.widths[-1]
        return init_networks(key, networks)

    def views(self, key: jax.Array, image: jax.Array) -> tuple[jax.Array, ...]:
        """Returns two random views of one image, ``[H, W, 3]`` each."""
        return random_views(key, image, self.augmentations, min_scale=self.min_scale)

    def forward(
        self,
        variables: Variables,
        encoder: Encoder,
        inputs: PretrainInputs,
        views: tuple[jax.Array, ...] | None = None,
    ) -> tuple[list[jax.Array], MethodUpdate]:
        """Runs the encoder and the networks in training mode.

        Args:
          variables: The method's.
          encoder: With the weights that are trained.
          inputs: This device's part of the batch.
          views: What goes through; None is all of the inputs' views.

        Returns:
          The output of each network for all views one after another, ``[views * batch, dim]``,
          and the update with the new batch statistics.
        """
        views = inputs.views if views is None else views
        features, statistics = encode(encoder, views, inputs.axis_name)
        # All views together, as one batch for batch norm.
        x, outputs = jnp.concatenate(features), []
        for name, network in self.networks.items():
            x, variables = apply_network(network, variables, name, x, inputs.axis_name)
            outputs.append(x)
        return outputs, MethodUpdate(statistics, variables["batch_stats"])

    def projections(
        self, variables: Variables, encoder: Encoder, inputs: PretrainInputs
    ) -> tuple[jax.Array, jax.Array, MethodUpdate]:
        """Returns the global batch's projections of both views, ``[batch, dim]``, and the update.

        For losses that compare images: each device needs the images of all.
        """
        (both,), update = self.forward(variables, encoder, inputs)
        first, second = parallel.gather(tuple(jnp.split(both, 2)), inputs.axis_name)
        return first, second, update


@struct.dataclass
class MultiCrop(TwoViews):
    """`TwoViews`, and small views of parts of the image beside them (multi-crop).

    Attributes:
      local_crops: Number of small views.
      local_size: Their height and width, pixels.
      local_scale: Smallest and largest share of the area that they keep.
    """

    local_crops: int = option(0)
    local_size: int = option(16)
    local_scale: tuple[float, float] = option((0.05, 0.14))  # Caron et al. 2020, App. A.1

    def views(self, key: jax.Array, image: jax.Array) -> tuple[jax.Array, ...]:
        """Returns two random views of one image, then the small ones."""
        views = tuple(view.replace(min_scale=self.min_scale) for view in self.augmentations)
        smallest, largest = self.local_scale
        local = views[0].replace(min_scale=smallest, max_scale=largest, size=self.local_size)
        return random_views(key, image, views + (local,) * self.local_crops)


def crossed(loss, firsts, seconds) -> jax.Array:
    """Returns the sum of a loss over both directions: one's first view with the other's second.

    Example:
      >>> float(crossed(lambda a, b: a * b, [jnp.array(1.0), jnp.array(2.0)], [3.0, 4.0]))
      10.0
    """
    return loss(firsts[0], seconds[1]) + loss(firsts[1], seconds[0])


def frozen_at_first(prototypes: jax.Array, progress: jax.Array, share: float) -> jax.Array:
    """Returns prototypes without gradient in the first share of the training.

    Random prototypes would else be pulled together before the features say anything.
    """
    return jnp.where(progress < share, jax.lax.stop_gradient(prototypes), prototypes)

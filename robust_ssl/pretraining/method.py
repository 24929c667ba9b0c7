"""What a self-supervised method is: the contract, and the pieces that most methods are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from robust_ssl import struct
from robust_ssl.types import Encoder, Variables


@struct.dataclass
class PretrainInputs:
    """What a method may look at: one device's part of the batch.

    Attributes:
      views: What `Method.views` made of each image: float ``[batch, H, W, 3]`` in [0, 1] each;
        later ones may be smaller (multi-crop).
      rows: The images' places in the training set, int32 ``[batch]``.
      key: Of this step, the same on all devices.
      progress: Share of the training that is done, float32 scalar in [0, 1).
      labels: int32 ``[batch]``; None unless the method has ``needs_labels = True``.
      axis_name: The device axis, for `parallel.gather` and batch norm; None under ``jit``.
    """

    views: tuple[jax.Array, ...]
    rows: jax.Array
    key: jax.Array
    progress: jax.Array
    labels: jax.Array | None = None
    axis_name: str | None = struct.field(pytree_node=False, default=None)


@struct.dataclass
class MethodUpdate:
    """What a forward pass leaves for the next step, equal on all devices.

    Attributes:
      encoder: The encoder's new ``batch_stats``.
      batch_stats: The same of the method's own networks, shaped as `Method.init` made them.
      state: The method's new state: queue, center, statistics of a momentum encoder.
      metrics: Scalars for the log, by name.
    """

    encoder: Mapping[str, Any]
    batch_stats: Mapping[str, Any] = struct.field(default_factory=dict)
    state: Mapping[str, Any] = struct.field(default_factory=dict)
    metrics: Mapping[str, jax.Array] = struct.field(default_factory=dict)


class Method(Protocol):
    """What a self-supervised method brings; a frozen value, in your own file if need be.

    ``variables`` are the method's: ``params`` (projector, predictor, prototypes) are trained beside
    the encoder's, ``batch_stats`` belong to the same networks, ``state`` is anything else that
    lives from step to step (momentum encoder, queue, center): arrays only, no gradient.

    It may also have, each called where it is there:

    - ``needs_labels = True``: the step then gives it labels.
    - ``after_update(variables, encoder, progress) -> variables``: after the optimizer's update,
      with the new weights; where a momentum encoder moves.
    - ``epoch_start(key, variables) -> variables``: before the first step of each epoch.
    """

    def init(self, key: jax.Array, encoder: Encoder, num_images: int) -> Variables:
        """Returns ``{"params": ..., "batch_stats": ..., "state": ...}``; what is empty may lack.

        `num_images` is the size of the training set, for methods that remember every image.
        """

    def views(self, key: jax.Array, image: jax.Array) -> tuple[jax.Array, ...]:
        """Returns the random views of one image."""

    def loss(
        self, variables: Variables, encoder: Encoder, inputs: PretrainInputs
    ) -> tuple[jax.Array, MethodUpdate]:
        """Returns ``[global batch]`` losses and what changes besides the weights."""


class MLP(nn.Module):
    """Dense layers with ReLU or GELU between them: every projector and predictor.

    Attributes:
      widths: Of the layers, the last one is the output's.
      batch_norm: Whether each hidden layer is followed by batch norm (and has no bias).
      output_norm: Batch norm after the output: ``""``, ``"plain"`` (no scale, no bias) or
        ``"affine"``.
      activation: ``"relu"`` or ``"gelu"`` (exact).
      axis_name: The device axis over which batch statistics are averaged.
    """

    widths: tuple[int, ...]
    batch_norm: bool = True
    output_norm: str = ""
    activation: str = "relu"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns float32 ``[batch, widths[-1]]``."""
        for index, width in enumerate(self.widths[:-1]):
            x = nn.Dense(width, use_bias=not self.batch_norm, name=f"dense{index + 1}")(x)
            if self.batch_norm:
                x = self._norm(train, True, f"norm{index + 1}")(x)
            x = nn.relu(x) if self.activation == "relu" else nn.gelu(x, approximate=False)
        x = nn.Dense(self.widths[-1], use_bias=not self.output_norm, name="output")(x)
        if self.output_norm:
            x = self._norm(train, self.output_norm == "affine", "output_norm")(x)
        return x

    def _norm(self, train: bool, affine: bool, name: str) -> nn.BatchNorm:
        return nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            use_bias=affine,
            use_scale=affine,
            axis_name=self.axis_name if train else None,
            name=name,
        )


def option(default: Any) -> Any:
    """A field of a method that is static: another value is another program."""
    return struct.field(pytree_node=False, default=default)


def check_pair(first: jax.Array, second: jax.Array) -> None:
    """Raises AssertionError unless both are ``[batch, dim]`` of one shape."""
    chex.assert_rank([first, second], 2)
    chex.assert_equal_shape([first, second])


def init_networks(
    key: jax.Array, networks: Mapping[str, tuple[nn.Module, int]]
) -> dict[str, dict[str, Any]]:
    """Initializes networks by name, ``{name: (module, size of its input)}``.

    Returns:
      ``{"params": {name: ...}, "batch_stats": {name: ...}}``; a network without batch norm has
      no entry in the latter.

    Example:
      >>> variables = init_networks(jax.random.key(0), {"projector": (MLP((8, 4)), 16)})
      >>> sorted(variables), list(variables["params"])
      (['batch_stats', 'params'], ['projector'])
    """
    variables: dict[str, dict[str, Any]] = {"params": {}, "batch_stats": {}}
    for index, (name, (module, dim)) in enumerate(networks.items()):
        network = module.init(jax.random.fold_in(key, index), jnp.zeros((1, dim)))
        for collection, leaves in network.items():
            variables[collection][name] = leaves
    return variables


def apply_network(
    module: nn.Module, variables: Variables, name: str, x: jax.Array, axis_name: str | None
) -> tuple[jax.Array, Variables]:
    """Runs a network of `init_networks` in training mode.

    Args:
      module: The module it was made of.
      variables: With ``params`` and ``batch_stats`` by name.
      name: Which network.
      x: Its input, this device's ``[batch, dim]``.
      axis_name: The device axis.

    Returns:
      The output and the variables with this network's new batch statistics, so that calls can
      follow one another.
    """
    collections = [c for c in ("params", "batch_stats") if name in variables.get(c, {})]
    network = {collection: variables[collection][name] for collection in collections}
    out, updated = module.clone(axis_name=axis_name).apply(
        network, x, train=True, mutable=["batch_stats"]
    )
    if not updated:  # without batch norm
        return out, variables
    statistics = {**variables["batch_stats"], name: updated["batch_stats"]}
    return out, {**variables, "batch_stats": statistics}


def encode(
    encoder: Encoder, views: Sequence[jax.Array], axis_name: str | None
) -> tuple[list[jax.Array], Mapping[str, Any]]:
    """Runs the encoder in training mode on all views of the images.

    Neighbouring views of one size go through together, as one batch for batch norm; sizes follow
    one another.

    Args:
      encoder: The network.
      views: Float ``[batch, H, W, 3]`` each.
      axis_name: The device axis.

    Returns:
      Features of each view, ``[batch, dim]``, and the new ``batch_stats``.

    Example:
      >>> from robust_ssl import models
      >>> encoder = models.resnet18(jax.random.key(0), width=8, image_size=8)
      >>> views = [jnp.zeros((2, 8, 8, 3)), jnp.zeros((2, 8, 8, 3))]
      >>> [features.shape for features in encode(encoder, views, None)[0]]
      [(2, 64), (2, 64)]
    """
    features: list[jax.Array] = []
    batch_stats = encoder.variables.get("batch_stats", {})
    start = 0
    while start < len(views):
        end = start + 1
        while end < len(views) and views[end].shape == views[start].shape:
            end += 1
        outputs, batch_stats = encoder.apply_train(
            jnp.concatenate(views[start:end]), axis_name=axis_name
        )
        features += jnp.split(outputs.features, end - start)
        if batch_stats:
            encoder = encoder.replace(variables={**encoder.variables, "batch_stats": batch_stats})
        start = end
    return features, batch_stats


def normalize(x: jax.Array) -> jax.Array:
    """Divides each row by its length; a row of zeros stays zero, with a finite gradient.

    Example:
      >>> normalize(jnp.array([[3.0, 4.0], [0.0, 0.0]])).round(3).tolist()
      [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), 1e-12))


def momentum_average(target: Any, online: Any, momentum: jax.Array | float) -> Any:
    """Moves a momentum network's leaves towards the trained network's.

    Returns:
      ``momentum * target + (1 - momentum) * online``, leaf by leaf.

    Example:
      >>> float(momentum_average(jnp.array(1.0), jnp.array(2.0), 0.75))
      1.25

    References:
      He et al., "Momentum Contrast", CVPR 2020, Eq. 2.
    """
    return jax.tree.map(lambda old, new: momentum * old + (1 - momentum) * new, target, online)


def momentum_schedule(start: float, progress: jax.Array, end: float = 1.0) -> jax.Array:
    """Raises a momentum from `start` to `end` along half a cosine, scalar.

    Example:
      >>> float(momentum_schedule(0.5, jnp.array(0.5)))
      0.75

    References:
      Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020, Sec. 3.3.
    """
    return end - (end - start) * (jnp.cos(jnp.pi * progress) + 1) / 2


def enqueue(queue: jax.Array, newest: jax.Array) -> jax.Array:
    """Puts a global batch of rows at the front of a queue of fixed length; the oldest fall out.

    Args:
      queue: Rows of earlier batches, newest first, float ``[queue size, dim]``.
      newest: ``[batch, dim]``; a constant, no gradient flows into it.

    Returns:
      The new queue, ``[queue size, dim]``.

    Raises:
      ValueError: If the batch is larger than the queue.

    Example:
      >>> enqueue(jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[9.0]])).ravel().tolist()
      [9.0, 1.0, 2.0]
    """
    if len(newest) > len(queue):
        raise ValueError(
            f"a batch of {len(newest)} images does not fit into a queue of {len(queue)} rows; "
            f"raise the method's queue_size or lower batch_size"
        )
    newest = jax.lax.stop_gradient(newest).astype(queue.dtype)
    return jnp.concatenate([newest, queue])[: len(queue)]

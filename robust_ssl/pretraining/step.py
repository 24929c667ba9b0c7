"""One pre-training step for any method: views, loss, update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from robust_ssl import parallel
from robust_ssl.types import Encoder, TrainState


class Method(Protocol):
    """What a self-supervised method brings; a frozen value, in a file of the user's own if need be.

    Its parameters (projector, predictor) are trained beside the encoder's.
    """

    def init(self, key: jax.Array, encoder: Encoder) -> Mapping[str, Any]:
        """Returns the method's own parameters."""

    def views(self, key: jax.Array, image: jax.Array) -> tuple[jax.Array, ...]:
        """Returns the random views of one image."""

    def loss(
        self,
        params: Mapping[str, Any],
        encoder: Encoder,
        views: tuple[jax.Array, ...],
        axis_name: str | None,
    ) -> tuple[jax.Array, Mapping[str, Any]]:
        """Returns ``[global batch]`` losses and the encoder's new batch statistics."""


def init_state(
    key: jax.Array, encoder: Encoder, method: Method, tx: optax.GradientTransformation
) -> TrainState:
    """Returns the state before the first step; params are ``{"encoder": ..., "method": ...}``."""
    params = {"encoder": encoder.variables["params"], "method": method.init(key, encoder)}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        variables={"params": params, "batch_stats": encoder.variables.get("batch_stats", {})},
        opt_state=tx.init(params),
    )


def trained_encoder(encoder: Encoder, variables: Mapping[str, Any]) -> Encoder:
    """Returns the encoder with the weights of a training state's variables."""
    new = {"params": variables["params"]["encoder"]}
    if variables.get("batch_stats"):
        new["batch_stats"] = variables["batch_stats"]
    return encoder.replace(variables=new)


def make_step(
    encoder: Encoder,
    method: Method,
    tx: optax.GradientTransformation,
    *,
    key: jax.Array,
    axis_name: str | None = None,
) -> Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds ``step(state, batch) -> (state, metrics)``.

    Args:
      encoder: The network; its weights come from the state.
      method: The self-supervised method.
      tx: The optimiser, over ``{"encoder": ..., "method": ...}``.
      key: The stage's random key; a step folds in its number, an image its place in the batch.
      axis_name: The device axis, from `parallel.Parallel.axis_name`.

    Returns:
      A step for `parallel.Parallel.compile`.  Batches are ``{"images": uint8 [n, H, W, 3],
      "indices": int32 [n]}``.  Metrics: ``loss`` and ``gradient_norm``; a look at collapse is
      `monitor.feature_std` of the features.

    Example:
      >>> from robust_ssl import models
      >>> from robust_ssl.pretraining import SimCLR
      >>> encoder = models.resnet18(jax.random.key(0), width=8, image_size=8)
      >>> tx, method = optax.sgd(0.1), SimCLR(hidden=16, projection_dim=8)
      >>> state = init_state(jax.random.key(1), encoder, method, tx)
      >>> step = jax.jit(make_step(encoder, method, tx, key=jax.random.key(2)))
      >>> batch = {"images": jnp.zeros((4, 8, 8, 3), jnp.uint8), "indices": jnp.arange(4)}
      >>> state, metrics = step(state, batch)
      >>> int(state.step), metrics["loss"].shape
      (1, ())
    """

    def step(state: TrainState, batch):
        step_key = jax.random.fold_in(key, state.step)
        images = batch["images"].astype(jnp.float32) / 255.0
        keys = jax.vmap(lambda index: jax.random.fold_in(step_key, index))(batch["indices"])
        views = jax.vmap(method.views)(keys, images)

        def loss_of(params):
            variables = {"params": params["encoder"]}
            if state.variables["batch_stats"]:
                variables["batch_stats"] = state.variables["batch_stats"]
            losses, batch_stats = method.loss(
                params["method"], encoder.replace(variables=variables), views, axis_name
            )
            return jnp.mean(losses), batch_stats

        (loss, batch_stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            state.variables["params"]
        )
        gradients = parallel.average(gradients, axis_name)
        batch_stats = parallel.average(batch_stats, axis_name)
        updates, opt_state = tx.update(gradients, state.opt_state, state.variables["params"])
        params = optax.apply_updates(state.variables["params"], updates)
        new = state.replace(
            step=state.step + 1,
            variables={"params": params, "batch_stats": batch_stats},
            opt_state=opt_state,
        )
        return new, {
            "loss": parallel.average(loss, axis_name),
            "gradient_norm": optax.tree.norm(gradients),
        }

    return step

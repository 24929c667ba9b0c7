"""One pre-training step for any method: views, loss, update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from robust_ssl import parallel
from robust_ssl.keys import check_key
from robust_ssl.optimizers.finite import check_metrics, no_skips, take_if_finite
from robust_ssl.pretraining.method import Method, MethodUpdate, PretrainInputs
from robust_ssl.types import Encoder, TrainState, Variables


def init_state(
    key: jax.Array,
    encoder: Encoder,
    method: Method,
    tx: optax.GradientTransformation,
    *,
    num_images: int,
) -> TrainState:
    """Returns the state before the first step.

    Its variables are ``params`` and ``batch_stats``, each ``{"encoder": ..., "method": ...}``, and
    ``state``, the method's.
    """
    check_key(key)
    variables = method.init(key, encoder, num_images)
    params = {"encoder": encoder.variables["params"], "method": variables.get("params", {})}
    batch_stats = {
        "encoder": encoder.variables.get("batch_stats", {}),
        "method": variables.get("batch_stats", {}),
    }
    state = variables.get("state", {})
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        variables={"params": params, "batch_stats": batch_stats, "state": state},
        opt_state=tx.init(params),
        counters=no_skips(),
    )


def trained_encoder(encoder: Encoder, variables: Variables) -> Encoder:
    """Returns the encoder with the weights of a training state's variables."""
    new = {"params": variables["params"]["encoder"]}
    if variables["batch_stats"]["encoder"]:
        new["batch_stats"] = variables["batch_stats"]["encoder"]
    return encoder.replace(variables=new)


def _of_method(variables: Variables) -> Variables:
    """The method's part of a training state's variables."""
    return {
        "params": variables["params"]["method"],
        "batch_stats": variables["batch_stats"]["method"],
        "state": variables["state"],
    }


def _with_method(variables: Variables, new: Variables) -> Variables:
    return {
        "params": {**variables["params"], "method": new["params"]},
        "batch_stats": {**variables["batch_stats"], "method": new["batch_stats"]},
        "state": new["state"],
    }


def make_step(
    encoder: Encoder,
    method: Method,
    tx: optax.GradientTransformation,
    *,
    key: jax.Array,
    total_steps: int,
    steps_per_epoch: int,
    accumulate: int = 1,
    axis_name: str | None = None,
) -> Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds ``step(state, batch) -> (state, metrics)``.

    Args:
      encoder: The network; its weights come from the state.
      method: The self-supervised method.
      tx: The optimizer, over ``{"encoder": ..., "method": ...}``.
      key: The stage's random key; a step folds in its number, an image its place in the batch.
      total_steps: Of the whole training, for the method's schedules.
      steps_per_epoch: After how many steps an epoch begins.
      accumulate: Parts that a batch is cut into; their gradients are averaged before the one
        update, so memory shrinks by this factor.  A loss sees one part at a time: what it compares
        across images is compared within the part.
      axis_name: The device axis, from `parallel.Parallel.axis_name`.

    Returns:
      A step for `parallel.Parallel.compile`.  Batches are ``{"images": uint8 [n, H, W, 3],
      "indices": int32 [n], "rows": int32 [n]}``, with ``"labels"`` for a method that needs them.
      Metrics: ``loss``, ``gradient_norm``, ``skipped`` (1 where an update that is not finite was
      left out) and the method's own.

    Example:
      >>> from robust_ssl import models
      >>> from robust_ssl.pretraining import SimCLR
      >>> encoder = models.resnet18(jax.random.key(0), width=8, image_size=8)
      >>> tx, method = optax.sgd(0.1), SimCLR(hidden=16, projection_dim=8)
      >>> state = init_state(jax.random.key(1), encoder, method, tx, num_images=4)
      >>> step = make_step(
      ...     encoder, method, tx, key=jax.random.key(2), total_steps=1, steps_per_epoch=1
      ... )
      >>> images, rows = jnp.zeros((4, 8, 8, 3), jnp.uint8), jnp.arange(4)
      >>> state, metrics = jax.jit(step)(state, {"images": images, "indices": rows, "rows": rows})
      >>> int(state.step), metrics["loss"].shape
      (1, ())
    """
    check_key(key)

    def forward(params, variables, batch, step_key, progress):
        """The mean loss of one part of the batch, and its `MethodUpdate`."""
        variables = {**variables, "params": params}
        keys = jax.vmap(lambda index: jax.random.fold_in(step_key, index))(batch["indices"])
        images = batch["images"].astype(jnp.float32) / 255.0
        inputs = PretrainInputs(
            views=jax.vmap(method.views)(keys, images),
            rows=batch["rows"],
            key=step_key,
            progress=progress,
            labels=batch["labels"] if getattr(method, "needs_labels", False) else None,
            axis_name=axis_name,
        )
        online = trained_encoder(encoder, variables)
        losses, update = method.loss(_of_method(variables), online, inputs)
        check_metrics(update.metrics, f"update.metrics of {type(method).__name__}")
        return jnp.mean(losses), update

    def gradients_of(variables, batch, step_key, progress):
        """Gradients, new variables and metrics of one part; nothing is averaged yet."""
        (loss, update), gradients = jax.value_and_grad(forward, has_aux=True)(
            variables["params"], variables, batch, step_key, progress
        )
        return gradients, _carry_on(variables, update), {"loss": loss, **update.metrics}

    def step(state: TrainState, batch):
        step_key = jax.random.fold_in(key, state.step)
        progress = state.step / total_steps
        epoch_starts = state.step % steps_per_epoch == 0
        variables = _at_epoch_start(method, state.variables, step_key, epoch_starts)
        # What an epoch begins with is of no batch, and stays where this batch's update is skipped.
        state = state.replace(variables=variables)
        gradients, variables, metrics = _accumulated(
            gradients_of, variables, batch, step_key, progress, accumulate
        )
        gradients, metrics = parallel.average((gradients, metrics), axis_name)
        updates, opt_state = tx.update(gradients, state.opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        variables = {**variables, "params": params}
        if hasattr(method, "after_update"):
            moved = method.after_update(
                _of_method(variables), trained_encoder(encoder, variables), progress
            )
            variables = _with_method(variables, moved)
        metrics = {**metrics, "gradient_norm": optax.tree.norm(gradients)}
        return take_if_finite(state, variables, opt_state, metrics)

    return step


def _at_epoch_start(
    method: Method, variables: Variables, key: jax.Array, epoch_starts: jax.Array
) -> Variables:
    """Calls the method's `epoch_start`, if it has one, where an epoch starts."""
    if not hasattr(method, "epoch_start"):
        return variables
    return jax.lax.cond(
        epoch_starts,
        lambda v: _with_method(v, method.epoch_start(key, _of_method(v))),
        lambda v: v,
        variables,
    )


def _carry_on(variables: Variables, update: MethodUpdate) -> Variables:
    """The variables after a forward pass: weights as they were, statistics and state new."""
    new = {
        "params": variables["params"],
        "batch_stats": {"encoder": update.encoder, "method": update.batch_stats},
        "state": update.state,
    }
    before, after = jax.tree.structure(variables), jax.tree.structure(new)
    if before != after:
        raise ValueError(
            "the method's loss must return batch_stats and state shaped as its init made them; "
            f"they were\n  {before}\nand are\n  {after}"
        )
    return new


def _accumulated(
    gradients_of: Callable,
    variables: Variables,
    batch: Mapping[str, jax.Array],
    step_key: jax.Array,
    progress: jax.Array,
    parts: int,
) -> tuple[Any, Variables, dict[str, jax.Array]]:
    """Calls `gradients_of` on `parts` parts of the batch, one after another, and averages."""
    if parts == 1:
        return gradients_of(variables, batch, step_key, progress)
    size = len(batch["indices"])
    if size % parts:
        raise ValueError(
            f"accumulate={parts} does not divide a device's {size} images; change batch_size, "
            f"accumulate or the number of devices"
        )
    # Image i goes into part i modulo `parts`, whichever device it lies on.
    cut = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)

    def one(variables, part):
        gradients, variables, metrics = gradients_of(variables, part, step_key, progress)
        return variables, (gradients, metrics)

    variables, sums = jax.lax.scan(one, variables, cut)
    gradients, metrics = jax.tree.map(lambda x: jnp.mean(x, axis=0), sums)
    return gradients, variables, metrics

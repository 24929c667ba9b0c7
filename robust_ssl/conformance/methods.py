"""The laws of self-supervised methods, and of what makes a random view of an image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from robust_ssl.conformance.laws import (
    Laws,
    check_batch,
    made_of,
    made_up_images,
    name_of,
    one_by_one,
    share_of_devices,
    small_encoder,
)
from robust_ssl.parallel import Parallel
from robust_ssl.pretraining import Method, PretrainInputs, init_state, make_step
from robust_ssl.types import Encoder, TrainState

_COLLECTIONS = {"params", "batch_stats", "state"}


def check_augmentation(
    augmentation: Callable[[jax.Array, jax.Array], jax.Array] | str,
    *,
    image_size: int = 8,
    batch: int = 3,
    seed: int = 0,
) -> None:
    """Checks that an augmentation keeps the laws of images.

    It returns finite pixels in [0, 1] of the same shape, the same for the same key, something else
    for other images, and in a batch
    under `jax.jit` what it makes of each image by itself.

    Args:
      augmentation: ``(key, image) -> image``, for one image; a class, or ``"module:Class"``, is
        called first.
      image_size: Height and width of the made-up images, pixels.
      batch: Number of made-up images, at least 2.
      seed: Of the made-up images and of the keys.

    Raises:
      AssertionError: Names the augmentation and the law it breaks.

    Example:
      >>> check_augmentation("robust_ssl.pretraining:shift_only")
    """
    check_batch(batch)
    augmentation = made_of(augmentation)
    laws = Laws(name_of(augmentation))
    images = made_up_images(np.random.default_rng(seed), batch, image_size)
    keys = jax.random.split(jax.random.key(seed), batch)
    laws.images(augmentation(keys[0], images[0]), images.shape[1:])
    alone = one_by_one(augmentation, keys, images)
    laws.images(alone, images.shape)
    same_key = one_by_one(augmentation, jnp.repeat(keys[:1], batch), images)
    laws.hold(bool(jnp.any(same_key != same_key[:1])), "makes one and the same of all images")
    again = one_by_one(augmentation, keys, images)
    laws.close(again, alone, "gives another image for the same key")
    together = jax.jit(jax.vmap(augmentation))(keys, images)
    laws.close(together, alone, "gives something else in a batch under jax.jit", 1e-4)


def check_method(
    method: Method | str, *, encoder: Encoder | None = None, batch: int = 8, seed: int = 0
) -> None:
    """Checks that a self-supervised method keeps the laws of pre-training.

    `init` and `views` give the same for the same key, and views are images in [0, 1].  `loss` gives
    one finite value per image of the global batch, and statistics and state shaped as `init` made
    them.  A step is finite, reaches the encoder's weights, and does not depend on the number of
    devices.

    Args:
      method: With `init`, `views` and `loss`; a class, or ``"module:Class"``, is called.
      encoder: Trained; None takes a small one with batch norm.
      batch: Number of made-up images, a multiple of the devices it is tried on; also the size of
        the training set.
      seed: Of the made-up images and of the keys.

    Raises:
      AssertionError: Names the method and the law it breaks.

    Example:
      >>> from robust_ssl.pretraining import SimCLR
      >>> check_method(SimCLR(hidden=16, projection_dim=8))
    """
    check_batch(batch)
    method = made_of(method)
    laws = Laws.of(method, "init", "views", "loss")
    encoder = small_encoder(8) if encoder is None else encoder
    key = jax.random.key(seed)
    variables = method.init(key, encoder, batch)
    unknown = sorted(set(variables) - _COLLECTIONS)
    laws.hold(not unknown, f".init returns {unknown}: only {sorted(_COLLECTIONS)} travel")
    laws.finite(variables, ".init returns values that are not finite")
    again = method.init(key, encoder, batch)
    laws.close(again, variables, ".init gives other variables for the same key")
    images = made_up_images(np.random.default_rng(seed), batch, encoder.image_size)
    views = _check_views(laws, method, images, jax.random.split(key, batch))
    _check_loss(laws, method, encoder, variables, views, key)
    _check_step(laws, method, encoder, images, key)


def _check_views(laws: Laws, method: Method, images: jax.Array, keys: jax.Array) -> tuple:
    views = jax.jit(jax.vmap(method.views))(keys, images)
    laws.hold(isinstance(views, tuple) and views, ".views must return a tuple of images")
    for view in views:
        law = f".views must return [height, width, 3] each, got {view.shape[1:]}"
        laws.hold(view.ndim == 4 and view.shape[-1] == 3, law)
        laws.images(view, view.shape, ".views")
    alone = jax.jit(method.views)(keys[1], images[1])
    law = ".views of an image depend on its neighbors in the batch"
    laws.close(alone, tuple(view[1] for view in views), law, 1e-4)
    return views


def _check_loss(laws: Laws, method: Method, encoder: Encoder, variables, views, key) -> None:
    rows = jnp.arange(len(views[0]), dtype=jnp.int32)
    labels = rows % 2 if getattr(method, "needs_labels", False) else None
    inputs = PretrainInputs(views, rows, key, jnp.float32(0.0), labels)
    before = {collection: variables.get(collection, {}) for collection in _COLLECTIONS}
    losses, update = jax.jit(lambda *inputs: method.loss(*inputs))(before, encoder, inputs)
    law = f".loss must return one value per image, {rows.shape}, got {losses.shape}"
    laws.hold(losses.shape == rows.shape, law)
    laws.finite(losses, ".loss is not finite")
    before["encoder"] = encoder.variables.get("batch_stats", {})
    for part in ("encoder", "batch_stats", "state"):
        old, new = _shapes(before[part]), _shapes(getattr(update, part))
        law = f".loss must return an update whose {part} is shaped as before: {old} became {new}"
        laws.hold(new == old, law)
    laws.finite(update, ".loss leaves an update that is not finite")


def _shapes(tree: Any) -> dict[str, tuple]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): (leaf.shape, str(leaf.dtype)) for path, leaf in leaves}


def _check_step(laws: Laws, method: Method, encoder: Encoder, images, key) -> None:
    # Two, each an epoch: `DeepClusterV2` has nothing to cluster before the second.
    one, last = _stepped(method, encoder, images, key, devices=1, num_steps=2)
    skipped = any(map(int, jax.tree.leaves(last.counters)))
    laws.hold(not skipped, "has a gradient that is not finite")
    before, after = encoder.variables["params"], last.variables["params"]["encoder"]
    moved = jax.tree.map(lambda old, new: bool(np.any(old != new)), before, after)
    laws.hold(any(jax.tree.leaves(moved)), ".loss has no gradient for the encoder's weights")
    devices = share_of_devices(len(images))
    if devices > 1:
        (several,) = _stepped(method, encoder, images, key, devices=devices, num_steps=1)
        law = (
            "depends on the number of devices: gather what is compared or kept across the batch "
            "with parallel.gather(x, inputs.axis_name), and pass axis_name to batch norm"
        )
        laws.close(several.variables, one.variables, law, 1e-4)


def _stepped(
    method: Method,
    encoder: Encoder,
    images: jax.Array,
    key: jax.Array,
    devices: int,
    num_steps: int,
) -> list[TrainState]:
    """Returns the state after each step."""
    parallel, tx = Parallel.create(num_devices=devices), optax.sgd(0.1)
    epochs = {"total_steps": 10, "steps_per_epoch": 1}
    step = make_step(encoder, method, tx, key=key, axis_name=parallel.axis_name, **epochs)
    rows = np.arange(len(images), dtype=np.int32)
    pixels = np.rint(255 * np.asarray(images)).astype(np.uint8)
    batch = {"images": pixels, "indices": rows, "rows": rows, "labels": rows % 2}
    state = init_state(key, encoder, method, tx, num_images=len(images))
    state, step, states = parallel.replicate(state), parallel.compile(step), []
    for _ in range(num_steps):
        state, _ = step(state, parallel.put(batch))
        states.append(jax.device_get(state))
    return states

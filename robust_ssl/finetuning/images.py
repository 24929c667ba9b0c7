"""The images of one update: augmented, attacked, and the random keys that they depend on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from robust_ssl.attacks.per_image import attack_batch
from robust_ssl.finetuning.adversaries import Adversary, by_image
from robust_ssl.finetuning.parts import in_parts
from robust_ssl.types import Attack, Classifier

Batch = Mapping[str, jax.Array]


class Keys(NamedTuple):
    """The random keys of one step, one for each use."""

    augmentation: jax.Array
    attack: jax.Array
    network: jax.Array
    renewal: jax.Array


def step_keys(key: jax.Array, step: jax.Array) -> Keys:
    """Returns the keys of a step."""
    step_key, network = jax.random.split(jax.random.fold_in(key, step))
    augmentation, attack = jax.random.split(step_key)
    renewal = jax.random.fold_in(step_key, 2)  # 0 and 1 are taken: the split above
    return Keys(augmentation, attack, network, renewal)


def clean_images(
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None,
    step: jax.Array,
    batch: Batch,
    key: jax.Array,
    attack: Attack | Adversary | None,
) -> jax.Array:
    """Returns the step's clean images, augmented; each is keyed by its index."""
    images = batch["images"]
    if images.dtype == jnp.uint8:
        images = images.astype(jnp.float32) / 255.0
    if augment is None:
        return images
    # Every replay of a batch has the same augmentation: its perturbations belong to these pixels.
    replays = getattr(attack, "replays", 1)
    key = step_keys(key, step // replays).augmentation
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(batch["indices"])
    augmented = jax.vmap(augment)(keys, images)
    if (augmented.shape, augmented.dtype) != (images.shape, images.dtype):
        raise ValueError(
            f"augment must return images as it gets them, {images.dtype} {images.shape[1:]}, and "
            f"returned {augmented.dtype} {augmented.shape[1:]}"
        )
    return augmented


def attacked_images(
    attack: Attack | Adversary | None,
    key: jax.Array,
    model: Classifier,
    images: jax.Array,
    batch: Batch,
    *,
    share: jax.Array | None,
    parts: int,
) -> Callable[[Any], jax.Array] | None:
    """Returns ``deltas -> adversarial images``; a per-image attack's do not depend on them."""
    if isinstance(attack, Adversary):
        entry = "rows" if by_image(attack) else "indices"
        if entry not in batch:
            raise ValueError(
                f"{type(attack).__name__} finds an image's perturbation by the batch's {entry!r}, "
                f"and the batch has {', '.join(batch)} only"
            )
        places = batch[entry]
        return lambda deltas: attack.apply(deltas["deltas"], key, images, places)
    if attack is None:
        return None

    def craft():
        rows = (images, batch["labels"], batch["indices"])
        return in_parts(lambda part: attack_batch(attack, key, model, *part), parts, rows)

    # A branch and not a product with zero: without a budget the attack's gradients are saved.
    crafted = craft() if share is None else jax.lax.cond(share > 0, craft, lambda: images)
    return lambda deltas: jax.lax.stop_gradient(crafted)

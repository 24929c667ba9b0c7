"""The laws of encoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl.build import resolve
from robust_ssl.conformance.laws import Laws, check_batch, made_up_images, name_of, one_by_one
from robust_ssl.models.bridge import Bridge
from robust_ssl.models.contract import advice
from robust_ssl.types import Encoder


def check_encoder(
    encoder: Encoder | Callable[..., Encoder] | str,
    *,
    batch: int = 6,
    seed: int = 0,
    **options: Any,
) -> None:
    """Checks that an encoder keeps the laws of models.

    Its features must be finite floats ``[batch, dim]``, also of black and of white images, with a
    finite gradient that is not zero everywhere; the same under `jax.jit`, for one image, and beside
    other neighbors.  Taps carry the batch axis.  Training mode must know the device axis: with
    batch norm, two halves of a batch on two devices leave the statistics of the whole.

    Args:
      encoder: An encoder, a builder ``(key, **options) -> Encoder``, or ``"module:function"``.
      batch: Number of made-up images, even, at least 4; another number than a tap's height, or a
        tap without the batch axis is not seen.
      seed: Of the made-up images and of the builder's key.
      **options: Of the builder.

    Raises:
      AssertionError: Names the encoder and the law it breaks.

    Example:
      >>> check_encoder("robust_ssl.models:vit_tiny", image_size=8, patch_size=4, depth=1)
    """
    check_batch(batch, 4)
    key = jax.random.key(seed)
    if not isinstance(encoder, Encoder):
        builder = resolve(encoder)
        laws = Laws(name_of(builder))
        encoder = laws.calls(builder)(key, **options)
        kind = type(encoder).__name__
        laws.hold(isinstance(encoder, Encoder), f"must return an Encoder, got {kind}")
        again = builder(key, **options)
        laws.close(again.variables, encoder.variables, "makes other weights of the same key")
    laws = Laws(f"the encoder {encoder.name!r}")
    images = made_up_images(np.random.default_rng(seed), batch, encoder.image_size)
    images = images.at[1].set(0.0).at[2].set(1.0)
    laws.finite(encoder.variables, "has weights that are not finite")
    possible = np.isfinite(encoder.mean).all() and (np.asarray(encoder.std) > 0).all()
    laws.hold(possible, f"has an impossible normalization: mean {encoder.mean}, std {encoder.std}")
    _check_features(laws, encoder, images)
    # A network of another library is never trained here.
    if not isinstance(encoder.module, Bridge):
        _check_training(laws, encoder, images, key)


def _check_features(laws: Laws, encoder: Encoder, images: jax.Array) -> None:
    outputs = laws.calls(encoder, advice)(images)
    features, shape = outputs.features, (len(images), encoder.dim)
    law = f"must return features [batch, dim] = {shape}, got {features.shape}"
    laws.hold(features.shape == shape, law)
    laws.hold(features.dtype == jnp.float32, f"must return float32, got {features.dtype}")
    laws.finite(features, "has features that are not finite")
    laws.finite(outputs.taps, "has taps that are not finite")
    for tap, values in outputs.taps.items():
        laws.hold(hasattr(values, "shape"), f"has a tap {tap!r} that is no array")
        law = f"has a tap {tap!r} without the batch axis: {values.shape}"
        laws.hold(values.shape[:1] == (len(images),), law)
    compiled = jax.jit(lambda encoder, images: encoder(images).features)(encoder, images)
    laws.close(compiled, features, "gives other features under jax.jit", 1e-4)
    alone = one_by_one(lambda image: encoder(image).features, images)
    laws.close(alone, features, "'s features depend on the neighbors in the batch", 1e-4)
    gradient = jax.grad(lambda x: jnp.sum(encoder(x).features ** 2))(images)
    laws.finite(gradient, "has a gradient for the image that is not finite")
    law = "has features that do not depend on the image: its gradient is zero"
    laws.hold(jnp.any(gradient != 0), law)


def _check_training(laws: Laws, encoder: Encoder, images: jax.Array, key: jax.Array) -> None:
    laws.hold(
        "axis_name" in type(encoder.module).__dataclass_fields__,
        f"'s module {type(encoder.module).__name__} has no field axis_name, which training "
        "on several devices sets: add `axis_name: str | None = None` and pass it to batch norm",
    )
    outputs, statistics = laws.calls(encoder.apply_train, advice)(images, key=key)
    laws.finite(outputs.features, "has features in training mode that are not finite")
    before = encoder.variables.get("batch_stats", {})
    same = jax.tree.structure(dict(before)) == jax.tree.structure(dict(statistics))
    laws.hold(same, "must keep the structure of batch_stats in training mode")
    if not jax.tree.leaves(before):
        return
    _, others = encoder.apply_train(images, key=jax.random.fold_in(key, 1))
    leaves = zip(jax.tree.leaves(statistics), jax.tree.leaves(others), strict=True)
    if any(bool(jnp.any(one != other)) for one, other in leaves):
        return  # dropout draws other units for each half, so there is nothing to compare

    def of_half(half):
        return encoder.apply_train(half, key=key, axis_name="devices")[1]

    shared = jax.vmap(of_half, axis_name="devices")(jnp.stack(jnp.split(images, 2)))
    law = "'s batch statistics ignore axis_name: pass it to batch norm in training mode"
    laws.close(jax.tree.map(lambda x: x[0], shared), statistics, law, 1e-4)

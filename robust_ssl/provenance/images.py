"""Eight images that every encoder sees the same way, and the features that it gives them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Of a feature vector's length.  For the shipped encoders on CPU, another compilation moves features
# by 7e-7 at most, and a mean that is off by 1/255 by 6e-3 at least (2026-11-29).
TOLERANCE = 1e-3


def reference_images(size: int) -> np.ndarray:
    """Returns the images, float32 ``[8, size, size, 3]`` in [0, 1], multiples of 1/255.

    Integers only, so that they are the same everywhere: ramps and stripes, checks and a disc, each
    channel another, and noise of a fixed sequence.  Colors are not in balance, so an exchange of
    red and blue is seen; some are dark and some bright, so another normalization is.

    Example:
      >>> images = reference_images(4)
      >>> images.shape, float(images.max()) <= 1
      ((8, 4, 4, 3), True)
    """
    y, x = np.mgrid[0:size, 0:size].astype(np.int64)
    ramp, fall = 255 * x // max(size - 1, 1), 255 * y // max(size - 1, 1)
    checks = 255 * ((x // max(size // 8, 1) + y // max(size // 8, 1)) % 2)
    stripes = 255 * (x % 2)
    half = size // 2
    disc = 200 * ((x - half) ** 2 + (y - half) ** 2 < (size // 3) ** 2)
    noise = _noise(size)
    channels = (
        (ramp, fall, 0 * ramp + 64),
        (fall // 2, 255 - ramp, 30 + 0 * ramp),
        (checks, 255 - checks, ramp),
        (stripes, fall, 128 + 0 * ramp),
        (disc, disc // 2, disc // 4 + 40),
        (255 - disc, 180 + 0 * ramp, 60 + disc // 2),
        (noise[0], noise[1], noise[2]),
        (noise[0] // 4, noise[1] // 3, 40 + noise[2] // 4),
    )
    pixels = np.stack([np.stack(image, axis=-1) for image in channels])
    return pixels.astype(np.float32) / 255


def _noise(size: int) -> np.ndarray:
    """Returns bytes of a sequence that no library can change, ``[3, size, size]``."""
    state, numbers = 2463534242, []
    for _ in range(3 * size * size):
        # Numerical Recipes' constants; its high bits are good enough to look at.
        state = (1664525 * state + 1013904223) % 2**32
        numbers.append(state >> 24)
    return np.asarray(numbers, np.int64).reshape(3, size, size)


def reference_outputs(model: Any, size: int) -> dict[str, list[list[float]]]:
    """Returns features, and logits where there are some, of the eight images.

    All is computed in float32, whatever the encoder or the accelerator does by default: with fewer
    bits a wrong preprocessing would be within the rounding.
    """
    model = _in_float32(model)
    images = jnp.asarray(reference_images(size))
    with jax.default_matmul_precision("highest"):
        outputs = _answers(model, images)
    arrays = {"features": outputs.features}
    if outputs.logits is not None:
        arrays["logits"] = outputs.logits
    return {name: _rounded(np.asarray(array, np.float64)) for name, array in arrays.items()}


def _in_float32(model: Any) -> Any:
    encoder = getattr(model, "encoder", model)
    if getattr(encoder.module, "dtype", None) in (None, jnp.float32):
        return model
    encoder = encoder.replace(module=encoder.module.clone(dtype=jnp.dtype("float32")))
    return model.replace(encoder=encoder) if hasattr(model, "encoder") else encoder


@jax.jit  # once, so that a second encoder of the same shapes compiles nothing
def _answers(model: Any, images: jax.Array) -> Any:
    return model(images).without_taps()


def _rounded(array: np.ndarray) -> list[list[float]]:
    return [[float(f"{number:.7g}") for number in row] for row in array]


def largest_difference(outputs: Any, stored: Any) -> float:
    """Returns by how much of its length a vector has moved at most; infinite if shapes differ.

    Example:
      >>> largest_difference({"features": [[3.0, 4.0]]}, {"features": [[0.0, 0.0]]})
      1.0
    """
    if outputs.keys() != stored.keys():
        return float("inf")
    largest = 0.0
    for name, rows in stored.items():
        now, then = np.asarray(outputs[name], np.float64), np.asarray(rows, np.float64)
        if now.shape != then.shape or not np.isfinite(now).all():
            return float("inf")
        # Of the longer one, so that a vector that has vanished has moved by all of its length.
        lengths = np.maximum(np.linalg.norm(now, axis=-1), np.linalg.norm(then, axis=-1))
        moved = np.linalg.norm(now - then, axis=-1)
        shares = np.divide(moved, lengths, out=np.zeros_like(moved), where=lengths > 0)
        largest = max(largest, float(shares.max(initial=0.0)))
    return round(largest, 7)

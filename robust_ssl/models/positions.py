"""Positions of a vision transformer for images of another size."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from robust_ssl.models import vit
from robust_ssl.types import Encoder

# Name -> who does so; ``torch.nn.functional.interpolate(mode="bicubic")`` with these arguments.
RESIZINGS = {
    "bicubic": "transformers, MAE: no smoothing when it shrinks",
    "antialias": "timm, DINOv2 with registers, open_clip: antialias=True",
    "offset": "the DINO, iBOT and DINOv2 releases: a scale factor for a tenth of a patch more",
    "corners": "torchvision: align_corners=True",
}


def resize_positions(encoder: Encoder, image_size: int, resizing: str = "bicubic") -> Encoder:
    """Returns a ViT encoder for images of another size, its positions interpolated.

    All ways are cubic and all are somebody's: an encoder is resized as its authors do.  The
    position of the class token stays.  What the encoder was trained on it no longer is: say so
    wherever its results are shown.

    Args:
      encoder: A `ViT` with its weights.
      image_size: New height and width, pixels; a multiple of the patch size.
      resizing: A name in `RESIZINGS`.

    Returns:
      The encoder with new ``embed/position``; the very same where the size is.

    Raises:
      ValueError: If the module is not a `ViT`, the patches do not tile the new image, or the way
        is not known.

    Example:
      >>> from robust_ssl import models
      >>> encoder = models.vit_tiny(jax.random.key(0), image_size=16, depth=1)
      >>> resize_positions(encoder, 24)(jnp.zeros((24, 24, 3))).taps["embed"].shape
      (37, 192)

    References:
      Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, Section 3.2 (resolution).
    """
    if not isinstance(encoder.module, vit.ViT):
        raise ValueError(f"only a ViT has positions, this is a {type(encoder.module).__name__}")
    if resizing not in RESIZINGS:
        raise ValueError(f"no resizing {resizing!r}; there are {', '.join(RESIZINGS)}")
    module = encoder.module.clone(image_size=image_size)
    vit.check(module)
    old, new = (size // module.patch_size for size in (encoder.module.image_size, image_size))
    if old == new:
        return encoder
    if not module.has_positions:  # computed from where a patch is, in an image of any size
        return encoder.replace(module=module, image_size=image_size)
    params = dict(encoder.variables["params"])
    # On the host in float64, rounded once: the resized positions are stored like trained ones.
    position = np.asarray(params["embed"]["position"])
    first = int(module.class_token)
    # Without the class token, which has no place in the image.
    grid = position[0, first:].reshape(old, old, module.width)
    weights = _weights(old, new, resizing)
    grid = np.einsum("yi,xj,ijc->yxc", weights, weights, grid.astype(np.float64))
    patches = grid.reshape(1, new * new, module.width).astype(np.float32)
    position = jnp.asarray(np.concatenate([position[:, :first], patches], axis=1))
    params["embed"] = {**params["embed"], "position": position}
    variables = {**encoder.variables, "params": params}
    return encoder.replace(variables=variables, module=module, image_size=image_size)


def _weights(old: int, new: int, resizing: str) -> np.ndarray:
    """Weights ``[new, old]`` of one axis."""
    if resizing == "antialias":
        return _antialiased(old, new)
    if resizing == "corners":
        places = np.linspace(0, old - 1, new) if new > 1 else np.zeros(1)
        return _cubic(old, places)
    # DINO asks for a tenth of a patch more, and torch takes the scale from what is asked for.
    scale = (new + 0.1) / old if resizing == "offset" else new / old
    return _cubic(
        old, (np.arange(new) + 0.5) / scale - 0.5
    )  # corners not aligned: pixels are areas


def _cubic(old: int, places: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Cubic convolution (Keys, 1981) at some places; beyond the edge is the edge."""
    weights = np.zeros((len(places), old))
    for i, center in enumerate(places):
        for j in range(int(np.floor(center)) - 1, int(np.floor(center)) + 3):
            weights[i, min(max(j, 0), old - 1)] += _kernel(np.abs(center - j), a)
    return weights


def _antialiased(old: int, new: int) -> np.ndarray:
    """A cubic as wide as the step, over what lies within the image; torch has a = -0.5 here."""
    scale = old / new
    stretch = max(scale, 1.0)
    weights = np.zeros((new, old))
    for i in range(new):
        center = scale * (i + 0.5)
        first = max(int(center - 2 * stretch + 0.5), 0)
        end = min(int(center + 2 * stretch + 0.5), old)
        row = _kernel(np.abs((np.arange(first, end) - center + 0.5) / stretch), -0.5)
        weights[i, first:end] = row / row.sum()
    return weights


def _kernel(x: np.ndarray, a: float) -> np.ndarray:
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))

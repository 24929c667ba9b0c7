"""Positions of a vision transformer for images of another size."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from robust_ssl.models import vit
from robust_ssl.types import Encoder


def resize_positions(encoder: Encoder, image_size: int) -> Encoder:
    """Returns a ViT encoder for images of another size, its positions interpolated.

    Bicubic as in the DINO, DINOv2 and Hugging Face code (``torch.nn.functional.interpolate`` with
    ``mode="bicubic"``: a = -0.75, corners not aligned, no smoothing when it shrinks).  The
    position of the class token stays.  What the encoder was trained on it no longer is: say so
    wherever its results are shown.

    Args:
      encoder: A `ViT` with its weights.
      image_size: New height and width, pixels; a multiple of the patch size.

    Returns:
      The encoder with new ``embed/position``; the very same where the size is.

    Raises:
      ValueError: If the module is not a `ViT` or the patches do not tile the new image.

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
    module = encoder.module.clone(image_size=image_size)
    vit.check(module)
    old, new = (size // module.patch_size for size in (encoder.module.image_size, image_size))
    if old == new:
        return encoder
    params = dict(encoder.variables["params"])
    # On the host in float64, rounded once: the resized positions are stored like trained ones.
    position = np.asarray(params["embed"]["position"])
    first = int(module.class_token)
    # Without the class token, which has no place in the image.
    grid = position[0, first:].reshape(old, old, module.width)
    weights = _bicubic(old, new)
    grid = np.einsum("yi,xj,ijc->yxc", weights, weights, grid.astype(np.float64))
    patches = grid.reshape(1, new * new, module.width).astype(np.float32)
    position = jnp.asarray(np.concatenate([position[:, :first], patches], axis=1))
    params["embed"] = {**params["embed"], "position": position}
    variables = {**encoder.variables, "params": params}
    return encoder.replace(variables=variables, module=module, image_size=image_size)


def _bicubic(old: int, new: int, a: float = -0.75) -> np.ndarray:
    """Weights ``[new, old]`` of cubic convolution (Keys, 1981); beyond the edge is the edge."""
    weights = np.zeros((new, old))
    for i in range(new):
        center = (i + 0.5) * old / new - 0.5  # corners not aligned: pixels are areas
        for j in range(int(np.floor(center)) - 1, int(np.floor(center)) + 3):
            x = abs(center - j)
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            far = a * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[i, min(max(j, 0), old - 1)] += near if x <= 1 else far
    return weights

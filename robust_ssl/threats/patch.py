"""A square of pixels that the attacker replaces."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from robust_ssl import struct

MARGIN = 14 / 64  # AdvEncoder-PAT: 14 pixels from the lower and the right edge at 64x64


@struct.dataclass
class Patch:
    """The attacker replaces a square of the image by any pixels in [0, 1].

    A *delta* is a canvas ``[H, W, 3]`` that holds the patch's pixel *values* at the canonical place
    and zeros elsewhere.  The canonical place is AdvEncoder's, near the lower right corner (a patch
    too large for its distance from the edges moves up and left until it fits).

    With ``location="random"`` the patch is shifted to a place drawn, uniformly among those inside
    the image, from the image's key: a new one per step in fitting, one per image in attacking.
    A per-image attack works at the canonical place whatever `location` is, since `sample` and
    `project` know one image and no key of it; so does a universal patch that gets no key.

    Attributes:
      area: Share of the image's pixels, above 0 and at most 1.  The side is the largest whole
        number of pixels that stays within it.  A leaf.
      location: ``"fixed"`` or ``"random"``.
      key: Of the current step, set by `keyed` while a perturbation is fitted; otherwise None.

    Raises:
      ValueError: If `location` is neither.

    Example:
      >>> patch = Patch(0.25)
      >>> moved = patch.apply(jnp.ones((4, 4, 3)), jnp.zeros((4, 4, 3)))
      >>> moved[..., 0].astype(int).tolist()
      [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]

    References:
      Zhou et al., "Downstream-agnostic Adversarial Examples", ICCV 2023, AdvEncoder-PAT; place and
      area are those of the authors' code.
    """

    area: jax.Array | float = 0.03  # AdvEncoder's released code
    location: Literal["fixed", "random"] = struct.field(pytree_node=False, default="fixed")
    key: jax.Array | None = None

    def __post_init__(self):
        """Checks the location."""
        if self.location not in ("fixed", "random"):
            raise ValueError(f"location must be 'fixed' or 'random', got {self.location!r}")

    def check(self, image_shape: tuple[int, ...] | None = None) -> None:
        """Raises ValueError unless the patch has at least one pixel and fits the image."""
        for area in np.asarray(self.area, np.float64).reshape(-1):
            if not 0 < area <= 1:
                raise ValueError(
                    "the area of a patch is a share of the image, above 0 and at most 1 (0.03 is "
                    f"3 %), got {area}"
                )
            if image_shape is not None:
                _check_patch_fits(area, *image_shape[:2])

    def place(self, height: int, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the side, the top row and the left column of the canonical place, int32.

        Example:
          >>> [int(number) for number in Patch(0.03).place(64, 64)]
          [11, 39, 39]
        """
        # Squares are common areas (0.25 is 32 of 64): rounding must not cost them a pixel.
        exact = jnp.sqrt(jnp.asarray(self.area, jnp.float32) * (height * width))
        side = jnp.floor(exact + 1e-3).astype(jnp.int32)
        ends = (round(size * (1 - MARGIN)) for size in (height, width))
        top, left = (jnp.maximum(end - side, 0) for end in ends)
        return side, top, left

    def mask(self, height: int, width: int) -> jax.Array:
        """Returns where the canonical place is, bool ``[H, W, 1]``."""
        side, *corner = self.place(height, width)
        return square_mask((height, width), side, corner)

    def sample(self, key: jax.Array, image: jax.Array) -> jax.Array:
        """Returns the image with a patch of uniformly random pixels at the canonical place."""
        return self.project(jax.random.uniform(key, image.shape, image.dtype), image)

    def project(self, candidate: jax.Array, image: jax.Array) -> jax.Array:
        """Returns the image with the candidate's pixels, cut to [0, 1], at the canonical place."""
        return jnp.where(self.mask(*image.shape[:2]), jnp.clip(candidate, 0.0, 1.0), image)

    def steepest(self, gradient: jax.Array) -> jax.Array:
        """Returns the sign of the gradient: all pixels move by one, zeros stay."""
        return jnp.sign(gradient)

    def keyed(self, key: jax.Array) -> Patch:
        """Returns the threat for one step of fitting, from whose key each image makes its own."""
        return self.replace(key=key) if self.location == "random" else self

    def apply(self, delta: jax.Array, image: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Returns the image with the patch in it; all other pixels are the image's own, bit by bit.

        Only the canonical place of the canvas `delta` is looked at.  The key draws another place
        where `location` is ``"random"``.
        """
        height, width, _ = image.shape
        side, top, left = self.place(height, width)
        # Only the values are cut: a pixel at 0 or 1 must still feel which way it is pulled.
        delta = delta + lax.stop_gradient(jnp.clip(delta, 0.0, 1.0) - delta)
        if self.location == "random" and key is not None:
            row_key, column_key = jax.random.split(key)
            row = jax.random.randint(row_key, (), 0, height - side + 1)
            column = jax.random.randint(column_key, (), 0, width - side + 1)
            # The square lies inside before and after, so what wraps around is never looked at.
            delta = jnp.roll(delta, (row - top, column - left), (0, 1))
            top, left = row, column
        return jnp.where(square_mask((height, width), side, (top, left)), delta, image)

    def sample_delta(self, key: jax.Array, image_shape: tuple[int, ...]) -> jax.Array:
        """Returns a canvas with uniformly random pixels in the patch, ``[H, W, 3]``."""
        return self.project_delta(jax.random.uniform(key, image_shape))

    def project_delta(self, delta: jax.Array) -> jax.Array:
        """Returns the canvas with the patch cut to [0, 1] and zeros elsewhere."""
        return self.project(delta, jnp.zeros_like(delta))

    def delta_of(self, pattern: jax.Array) -> jax.Array:
        """Returns the patch whose pixels a pattern in [-1, 1] draws between black and white."""
        return self.project_delta(0.5 + 0.5 * pattern)

    def resize_delta(self, delta: jax.Array, size: tuple[int, int]) -> jax.Array:
        """Returns the patch, scaled (bilinear), on a canvas of another size: the same area."""
        (side, *old), (new_side, *new) = self.place(*delta.shape[:2]), self.place(*size)
        for axis, start in enumerate(old):  # its rim goes on outside, so that no zeros mix in
            inside = jnp.clip(jnp.arange(delta.shape[axis]), start, start + side - 1)
            delta = jnp.take(delta, inside, axis=axis)
        scale = new_side / side
        starts = jnp.stack(new) - jnp.stack(old) * scale
        shape = (*size, delta.shape[-1])
        scales = jnp.stack([scale, scale])
        return self.project_delta(
            jax.image.scale_and_translate(delta, shape, (0, 1), scales, starts, "bilinear")
        )


def square_mask(pixels: tuple[int, int], side, corner) -> jax.Array:
    """Returns where a square is, bool ``[H, W, 1]``; its side and corner may be traced."""
    rows, columns = (jnp.arange(size) - corner[axis] for axis, size in enumerate(pixels))
    rows, columns = (rows >= 0) & (rows < side), (columns >= 0) & (columns < side)
    return rows.reshape(-1, 1, 1) & columns.reshape(1, -1, 1)


def _check_patch_fits(area: float, height: int, width: int) -> None:
    side = np.sqrt(area * height * width)
    if side + 1e-3 < 1:
        raise ValueError(
            f"a patch of area {area:g} has no pixel in an image of {height}x{width}; take at "
            f"least {1 / (height * width):.2g}"
        )
    shorter = min(height, width)
    if int(side + 1e-3) > shorter:
        raise ValueError(
            f"a patch of area {area:g} is {int(side + 1e-3)} pixels wide and larger than the "
            f"image of {height}x{width}; take at most {shorter**2 / (height * width):.2g}"
        )

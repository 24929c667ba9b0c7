"""Random views of an image, computed on the devices; each function takes one image.

Color operations follow torchvision's definitions; hue and gray come from dm-pix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import dm_pix
import jax
import jax.numpy as jnp

from robust_ssl import struct


def random_resized_crop(
    key: jax.Array,
    image: jax.Array,
    *,
    scale: tuple[float, float] = (0.2, 1.0),  # share of the area; Chen et al. 2020, App. A
    log_ratio: float = 0.2877,  # log(4/3): aspect ratio between 3/4 and 4/3, the same
    size: int | None = None,
) -> jax.Array:
    """Cuts a random rectangle and resizes it bilinearly.

    Args:
      key: Random key.
      image: Pixels, float ``[H, W, 3]``.
      scale: Smallest and largest share of the area.
      log_ratio: Largest absolute logarithm of the aspect ratio.
      size: Height and width of the result, pixels; None is the image's own.

    Returns:
      Pixels, float ``[size, size, 3]``.

    Example:
      >>> image = jnp.full((8, 8, 3), 0.5)
      >>> bool(jnp.allclose(random_resized_crop(jax.random.key(0), image), 0.5, atol=1e-6))
      True
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"a crop keeps a share in (0, 1] of the area, got {scale}")
    height, width, _ = image.shape
    area_key, ratio_key, top_key, left_key = jax.random.split(key, 4)
    area = jax.random.uniform(area_key, minval=scale[0], maxval=scale[1])
    ratio = jnp.exp(jax.random.uniform(ratio_key, minval=-log_ratio, maxval=log_ratio))
    # Shares of the image's height and width; a crop never leaves the image.
    down = jnp.minimum(jnp.sqrt(area / ratio), 1.0)
    across = jnp.minimum(jnp.sqrt(area * ratio), 1.0)
    top = jax.random.uniform(top_key) * (1 - down) * height
    left = jax.random.uniform(left_key) * (1 - across) * width
    shape = image.shape if size is None else (size, size, 3)
    zoom = jnp.stack([shape[0] / height / down, shape[1] / width / across])
    return jax.image.scale_and_translate(
        image,
        shape,
        (0, 1),
        zoom,
        -jnp.stack([top, left]) * zoom,
        method="linear",
        antialias=size is not None,  # a crop of the image's own size is never shrunk
    )


def color_jitter(
    key: jax.Array,
    image: jax.Array,
    *,
    brightness: float = 0.8,  # solo-learn's CIFAR recipes
    contrast: float = 0.8,
    saturation: float = 0.8,
    hue: float = 0.2,
) -> jax.Array:
    """Scales brightness, contrast and saturation by ``1 + U[-s, s]`` and turns the hue.

    Args:
      key: Random key.
      image: Pixels in [0, 1], float ``[H, W, 3]``.
      brightness: Half-width of the factor's range.
      contrast: The same, about the mean gray.
      saturation: The same, about each pixel's gray.
      hue: Largest turn, as a share of the color circle.

    Returns:
      Pixels in [0, 1], float ``[H, W, 3]``.

    Example:
      >>> same = dict(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)
      >>> image = jnp.full((4, 4, 3), 0.25)
      >>> bool(jnp.allclose(color_jitter(jax.random.key(0), image, **same), image, atol=1e-6))
      True
    """
    factors = jax.random.uniform(key, (4,), minval=-1.0, maxval=1.0)
    image = jnp.clip(image * (1 + factors[0] * brightness), 0, 1)
    mean = jnp.mean(dm_pix.rgb_to_grayscale(image))
    image = jnp.clip(mean + (image - mean) * (1 + factors[1] * contrast), 0, 1)
    gray = dm_pix.rgb_to_grayscale(image)
    image = jnp.clip(gray + (image - gray) * (1 + factors[2] * saturation), 0, 1)
    return jnp.clip(dm_pix.adjust_hue(image, factors[3] * hue), 0, 1)


@struct.dataclass
class View:
    """How one random view is made: crop, flip, colors, gray, blur, solarise, in this order.

    The defaults are SimCLR's on small images.  ``view(key, image)`` takes pixels in [0, 1], float
    ``[H, W, 3]``, and returns the same, ``[size, size, 3]``.

    Attributes:
      min_scale: Smallest share of the area that the crop keeps.
      max_scale: Largest.
      jitter: Probability of `color_jitter`.
      brightness: See `color_jitter`; the next three too.
      contrast: ...
      saturation: ...
      hue: ...
      gray: Probability that the view has no color.
      blur: Probability of a Gaussian blur, its deviation uniform between 0.1 and 2 pixels.
      solarise: Probability that all pixels of at least one half are inverted.
      flip: Probability of a mirrored image.
      size: Height and width of the view, pixels; None is the image's own.

    Example:
      >>> View()(jax.random.key(0), jnp.zeros((8, 8, 3))).shape
      (8, 8, 3)
      >>> View(max_scale=0.4, size=4)(jax.random.key(0), jnp.zeros((8, 8, 3))).shape
      (4, 4, 3)

    References:
      Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML
      2020, App. A and B.9 (CIFAR-10: no blur); Grill et al., "Bootstrap Your Own Latent", NeurIPS
      2020, App. B (solarise); probabilities as in solo-learn's CIFAR recipes.
    """

    min_scale: float = struct.field(pytree_node=False, default=0.2)
    max_scale: float = struct.field(pytree_node=False, default=1.0)
    jitter: float = struct.field(pytree_node=False, default=0.8)
    brightness: float = struct.field(pytree_node=False, default=0.8)
    contrast: float = struct.field(pytree_node=False, default=0.8)
    saturation: float = struct.field(pytree_node=False, default=0.8)
    hue: float = struct.field(pytree_node=False, default=0.2)
    gray: float = struct.field(pytree_node=False, default=0.2)
    blur: float = struct.field(pytree_node=False, default=0.0)
    solarise: float = struct.field(pytree_node=False, default=0.0)
    flip: float = struct.field(pytree_node=False, default=0.5)
    size: int | None = struct.field(pytree_node=False, default=None)

    def __call__(self, key: jax.Array, image: jax.Array) -> jax.Array:
        """Returns the view of one image."""
        crop_key, flip_key, color_key, gray_key, blur_key, solarise_key = jax.random.split(key, 6)
        scale = (self.min_scale, self.max_scale)
        image = random_resized_crop(crop_key, image, scale=scale, size=self.size)
        image = _sometimes(flip_key, self.flip, lambda x: x[:, ::-1], image)
        image = jnp.clip(image, 0, 1)
        image = _sometimes(color_key, self.jitter, self._jittered(color_key), image)
        image = _sometimes(gray_key, self.gray, _gray, image)
        image = _sometimes(blur_key, self.blur, functools.partial(gaussian_blur, blur_key), image)
        return _sometimes(solarise_key, self.solarise, _solarised, image)

    def _jittered(self, key: jax.Array) -> Callable[[jax.Array], jax.Array]:
        return functools.partial(
            color_jitter,
            jax.random.fold_in(key, 1),
            brightness=self.brightness,
            contrast=self.contrast,
            saturation=self.saturation,
            hue=self.hue,
        )


# solo-learn's scripts/pretrain/cifar/augmentations, which BYOL's Table 6 is the origin of.
_BYOL_COLOURS = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
SYMMETRIC = (View(min_scale=0.08, blur=0.5),) * 2
SYMMETRIC_WEAK = (
    View(min_scale=0.08, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur=0.5),
) * 2
ASYMMETRIC = (
    View(min_scale=0.08, **_BYOL_COLOURS),
    View(min_scale=0.08, solarise=0.2, **_BYOL_COLOURS),
)
STRONG_AND_WEAK = (
    View(min_scale=0.08, blur=0.5, **_BYOL_COLOURS),
    View(min_scale=0.08, jitter=0.0, gray=0.0),
)


def random_views(
    key: jax.Array, image: jax.Array, views: Sequence[View], *, min_scale: float | None = None
) -> tuple[jax.Array, ...]:
    """Returns one random view of an image for each way of making one.

    Args:
      key: Random key.
      image: Pixels in [0, 1], float ``[H, W, 3]``.
      views: How each one is made.
      min_scale: In place of theirs, if it is given.

    Example:
      >>> [view.shape for view in random_views(jax.random.key(0), jnp.zeros((8, 8, 3)), SYMMETRIC)]
      [(8, 8, 3), (8, 8, 3)]
    """
    if min_scale is not None:
        views = [view.replace(min_scale=min_scale) for view in views]
    keys = jax.random.split(key, len(views))
    return tuple(view(key, image) for key, view in zip(keys, views, strict=True))


def _sometimes(
    key: jax.Array,
    probability: float,
    change: Callable[[jax.Array], jax.Array],
    image: jax.Array,
) -> jax.Array:
    """Changes the image with the given probability; what can never be is never compiled."""
    if probability == 0:
        return image
    return jnp.where(jax.random.bernoulli(key, probability), change(image), image)


def _gray(image: jax.Array) -> jax.Array:
    return jnp.broadcast_to(dm_pix.rgb_to_grayscale(image), image.shape)


def _solarised(image: jax.Array) -> jax.Array:
    return dm_pix.solarize(image, 0.5)


def gaussian_blur(key: jax.Array, image: jax.Array, *, max_sigma: float = 2.0) -> jax.Array:
    """Blurs with a Gaussian whose deviation is uniform between 0.1 and `max_sigma` pixels.

    The kernel is cut at a tenth of the image's height, as in SimCLR, but at least at 3 pixels.

    Args:
      key: Random key.
      image: Pixels, float ``[H, W, 3]``.
      max_sigma: Largest deviation, pixels.

    Returns:
      Pixels, float ``[H, W, 3]``; beyond the border lies the border's own pixel.

    Example:
      >>> image = jnp.full((8, 8, 3), 0.5)
      >>> bool(jnp.allclose(gaussian_blur(jax.random.key(0), image), image))
      True

    References:
      Chen et al., ICML 2020, App. A.
    """
    sigma = jax.random.uniform(jax.random.fold_in(key, 1), minval=0.1, maxval=max_sigma)
    reach = max(image.shape[0] // 20, 1)
    offsets = jnp.arange(-reach, reach + 1)
    weights = jax.nn.softmax(-(offsets**2) / (2 * sigma**2))
    # Weighted shifts: with a deviation per image, a convolution would have a kernel per image,
    # which is slow on every backend.
    for axis in (0, 1):
        padding = [(reach, reach) if axis == other else (0, 0) for other in range(3)]
        padded = jnp.pad(image, padding, mode="edge")
        image = sum(
            weights[i] * jax.lax.slice_in_dim(padded, i, i + image.shape[axis], axis=axis)
            for i in range(2 * reach + 1)
        )
    return image


def flip_and_shift(key: jax.Array, image: jax.Array, *, shift: int = 4) -> jax.Array:
    """The usual supervised augmentation of small images: random flip, then a padded crop.

    Args:
      key: Random key.
      image: Pixels in [0, 1], float ``[H, W, 3]``.
      shift: Largest shift along each axis, pixels; black fills what comes in.

    Returns:
      Pixels in [0, 1], float ``[H, W, 3]``.

    Example:
      >>> flip_and_shift(jax.random.key(0), jnp.ones((8, 8, 3)), shift=0).min().item()
      1.0
    """
    return shift_only(
        key,
        jnp.where(jax.random.bernoulli(jax.random.fold_in(key, 1)), image[:, ::-1], image),
        shift=shift,
    )


def crop_and_flip(
    key: jax.Array,
    image: jax.Array,
    *,
    smallest: float = 0.08,  # Szegedy et al. 2015; the usual crop of ImageNet training
    flip: bool = True,
) -> jax.Array:
    """The usual supervised augmentation of large images: random resized crop, then random flip.

    Args:
      key: Random key.
      image: Pixels in [0, 1], float ``[H, W, 3]``.
      smallest: Smallest share of the area that a crop keeps, in (0, 1]; a fine-tuning of few epochs
        takes 0.5 or so.
      flip: Whether half of the images are mirrored.

    Returns:
      Pixels in [0, 1], float ``[H, W, 3]``.

    Raises:
      ValueError: If `smallest` is not in (0, 1].

    Example:
      >>> crop_and_flip(jax.random.key(0), jnp.ones((8, 8, 3)), smallest=0.5).shape
      (8, 8, 3)

    References:
      Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, Section 6.
    """
    if not 0 < smallest <= 1:
        raise ValueError(f"smallest is a share of the area in (0, 1], got {smallest}")
    image = random_resized_crop(key, image, scale=(smallest, 1.0))
    if flip:
        mirrored = jax.random.bernoulli(jax.random.fold_in(key, 4))  # the crop has taken 0 to 3
        image = jnp.where(mirrored, image[:, ::-1], image)
    return jnp.clip(image, 0, 1)  # interpolation rounds


def shift_only(key: jax.Array, image: jax.Array, *, shift: int = 2) -> jax.Array:
    """A padded random crop, for digits and signs, which a mirror changes.

    Args:
      key: Random key.
      image: Pixels in [0, 1], float ``[H, W, 3]``.
      shift: Largest shift along each axis, pixels; black fills what comes in.

    Returns:
      Pixels in [0, 1], float ``[H, W, 3]``.

    Example:
      >>> shift_only(jax.random.key(0), jnp.ones((8, 8, 3)), shift=0).min().item()
      1.0
    """
    padded = jnp.pad(image, ((shift, shift), (shift, shift), (0, 0)))
    top, left = jax.random.randint(key, (2,), 0, 2 * shift + 1)
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)

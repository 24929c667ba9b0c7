"""Random views of an image, computed on the devices; each function takes one image.

Colour operations follow torchvision's definitions; hue and grey come from dm-pix.
"""

from __future__ import annotations

import dm_pix
import jax
import jax.numpy as jnp


def random_resized_crop(
    key: jax.Array,
    image: jax.Array,
    *,
    scale: tuple[float, float] = (0.2, 1.0),  # share of the area; Chen et al. 2020, App. A
    log_ratio: float = 0.2877,  # log(4/3): aspect ratio between 3/4 and 4/3, the same
) -> jax.Array:
    """Cuts a random rectangle and resizes it to the image's own size, bilinearly.

    Args:
      key: Random key.
      image: Pixels, float ``[H, W, 3]``.
      scale: Smallest and largest share of the area.
      log_ratio: Largest absolute logarithm of the aspect ratio.

    Returns:
      Pixels, float ``[H, W, 3]``.

    Example:
      >>> image = jnp.full((8, 8, 3), 0.5)
      >>> bool(jnp.allclose(random_resized_crop(jax.random.key(0), image), 0.5, atol=1e-6))
      True
    """
    height, width, _ = image.shape
    area_key, ratio_key, top_key, left_key = jax.random.split(key, 4)
    area = jax.random.uniform(area_key, minval=scale[0], maxval=scale[1])
    ratio = jnp.exp(jax.random.uniform(ratio_key, minval=-log_ratio, maxval=log_ratio))
    # Shares of the image's height and width; a crop never leaves the image.
    down = jnp.minimum(jnp.sqrt(area / ratio), 1.0)
    across = jnp.minimum(jnp.sqrt(area * ratio), 1.0)
    top = jax.random.uniform(top_key) * (1 - down) * height
    left = jax.random.uniform(left_key) * (1 - across) * width
    zoom = jnp.stack([1 / down, 1 / across])
    return jax.image.scale_and_translate(
        image,
        image.shape,
        (0, 1),
        zoom,
        -jnp.stack([top, left]) * zoom,
        method="linear",
        antialias=False,  # crops are enlarged, never shrunk
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
      contrast: The same, about the mean grey.
      saturation: The same, about each pixel's grey.
      hue: Largest turn, as a share of the colour circle.

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
    grey = dm_pix.rgb_to_grayscale(image)
    image = jnp.clip(grey + (image - grey) * (1 + factors[2] * saturation), 0, 1)
    return jnp.clip(dm_pix.adjust_hue(image, factors[3] * hue), 0, 1)


def simclr_view(
    key: jax.Array,
    image: jax.Array,
    *,
    min_scale: float = 0.2,
    jitter: float = 0.8,  # probability
    grey: float = 0.2,  # probability
) -> jax.Array:
    """One view as SimCLR makes it on small images: crop, flip, colours, sometimes grey.

    Args:
      key: Random key.
      image: Pixels in [0, 1], float ``[H, W, 3]``.
      min_scale: Smallest share of the area that a crop keeps.
      jitter: Probability of `color_jitter`.
      grey: Probability that the view has no colour.

    Returns:
      Pixels in [0, 1], float ``[H, W, 3]``.

    Example:
      >>> simclr_view(jax.random.key(0), jnp.zeros((8, 8, 3))).shape
      (8, 8, 3)

    References:
      Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML
      2020, App. A and B.9 (CIFAR-10: no blur); probabilities as in solo-learn's CIFAR recipes.
    """
    crop_key, flip_key, jitter_key, color_key, grey_key = jax.random.split(key, 5)
    image = random_resized_crop(crop_key, image, scale=(min_scale, 1.0))
    image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
    image = jnp.clip(image, 0, 1)
    jittered = color_jitter(color_key, image)
    image = jnp.where(jax.random.bernoulli(jitter_key, jitter), jittered, image)
    return jnp.where(
        jax.random.bernoulli(grey_key, grey),
        jnp.broadcast_to(dm_pix.rgb_to_grayscale(image), image.shape),
        image,
    )


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

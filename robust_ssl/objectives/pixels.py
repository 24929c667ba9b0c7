"""Objectives on the perturbation itself, and AdvEncoder's, which adds them to the features."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from robust_ssl.frequencies import high_pass
from robust_ssl.objectives.features import info_nce
from robust_ssl.objectives.vectors import safe_norm
from robust_ssl.types import AttackInputs


def pixel_l2(inputs: AttackInputs) -> jax.Array:
    """Measures the size of the perturbation, ``||x' - x||`` over all pixels and channels.

    Args:
      inputs: Reads ``adversarial_images`` and ``clean_images``.

    Returns:
      Mean over the batch, at least 0, pixel units; the gradient at equality is zero.
    """
    change = inputs.adversarial_images - inputs.clean_images
    return jnp.mean(safe_norm(change, axis=(1, 2, 3)))


def high_frequency_change(inputs: AttackInputs, *, cutoff: float = 8 / 64) -> jax.Array:
    """Measures the part of the perturbation that is edges and texture, as an L2 norm.

    The filter is linear, so it sees the difference of the images once.

    Args:
      inputs: Reads ``adversarial_images`` and ``clean_images``.
      cutoff: As in `high_pass`, cycles per pixel.

    Returns:
      Mean over the batch, at least 0 and at most `pixel_l2`.

    References:
      Zhou et al., ICCV 2023.
    """
    change = high_pass(inputs.adversarial_images - inputs.clean_images, cutoff=cutoff)
    return jnp.mean(safe_norm(change, axis=(1, 2, 3)))


def advencoder_paper(inputs: AttackInputs) -> jax.Array:
    """AdvEncoder as published: ``1 info_nce + 5 high_frequency_change - 1 pixel_l2``.

    The norms are L2 norms per image, so the frequency term weighs about as much as the features.

    Args:
      inputs: Reads features and images, both clean and adversarial, of at least two images.

    Returns:
      Scalar.

    References:
      Zhou et al., ICCV 2023; weights as other papers' comparisons report them.
    """
    return info_nce(inputs) + 5.0 * high_frequency_change(inputs) - pixel_l2(inputs)


def advencoder_released(inputs: AttackInputs) -> jax.Array:
    """AdvEncoder as released: ``5 info_nce - MSE(x', x) + MSE(highpass x', highpass x)``.

    The two squared errors are means over pixels, under 0.002 at any usual budget: in effect this
    is 5 times `info_nce`.

    Args:
      inputs: Reads features and images, both clean and adversarial, of at least two images.

    Returns:
      Scalar.

    References:
      The authors' code, github.com/CGCL-codes/AdvEncoder, commit 3dd1c4e.
    """
    change = inputs.adversarial_images - inputs.clean_images
    return 5.0 * info_nce(inputs) - jnp.mean(change**2) + jnp.mean(high_pass(change) ** 2)

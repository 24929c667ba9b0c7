"""Objectives on taps, the activations between pixels and features.

A layer is named, ``"stage1/block2"``, or counted: the taps whose name contains ``"block"``, in
natural order (``block2`` before ``block10``), are 0, 1, 2, ... and -1 is the last.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from robust_ssl.objectives.vectors import safe_norm
from robust_ssl.types import AttackInputs, Outputs

SMALLEST_NORM = 1e-6  # what the logarithm of a norm sees of a layer that is silent


def block_names(taps: Mapping[str, jax.Array]) -> list[str]:
    """Returns the names of the blocks from the pixels on.

    Args:
      taps: Activations by name.

    Returns:
      The names that contain ``"block"``, in natural order.

    Example:
      >>> block_names({"block10": 0, "block2": 0, "stem": 0})
      ['block2', 'block10']
    """

    def natural(name: str) -> list:
        parts = re.split(r"(\d+)", name)  # text, number, text, ...
        return [int(part) if place % 2 else part for place, part in enumerate(parts)]

    return sorted((name for name in taps if "block" in name), key=natural)


def activation(outputs: Outputs, layer: int | str) -> jax.Array:
    """Returns one tap by its name or by its place among the blocks.

    Args:
      outputs: With taps.
      layer: A tap's name, or the place of a block; negative places count from the last.

    Returns:
      The activation, float32 ``[batch, ...]``.

    Raises:
      ValueError: If there is no such tap; the message lists the taps.

    Example:
      >>> taps = {"stem": jnp.zeros((1, 2)), "block1": jnp.ones((1, 2))}
      >>> activation(Outputs(jnp.zeros((1, 2)), taps=taps), -1).tolist()
      [[1.0, 1.0]]
    """
    name = layer
    if not isinstance(layer, str):
        blocks = block_names(outputs.taps)
        name = blocks[layer] if -len(blocks) <= layer < len(blocks) else None
    if name not in outputs.taps:
        raise ValueError(
            f"there is no layer {layer!r}: give the name of a tap or the place of a block (0 is "
            f"the first, -1 the last); the taps are {sorted(outputs.taps)}, of which "
            f"{block_names(outputs.taps)} are blocks"
        )
    return outputs.taps[name].astype(jnp.float32)


def activation_energy(inputs: AttackInputs, *, layer: int | str = 0) -> jax.Array:
    r"""Measures how strongly a layer fires on the attacked images, ``mean(a'^2)``.

    Fine-tuning changes shallow layers least, so what lifts them survives it.

    Args:
      inputs: Reads ``adversarial.taps``.
      layer: As in `activation`.

    Returns:
      Mean over the batch and all units, at least 0.

    Raises:
      ValueError: If there is no such layer.

    Example:
      >>> outputs = Outputs(jnp.zeros((1, 2)), taps={"block1": jnp.array([[1.0, 3.0]])})
      >>> image = jnp.zeros((1, 8, 8, 3))
      >>> float(activation_energy(AttackInputs(outputs, outputs, image, image)))
      5.0

    References:
      Ban and Dong, "Pre-trained Adversarial Perturbations", NeurIPS 2022 (L4A-base).
    """
    return jnp.mean(activation(inputs.adversarial, layer) ** 2)


def fused_energy(inputs: AttackInputs, *, layer: int | str = 0, weight: float = 1.0) -> jax.Array:
    """Adds the energy of the next block to that of one block.

    Args:
      inputs: Reads ``adversarial.taps``.
      layer: The first of the two blocks, as in `activation`; it must be a block.
      weight: Of the next block.

    Returns:
      ``activation_energy(layer) + weight * activation_energy(next)``.

    Raises:
      ValueError: If there is no such block or none after it.

    Example:
      >>> taps = {"block1": jnp.array([[1.0, 3.0]]), "block2": jnp.array([[2.0, 2.0]])}
      >>> outputs, image = Outputs(jnp.zeros((1, 2)), taps=taps), jnp.zeros((1, 8, 8, 3))
      >>> float(fused_energy(AttackInputs(outputs, outputs, image, image), weight=0.5))
      7.0

    References:
      Ban and Dong, NeurIPS 2022 (L4A-fuse).
    """
    first = activation_energy(inputs, layer=layer)
    blocks = block_names(inputs.adversarial.taps)
    place = blocks.index(layer) if layer in blocks else layer
    if isinstance(place, str):
        raise ValueError(f"the layer {layer!r} is no block, so none is next; blocks are {blocks}")
    following = place % len(blocks) + 1
    if following == len(blocks):
        raise ValueError(f"no block comes after the layer {layer!r}; blocks are {blocks}")
    return first + weight * activation_energy(inputs, layer=following)


def activation_distance(inputs: AttackInputs, *, layer: int | str = 3) -> jax.Array:
    """Measures how far the attack has moved a layer, ``||a' - a||`` over all units of an image.

    Zero is a stationary point: an attack on it needs a random start.

    Args:
      inputs: Reads ``adversarial.taps`` and ``clean.taps``.
      layer: As in `activation`.

    Returns:
      Mean over the batch, at least 0; the gradient at equality is zero.

    Raises:
      ValueError: If there is no such layer.

    Example:
      >>> clean = Outputs(jnp.zeros((1, 2)), taps={"block1": jnp.zeros((1, 2))})
      >>> moved = Outputs(jnp.zeros((1, 2)), taps={"block1": jnp.array([[3.0, 4.0]])})
      >>> image = jnp.zeros((1, 8, 8, 3))
      >>> float(activation_distance(AttackInputs(clean, moved, image, image), layer=0))
      5.0

    References:
      Naseer et al., "A Self-supervised Approach for Adversarial Robustness", CVPR 2020
      (the self-supervised perturbation's feature distortion).
    """
    change = activation(inputs.adversarial, layer) - activation(inputs.clean, layer)
    return jnp.mean(safe_norm(change, axis=tuple(range(1, change.ndim))))


def log_activation_norms(
    inputs: AttackInputs, *, layers: Sequence[int | str] | None = None
) -> jax.Array:
    r"""Measures how strongly all layers fire together, ``sum over layers of log ||a'||``.

    The logarithm makes a doubling count the same in every layer, however large it is.

    Args:
      inputs: Reads ``adversarial.taps``.
      layers: As in `activation`; None is every block.

    Returns:
      Mean over the batch.  A silent layer counts as ``log(1e-6)`` and gets no gradient.

    Raises:
      ValueError: If a layer is missing, or there are no blocks to take.

    Example:
      >>> outputs = Outputs(jnp.zeros((1, 2)), taps={"block1": jnp.array([[3.0, 4.0]])})
      >>> image = jnp.zeros((1, 8, 8, 3))
      >>> round(float(log_activation_norms(AttackInputs(outputs, outputs, image, image))), 4)
      1.6094

    References:
      Mopuri et al., "Fast Feature Fool", BMVC 2017 (with mean activations); Mopuri et al.,
      "Generalizable Data-free Objective for Crafting Universal Adversarial Perturbations", TPAMI
      2018 (with norms).
    """
    outputs = inputs.adversarial
    chosen = (block_names(outputs.taps) or (0,)) if layers is None else layers
    values = [activation(outputs, layer) for layer in chosen]
    norms = jnp.stack([safe_norm(a, axis=tuple(range(1, a.ndim))) for a in values])
    return jnp.mean(jnp.sum(jnp.log(jnp.maximum(norms, SMALLEST_NORM)), axis=0))


def negative_dispersion(inputs: AttackInputs, *, layer: int | str = 3) -> jax.Array:
    """Measures how flat a layer has become, ``-std(a')`` over all units of an image.

    An activation without contrast tells the layers above nothing.

    Args:
      inputs: Reads ``adversarial.taps``.
      layer: As in `activation`.

    Returns:
      Mean over the batch, at most 0; the gradient at 0 is zero.

    Raises:
      ValueError: If there is no such layer.

    Example:
      >>> outputs = Outputs(jnp.zeros((1, 2)), taps={"block1": jnp.array([[1.0, 3.0]])})
      >>> image = jnp.zeros((1, 8, 8, 3))
      >>> float(negative_dispersion(AttackInputs(outputs, outputs, image, image), layer=0))
      -1.0

    References:
      Lu et al., "Enhancing Cross-Task Black-Box Transferability of Adversarial Examples with
      Dispersion Reduction", CVPR 2020, Algorithm 1.
    """
    values = activation(inputs.adversarial, layer)
    values = values.reshape(len(values), -1)
    centered = values - jnp.mean(values, axis=1, keepdims=True)
    return -jnp.mean(safe_norm(centered, axis=1)) / values.shape[1] ** 0.5

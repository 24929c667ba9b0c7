"""TDAA: moves an image's features to those of an image that the attacker chose."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from robust_ssl import struct
from robust_ssl.attacks.per_image import FeaturePGD
from robust_ssl.attacks.perturbation import value_of
from robust_ssl.objectives.vectors import safe_norm
from robust_ssl.types import AttackInputs, Model, Objective


def towards_target(inputs: AttackInputs) -> jax.Array:
    r"""Measures how near the features are to the target's, ``-||z' - z_target||``.

    Args:
      inputs: Reads ``adversarial.features`` and ``target.features``.

    Returns:
      Mean over the batch, at most 0; the gradient at 0 is zero.

    Raises:
      ValueError: If the attack brings no target.

    Example:
      >>> from robust_ssl.types import Outputs
      >>> here, there = Outputs(jnp.zeros((1, 2))), Outputs(jnp.array([[3.0, 4.0]]))
      >>> image = jnp.zeros((1, 8, 8, 3))
      >>> float(towards_target(AttackInputs(here, here, image, image, target=there)))
      -5.0
    """
    if inputs.target is None:
        raise ValueError("towards_target needs a target, and this attack brings none; take TDAA")
    target = jnp.broadcast_to(inputs.target.features, inputs.adversarial.features.shape)
    return -jnp.mean(safe_norm(inputs.adversarial.features - target, axis=-1))


@struct.dataclass
class TDAA(FeaturePGD):
    """Targeted downstream-agnostic attack: PGD towards the features of a chosen image.

    Whatever classifier stands on the encoder then says of the attacked image what it says of the
    chosen one, the *threat image*.  It needs the encoder only and no label.  The attributes that
    are not listed are those of `PGD`.

    Attributes:
      threat: What the attacker may do.
      target_image: The threat image, pixels in [0, 1], float ``[H, W, 3]``.
      objective: Nearness to ``AttackInputs.target``.

    Raises:
      ValueError: When called, if the image has another size than the target.

    Example:
      >>> from robust_ssl import models, threats
      >>> encoder = models.resnet18(jax.random.key(0), width=8, image_size=8)
      >>> attack = TDAA(threats.Linf(8 / 255), jnp.ones((8, 8, 3)), num_steps=1)
      >>> attack(jax.random.key(1), encoder, jnp.full((8, 8, 3), 0.5)).shape
      (8, 8, 3)

    References:
      Sabour et al., "Adversarial Manipulation of Deep Representations", ICLR 2016, Section 3 (the
      problem); Madry et al., ICLR 2018, Section 2.1 (the steps).
    """

    threat: Any
    target_image: jax.Array
    step_size: jax.Array | float | None = None
    objective: Objective = struct.field(pytree_node=False, default=towards_target)
    num_steps: int = struct.field(pytree_node=False, default=20)
    restarts: int = struct.field(pytree_node=False, default=1)
    keep_best: bool = struct.field(pytree_node=False, default=True)

    def _aim(self, model: Model, image: jax.Array) -> Objective:
        if image.shape != self.target_image.shape:
            raise ValueError(
                f"the target image has size {self.target_image.shape}, but the image has size "
                f"{image.shape}; resize it: jax.image.resize(target_image, {image.shape}, "
                '"bilinear")'
            )
        target = lax.stop_gradient(model(self.target_image[None]))

        def nearness(inputs: AttackInputs) -> jax.Array:
            return value_of(self.objective, inputs.replace(target=target))

        return nearness

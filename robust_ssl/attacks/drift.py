"""DriftPGD: drives what a model computes away from what the public encoder computed."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax

from robust_ssl import struct
from robust_ssl.attacks.per_image import FeaturePGD
from robust_ssl.objectives.layers import activation
from robust_ssl.types import AttackInputs, Model, Objective, Outputs


@struct.dataclass
class DriftPGD(FeaturePGD):
    r"""PGD away from the public encoder's clean features, or from one of its layers.

    .. math:: \max_{x'} \|a(x') - a^0(x)\|_2^2

    with :math:`a` of the model under training and :math:`a^0` of the public encoder: the inner
    attack of training that holds features (`losses.feature_preservation`) or layers
    (`losses.feature_drift`) in place.  It needs no label.  Where the model is still the public
    encoder the image itself is a stationary point, so the random start is not an option; the last
    point is returned, so it costs exactly `num_steps` gradients and one look of the public encoder.

    Attributes:
      threat: What the attacker may do.
      source: The public encoder, frozen; of the attacked model's architecture where a layer is
        compared.  Its weights are leaves: others do not compile again.
      step_size: Length of a step, pixel units; None is the usual one, as for `PGD`; the paper has
        1/255.  A leaf.
      layer: None compares the features; otherwise a tap's name or the place of a block (0 is the
        first, -1 the last), as in `objectives.activation`.
      num_steps: Gradient steps, at least 1.

    Raises:
      ValueError: If `num_steps` is below 1; when called, if there is no such layer.

    Example:
      >>> from robust_ssl import models, threats
      >>> encoder = models.resnet18(jax.random.key(0), width=8, image_size=8)
      >>> attack = DriftPGD(threats.Linf(8 / 255), encoder, layer="stage1/block1", num_steps=1)
      >>> attack(jax.random.key(1), encoder, jnp.full((8, 8, 3), 0.5)).shape
      (8, 8, 3)

    References:
      Schlarmann et al., "Robust CLIP: Unsupervised Adversarial Fine-Tuning of Vision Embeddings for
      Robust Large Vision-Language Models", ICML 2024 (FARE: the inner problem on features, ten
      steps of PGD); the layers are ours.
    """

    threat: Any
    source: Model
    step_size: jax.Array | float | None = None
    layer: int | str | None = struct.field(pytree_node=False, default=None)
    num_steps: int = struct.field(pytree_node=False, default=10)

    def __post_init__(self):
        """Checks the static fields."""
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")

    def _aim(self, model: Model, image: jax.Array) -> Objective:
        anchor = lax.stop_gradient(self._seen(self.source(image[None])))

        def drift(inputs: AttackInputs) -> jax.Array:
            seen = self._seen(inputs.adversarial)
            chex.assert_equal_shape([seen, anchor])
            return jnp.sum(jnp.square(seen - anchor))

        return drift

    def _seen(self, outputs: Outputs) -> jax.Array:
        """What is compared, with its batch axis of one."""
        return outputs.features if self.layer is None else activation(outputs, self.layer)

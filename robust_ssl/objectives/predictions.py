"""Objectives on predicted distributions: they need logits and no labels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import lax

from robust_ssl.types import AttackInputs


def kl_divergence(inputs: AttackInputs) -> jax.Array:
    r"""Measures how far the attack has moved the predicted distribution, in nats.

    .. math:: \mathrm{KL}\big(p(x) \,\|\, p(x')\big)

    What TRADES' inner attack raises.  Zero is a stationary point: an attack on it needs a random
    start, or it never leaves the image.

    Args:
      inputs: Reads ``adversarial.logits`` and ``clean.logits``, a constant that gets no gradient.

    Returns:
      Mean over the batch, at least 0.

    Raises:
      ValueError: If there are no logits.

    Example:
      >>> from robust_ssl.types import Outputs
      >>> guess = Outputs(features=jnp.zeros((1, 2)), logits=jnp.zeros((1, 2)))
      >>> surer = guess.replace(logits=jnp.array([[0.0, 20.0]]))
      >>> image = jnp.zeros((1, 8, 8, 3))
      >>> round(float(kl_divergence(AttackInputs(guess, surer, image, image))), 4)  # 10 - log(2)
      9.3069

    References:
      Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML 2019,
      Algorithm 1.
    """
    if inputs.clean.logits is None or inputs.adversarial.logits is None:
        raise ValueError(
            "objective kl_divergence needs logits, but the model has no head; attack a Classifier, "
            "or take an objective on features such as feature_l2"
        )
    clean = jax.nn.log_softmax(lax.stop_gradient(inputs.clean.logits))
    adversarial = jax.nn.log_softmax(inputs.adversarial.logits)
    return jnp.mean(optax.losses.kl_divergence_with_log_targets(adversarial, clean))

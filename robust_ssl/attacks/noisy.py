"""N-FGSM: one step from strong noise, not projected back; for training, not for scoring."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from robust_ssl import objectives, struct, threats
from robust_ssl.attacks.per_image import _objective_at
from robust_ssl.types import Model, Objective


@struct.dataclass
class NFGSM:
    r"""One step of the whole budget from noise of `noise` budgets, and no projection.

    .. math:: \tilde x = \mathrm{clip}_{[0, 1]}\big(x + \eta
              + \alpha\,\mathrm{sign}\nabla_x L(x + \eta)\big),
              \quad \eta \sim U[-k\epsilon, k\epsilon]

    The image leaves the ball: up to ``(k + 1) epsilon`` away.  So it is no attack under its threat,
    and accuracies under it say nothing of that budget.  In training the noise keeps a network from
    learning the one step alone (catastrophic overfitting), at the price of one gradient.

    Attributes:
      threat: `Linf`, whose budget is `epsilon`.
      step_size: `alpha`, pixel units; None is the budget, as in the paper.  A leaf.
      noise: `k`, in budgets.  A leaf.
      objective: What is raised.

    Raises:
      ValueError: If the threat is not `Linf`: the noise fills a box.

    Example:
      >>> from robust_ssl import models
      >>> encoder = models.resnet18(jax.random.key(0), width=8, image_size=8)
      >>> net = models.classifier(jax.random.key(1), encoder, 3, head="linear")
      >>> attack = NFGSM(threats.Linf(0.125), noise=0.0)  # from the image itself
      >>> image = jnp.full((8, 8, 3), 0.5)
      >>> moved = attack(jax.random.key(2), net, image, jnp.array(1))
      >>> float(jnp.abs(moved - image).max())
      0.125

    References:
      de Jorge et al., "Make Some Noise: Reliable and Efficient Single-Step Adversarial Training",
      NeurIPS 2022: k = 2, alpha = epsilon.
    """

    threat: Any
    step_size: jax.Array | float | None = None
    noise: jax.Array | float = 2.0
    objective: Objective = struct.field(pytree_node=False, default=objectives.cross_entropy)

    def __post_init__(self):
        """Checks the threat, of which the noise knows one kind."""
        if isinstance(self.threat, threats.L2 | threats.Patch | threats.Band):
            raise ValueError(
                f"the noise of NFGSM fills a box of pixels, so its threat is Linf, got "
                f"{type(self.threat).__name__}; take PGD with num_steps=1"
            )

    @property
    def gradient_evaluations(self) -> int:
        """Input gradients per image."""
        return 1

    def __call__(
        self, key: jax.Array, model: Model, image: jax.Array, label: jax.Array | None = None
    ) -> jax.Array:
        """Returns the perturbed image, ``[H, W, 3]`` in [0, 1]."""
        epsilon = self.threat.epsilon
        length = epsilon if self.step_size is None else self.step_size
        noise = jax.random.uniform(key, image.shape, image.dtype, -1.0, 1.0)
        noisy = image + self.noise * epsilon * noise
        # The clean image is the objective's own: an objective may compare with it.
        gradient = jax.grad(_objective_at(self.objective, key, model, image, label))(noisy, 0)
        return jnp.clip(noisy + length * self.threat.steepest(gradient), 0.0, 1.0)

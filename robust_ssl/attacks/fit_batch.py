"""What a step of a universal attack sees: the global batch, whatever devices it lies on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from robust_ssl import struct
from robust_ssl.attacks.perturbation import attacked_images, value_of, within_budget
from robust_ssl.parallel import average, gather
from robust_ssl.types import AttackInputs, Model, Objective, Outputs, Threat


@struct.dataclass
class FitBatch:
    """A batch of images with the model and the threat, for `UniversalAttack.step`.

    Every method and property speaks of the global batch and is equal on all devices.  A step made
    of them therefore does not depend on how many devices there are.

    Attributes:
      model: What is attacked.
      threat: Says how a perturbation meets an image, and what is allowed.
      part: This device's images, float ``[batch / devices, H, W, 3]``; a step reads `images`.
      part_clean: The model's outputs for them; a step reads `clean`.
      axis_name: The device axis, or None.
      part_labels: This device's labels, int32 ``[batch / devices]``, for objectives that need them;
        None for every downstream-agnostic attack.

    Example:
      >>> from robust_ssl import models, objectives, threats
      >>> encoder = models.resnet18(jax.random.key(0), width=8, image_size=8)
      >>> batch = FitBatch.on(encoder, threats.Linf(0.25), jnp.full((2, 8, 8, 3), 0.5))
      >>> value, gradient = batch.value_and_grad(objectives.feature_l2, jnp.full((8, 8, 3), 0.1))
      >>> value.shape, gradient.shape
      ((), (8, 8, 3))
      >>> float(batch.project(jnp.ones((8, 8, 3))).max())
      0.25
    """

    model: Model
    threat: Any
    part: jax.Array
    part_clean: Outputs
    axis_name: str | None = struct.field(pytree_node=False, default=None)
    part_labels: jax.Array | None = None

    @classmethod
    def on(
        cls, model: Model, threat: Threat, images: jax.Array, labels: jax.Array | None = None
    ) -> FitBatch:
        """Returns the batch of these images, all of which this device holds."""
        return cls(model, threat, images, model(images), part_labels=labels)

    @property
    def images(self) -> jax.Array:
        """Pixels, float ``[batch, H, W, 3]``."""
        return gather(self.part, self.axis_name)

    @property
    def clean(self) -> Outputs:
        """The model's outputs for the unperturbed images; a constant."""
        return lax.stop_gradient(gather(self.part_clean, self.axis_name))

    @property
    def image_shape(self) -> tuple[int, ...]:
        """``(height, width, 3)``."""
        return self.part.shape[1:]

    def value(self, objective: Objective, delta: jax.Array) -> jax.Array:
        """Returns the objective where ``delta [H, W, 3]`` attacks the batch, a scalar."""
        return self._value(objective, _averaged_in_reverse(delta, self.axis_name))

    def value_and_grad(
        self,
        objective: Objective,
        point: Any,
        delta_of: Callable[[Any], jax.Array] = lambda point: point,
    ) -> tuple[jax.Array, Any]:
        """Returns the objective and its gradient, a tree like `point`.

        The point is the perturbation, ``[H, W, 3]``, or any tree of arrays of which `delta_of`
        makes one, such as a generator's weights.
        """
        look = jax.value_and_grad(lambda point: self._value(objective, delta_of(point)))
        value, gradient = look(point)
        return value, average(gradient, self.axis_name)

    def attacked(
        self, delta: jax.Array, images: jax.Array | None = None, first: jax.Array | int = 0
    ) -> jax.Array:
        """Returns attacked images, ``[batch, H, W, 3]``, with a gradient for `delta`.

        The images are neighboring ones of the batch, None is all; a threat of random location reads
        the place of the first of them.
        """
        images = self.images if images is None else images
        return attacked_images(delta, images, self.threat, first=first)

    def project(self, delta: jax.Array) -> jax.Array:
        """Returns the allowed perturbation nearest to `delta`, ``[H, W, 3]``."""
        return within_budget(delta, self.threat)

    def steepest(self, gradient: jax.Array) -> jax.Array:
        """Returns the threat's unit step that raises a linear function the most."""
        return self.threat.steepest(gradient)

    def with_images(self, make: Callable[[jax.Array], jax.Array]) -> FitBatch:
        """Returns a batch of as many other images, which ``make(places) -> [n, H, W, 3]`` makes.

        They are nobody's, so they have no labels.
        """
        first = 0 if self.axis_name is None else len(self.part) * lax.axis_index(self.axis_name)
        images = make(first + jnp.arange(len(self.part)))
        return self.replace(part=images, part_clean=self.model(images), part_labels=None)

    def only(self, images: jax.Array) -> FitBatch:
        """Returns the batch of these images alone; every device computes all of it."""
        return FitBatch.on(self.model, self.threat, images)

    def map(self, function: Callable[[Any], Any], examples: Any) -> Any:
        """Maps a function over examples ``[n, ...]``; the devices share the work if n divides."""
        return self.share(jax.vmap(function), examples)

    def share(self, function: Callable[[Any], Any], examples: Any) -> Any:
        """Returns ``function(examples)``, of which each device computes a part if n divides.

        Args:
          function: From examples ``[n, ...]`` to results ``[n, ...]``, each of its own example.
          examples: A tree of arrays ``[n, ...]``, equal on all devices.
        """
        size = len(jax.tree.leaves(examples)[0])
        devices = 1 if self.axis_name is None else lax.axis_size(self.axis_name)
        if devices == 1 or size % devices:
            return function(examples)
        share = size // devices
        first = share * lax.axis_index(self.axis_name)
        part = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, share), examples)
        return gather(function(part), self.axis_name)

    def _value(self, objective: Objective, delta: jax.Array) -> jax.Array:
        """The objective; the mean over devices of its gradients is that of the global batch."""
        adversarial = attacked_images(delta, self.part, self.threat, axis_name=self.axis_name)
        inputs = AttackInputs(
            clean=lax.stop_gradient(self.part_clean),
            adversarial=self.model(adversarial),
            clean_images=self.part,
            adversarial_images=adversarial,
            labels=self.part_labels,
        )
        return value_of(objective, gather(inputs, self.axis_name))


# Without it `jax.grad` of `FitBatch.value` would be right on one device and wrong on two.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _averaged_in_reverse(delta: jax.Array, axis_name: str | None) -> jax.Array:
    """Returns delta as it is; the gradient that comes back is averaged over the devices."""
    return delta


_averaged_in_reverse.defvjp(
    lambda delta, axis_name: (delta, None),
    lambda axis_name, _, gradient: (average(gradient, axis_name),),
)

"""One recorded gradient attack, from which most checks of strength are read."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from robust_ssl import struct, threats
from robust_ssl.objectives.labelled import cross_entropy, dlr, margin
from robust_ssl.types import AttackInputs, Model, Outputs

OBJECTIVES = ("cross_entropy", "margin", "dlr")  # the order of `Climb.objective`


@struct.dataclass
class Climb:
    """PGD with falling steps, of which every number that a check asks for is kept.

    The step falls as a half cosine from half the budget to nothing, so a healthy run rises at
    almost every step and has arrived at the end; a constant step would circle around the top.

    Attributes:
      threat: What the attacker may do.
      objective: Place in `OBJECTIVES`, int32 scalar: another one needs no new compilation.
      num_steps: Gradient steps.
    """

    threat: Any
    objective: jax.Array | int = 0
    num_steps: int = struct.field(pytree_node=False, default=20)

    def __call__(self, model: Model, start: jax.Array, image: jax.Array, label: jax.Array) -> Path:
        """Returns the recorded path of one image ``[H, W, 3]`` from `start`."""
        length = self.threat.epsilon

        def value(adversarial):
            logits = logits_of(model, adversarial)
            return objective_value(logits, label, self.objective), logits

        def step(number, path):
            (reached, logits), gradient = jax.value_and_grad(value, has_aux=True)(path.last)
            size = length * (1 + jnp.cos(jnp.pi * number / self.num_steps)) / 4
            moved = path.last + size * self.threat.steepest(gradient)
            path = path.seen(number, reached, is_wrong(logits, label))
            return path.replace(last=self.threat.project(moved, image))

        losses = jnp.zeros(self.num_steps + 1)
        # Nothing was seen yet: any first point is better.
        nothing = Path(start, start, jnp.full((), -jnp.inf), jnp.zeros((), bool), losses)
        path = lax.fori_loop(0, self.num_steps, step, nothing)
        reached, logits = value(path.last)
        return path.seen(self.num_steps, reached, is_wrong(logits, label))


@struct.dataclass
class Path:
    """What a `Climb` kept.

    Attributes:
      last: Where it stands, ``[H, W, 3]``.
      best: Where the objective was highest, among misclassified points if there were any: what is
        scored, ``[H, W, 3]``.
      best_value: The objective there.
      hit: Whether some point on the way was misclassified.
      losses: The objective at the start and after every step, ``[num_steps + 1]``.
    """

    last: jax.Array
    best: jax.Array
    best_value: jax.Array
    hit: jax.Array
    losses: jax.Array

    def seen(self, number: jax.Array, reached: jax.Array, wrong: jax.Array) -> Path:
        """Returns the path with the point `last` taken into account."""
        # A misclassified point wins whatever its objective: with three classes the objective can be
        # higher where the answer is right, and that point would be a silent hit.
        better = (wrong & ~self.hit) | ((wrong == self.hit) & (reached > self.best_value))
        return self.replace(
            best=jnp.where(better, self.last, self.best),
            best_value=jnp.where(better, reached, self.best_value),
            hit=self.hit | wrong,
            losses=self.losses.at[number].set(reached),
        )


def logits_of(model: Model, image: jax.Array) -> jax.Array:
    """Returns the logits of one image, ``[classes]``."""
    return model(image[None]).logits[0]


def is_wrong(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Says whether one image is misclassified; NaN logits are."""
    return (jnp.argmax(logits) != label) | jnp.isnan(logits).any()


def objective_value(logits: jax.Array, label: jax.Array, objective: jax.Array | int) -> jax.Array:
    """Returns one of `OBJECTIVES`; with two classes, where DLR is none, margin in its place."""
    outputs = Outputs(features=logits[None], logits=logits[None])
    image = jnp.zeros((1, 1, 1, 3))  # none of the three looks at pixels
    inputs = AttackInputs(outputs, outputs, image, image, labels=label.reshape(1))
    third = dlr if logits.shape[-1] > 2 else margin
    # A switch on a traced number: three objectives are one compiled program.
    branches = [cross_entropy, margin, third]
    return lax.switch(objective, branches, inputs)


def with_budget(threat: Any, epsilon: jax.Array | float) -> Any:
    """Returns the threat, or the one inside a `threats.Band`, with another budget, float32.

    Example:
      >>> float(with_budget(threats.Band(threats.Linf(0.1)), 0.25).epsilon)
      0.25
    """
    if isinstance(threat, threats.Band):
        return threat.replace(threat=with_budget(threat.threat, epsilon))
    # One type for every budget, or each would be compiled for itself.
    return threat.replace(epsilon=jnp.asarray(epsilon, jnp.float32))


def full_range(threat: Any, image_shape: tuple[int, ...]) -> float:
    """Returns the budget that reaches every image.

    Example:
      >>> full_range(threats.Linf(0.1), (8, 8, 3)), full_range(threats.L2(0.1), (1, 3, 3))
      (1.0, 3.0)
    """
    inner = getattr(threat, "threat", threat)
    return math.sqrt(math.prod(image_shape)) if isinstance(inner, threats.L2) else 1.0

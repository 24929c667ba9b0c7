"""FAB-T: the shortest way across the boundary to one wrong class.

Most attacks spend a budget; this one looks for the smallest change that is misclassified and asks
about the budget last.  The gradient gives a plane where the wrong class overtakes the true one; a
step goes to the nearest point of that plane inside [0, 1].
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from robust_ssl import struct, threats
from robust_ssl.attacks.apgd import Tries, draw, fails, misclassified
from robust_ssl.types import Model, Threat


def labelled_logits(model: Model, image: jax.Array, label: jax.Array | None, name: str):
    """Returns the logits of one image, ``[classes]``, or says what the attack `name` lacks."""
    if label is None:
        raise ValueError(f"{name} needs labels, but was called without them; pass labels")
    logits = model(image[None]).logits
    if logits is None:
        raise ValueError(f"{name} needs logits, but the model has no head; attack a Classifier")
    if logits.shape[-1] < 2:
        raise ValueError(f"{name} needs at least two classes, the model has {logits.shape[-1]}")
    return logits[0]


def length(threat: Threat, change: jax.Array) -> jax.Array:
    """Measures a change in the norm of a threat: the largest entry (Linf) or Euclidean (L2).

    Raises:
      TypeError: If the threat is neither of the two.

    Example:
      >>> float(length(threats.L2(0.5), jnp.array([0.3, -0.4])))
      0.5
    """
    if isinstance(threat, threats.Linf):
        return jnp.max(jnp.abs(change))
    if isinstance(threat, threats.L2):
        return jnp.sqrt(jnp.sum(change**2))
    raise TypeError(
        f"this attack knows the threats Linf and L2, got {type(threat).__name__}; PGD takes any"
    )


def step_to_plane(
    threat: Threat, point: jax.Array, gradient: jax.Array, value: jax.Array
) -> jax.Array:
    r"""Returns the shortest change inside the box that brings a linear function to zero.

    .. math:: \arg\min_d \|d\| \quad \text{with} \quad v + g^\top d = 0, \quad 0 \le x + d \le 1

    Every pixel moves against the sign of ``v``, by ``min(t s_i, room_i)``, where ``s_i`` is 1 for
    Linf and ``|g_i|`` for L2.  What that gains is concave and piecewise linear in the one unknown
    ``t``, so Newton's steps from zero never overshoot and end on the exact solution, mostly
    within ten; no sorting is needed.

    Args:
      threat: Says in which norm the change is short, `threats.Linf` or `threats.L2`.
      point: Pixels in [0, 1], float, any shape.
      gradient: ``g``, same shape.
      value: ``v``, scalar: the function at `point`.

    Returns:
      The change, same shape.  If no point of the box reaches zero, it goes to the corner that
      comes nearest; pixels without gradient stay.

    Example:
      >>> g = jnp.array([3.0, 1.0])
      >>> step_to_plane(threats.Linf(1.0), jnp.array([0.5, 0.5]), g, jnp.array(-1.0)).tolist()
      [0.25, 0.25]

    References:
      Croce and Hein, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary
      Attack", ICML 2020, Section 2.2 and Equation 4.
    """
    steepness = jnp.abs(gradient)
    largest = jnp.max(steepness)
    scale = jnp.where(largest > 0, largest, 1.0)  # squares of tiny gradients would vanish
    steepness, missing = steepness / scale, jnp.abs(value) / scale
    direction = jnp.sign(gradient) * jnp.where(value >= 0, -1.0, 1.0)
    room = jnp.where(direction > 0, 1 - point, point)
    speed = steepness if isinstance(threat, threats.L2) else jnp.ones_like(steepness)
    reachable = jnp.sum(steepness * room) > missing
    wanted = jnp.where(reachable, missing, 0.0)

    def gap_and_slope(time):
        gain = jnp.sum(steepness * jnp.minimum(time * speed, room))
        slope = jnp.sum(jnp.where(time * speed < room, steepness * speed, 0.0))
        return wanted - gain, slope

    def unfinished(carry):
        _, gap, slope = carry
        return (gap > 1e-6 * wanted) & (slope > 0)

    def newton(carry):
        time, gap, slope = carry
        time = time + gap / slope
        return time, *gap_and_slope(time)

    start = jnp.zeros_like(wanted)
    time, *_ = lax.while_loop(unfinished, newton, (start, *gap_and_slope(start)))
    return direction * jnp.where(reachable, jnp.minimum(time * speed, room), room)


@struct.dataclass
class FABT(Tries):
    """The targeted fast adaptive boundary attack: the nearest adversarial image, if allowed.

    Each step goes from the current point to the plane where the target class overtakes the true
    one, a little beyond (`eta`), drawn towards the same plane's point nearest to the original
    (at most `alpha_max`); from a misclassified point it comes back (`beta`).  Any wrong
    class counts as a success.  The attack does not use its budget while it searches (random
    starts apart), so one run answers for all budgets.  A randomized model
    (`robust_ssl.attacks.apgd.draw`) is drawn anew at every step.

    What it finds lies just past the boundary: rounding to 8 bits may push it back.  So
    `robust_ssl.evaluation.score` leaves its images as they are, as AutoAttack's own code does;
    `robust_ssl.evaluation.score_in_turn` is told so.

    Attributes:
      eight_bit: Whether its images are rounded before they are classified: False.
      threat: `threats.Linf` or `threats.L2`.
      num_steps: Steps of each try, at least 1; a step costs one gradient and one forward pass.
      restarts: Tries, at least 1; the first starts at the image, the others at random at half
        the budget from it.
      alpha_max: Largest weight of the point nearest to the original.
      eta: Length of a step over the distance to the plane.
      beta: Share of the change that is kept after a misclassification.
      rank: The target is the wrong class with the `rank`-th highest clean logit; 1 is the
        likeliest.  A leaf: nine targets are one compilation.  A rank above the number of wrong
        classes means the unlikeliest.

    Raises:
      ValueError: If `num_steps` or `restarts` is below 1; when called, if there is no label, the
        model has no logits, or there is one class.
      TypeError: When called with another threat.

    Example:
      >>> attack = FABT(threats.Linf(8 / 255), num_steps=100)
      >>> attack.gradient_evaluations, attack.queries
      (100, 201)

    References:
      Croce and Hein, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary
      Attack", ICML 2020, Algorithm 1; for the targeted form Section 5 of the paper of `APGD`.
    """

    eight_bit: ClassVar[bool] = False
    threat: Any
    num_steps: int = struct.field(pytree_node=False, default=100)  # the paper's settings
    restarts: int = struct.field(pytree_node=False, default=1)
    alpha_max: jax.Array | float = 0.1
    eta: jax.Array | float = 1.05
    beta: jax.Array | float = 0.9
    rank: jax.Array | int = 1

    @property
    def queries(self) -> int:
        """Forward passes per image, those of the gradients included."""
        return 2 * self.gradient_evaluations + 1

    def __call__(
        self, key: jax.Array, model: Model, image: jax.Array, label: jax.Array | None = None
    ) -> jax.Array:
        """Returns the nearest adversarial image found, ``[H, W, 3]`` in [0, 1].

        The image itself comes back where none was found inside the budget, and where it is
        misclassified already.  NaN comes back where none was found and a gradient was NaN.
        """
        clean = labelled_logits(draw(model, key), image, label, "FABT")
        target = self._target(clean, label)

        def attempt(restart, best):
            start_key, draw_key = jax.random.split(jax.random.fold_in(key, restart))
            start = self._start(start_key, image)
            return self._walk(draw_key, model, image, label, target, start, best)

        nothing = (image, jnp.full((), jnp.inf))
        first_key = jax.random.fold_in(key, 0)
        best = self._walk(first_key, model, image, label, target, image, nothing)
        if self.restarts > 1:
            best = lax.fori_loop(1, self.restarts, attempt, best)
        nearest, distance = best
        success = ~misclassified(clean, label) & (distance <= self.threat.epsilon)
        return jnp.where(success, nearest, image)

    def _target(self, clean: jax.Array, label: jax.Array) -> jax.Array:
        classes = clean.shape[-1]
        wrong = jnp.where(jnp.arange(classes) == label, -jnp.inf, clean)
        return jnp.argsort(-wrong)[jnp.clip(self.rank, 1, classes - 1) - 1]

    def _start(self, key: jax.Array, image: jax.Array) -> jax.Array:
        if isinstance(self.threat, threats.L2):
            noise = jax.random.normal(key, image.shape, image.dtype)
        else:
            noise = jax.random.uniform(key, image.shape, image.dtype, -1.0, 1.0)
        noise = noise * (0.5 * self.threat.epsilon / length(self.threat, noise))
        return jnp.clip(image + noise, 0.0, 1.0)

    def _walk(self, key: jax.Array, model: Model, image, label, target, start, best):
        """Returns the nearest misclassified image of the path and its distance, or `best`."""

        def lead(point, sampled):  # of the target over the true class
            logits = sampled(point[None]).logits[0]
            classes = jnp.arange(logits.shape[-1])
            signs = (classes == target).astype(logits.dtype) - (classes == label)
            return jnp.sum(signs * logits)

        def step(number, carry):
            current, (nearest, distance) = carry
            sampled = draw(model, jax.random.fold_in(key, number))
            value, gradient = jax.value_and_grad(lead)(current, sampled)
            moved = self._move(current, image, value, gradient)
            # Nearer than anything else: otherwise the image would come back, and count as robust.
            failed = fails(value, gradient) & (distance > self.threat.epsilon)
            fooled = misclassified(sampled(moved[None]).logits[0], label)
            reached = jnp.where(failed, 0.0, length(self.threat, moved - image))
            wins = failed | (fooled & (reached < distance))
            found = jnp.where(failed, jnp.nan, moved)
            best = (jnp.where(wins, found, nearest), jnp.where(wins, reached, distance))
            return jnp.where(fooled, image + self.beta * (moved - image), moved), best

        return lax.fori_loop(0, self.num_steps, step, (start, best))[1]

    def _move(self, current, image, value, gradient) -> jax.Array:
        near = step_to_plane(self.threat, current, gradient, value)
        # The same plane, seen from the original image.
        value_there = value + jnp.sum(gradient * (image - current))
        home = step_to_plane(self.threat, image, gradient, value_there)
        near_length = jnp.maximum(length(self.threat, near), 1e-8)
        home_length = jnp.maximum(length(self.threat, home), 1e-8)
        alpha = jnp.minimum(near_length / (near_length + home_length), self.alpha_max)
        moved = (1 - alpha) * (current + self.eta * near) + alpha * (image + self.eta * home)
        return jnp.clip(moved, 0.0, 1.0)

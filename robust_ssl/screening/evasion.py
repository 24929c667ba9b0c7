"""Adaptive attacks: past the classifier and the detector at once.

A figure of a detector without them protects nobody: whoever knows the detector attacks it too.
Steps follow gradients and not their signs, which are noise of high frequency that some detectors
see at once: against those a sign step never gets anywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from robust_ssl import frequencies, objectives, struct
from robust_ssl.attacks.perturbation import random_delta, value_of
from robust_ssl.types import AttackInputs, Model, Objective

CEILING = 2.0  # logits by which a wrong class wins, after which only the detector is left to pass
_FIRST_STEP = 0.25  # of the way to a random allowed image; steps get shorter to the end
_LAST_STEP = 1e-2  # of the first: some detectors see a change below one gray level
_START = 0.1  # of a random perturbation: from zero, all images may pull in no direction


def capped_margin(inputs: AttackInputs) -> jax.Array:
    """Measures by how much a wrong class wins, in each image at most `CEILING`.

    A larger margin would be worth nothing to the attacker.  Without labels the class is the one
    that the model gives the clean image.
    """
    labels = inputs.labels
    if labels is None:
        labels = jnp.argmax(inputs.clean.logits, axis=-1)

    def one(logits, label):
        outputs = inputs.adversarial.replace(features=logits[None], logits=logits[None], taps={})
        alone = inputs.replace(adversarial=outputs, labels=label[None])
        return jnp.minimum(objectives.margin(alone), CEILING)

    return jnp.mean(jax.vmap(one)(inputs.adversarial.logits, labels))


@struct.dataclass
class Evasion:
    r"""Ascent on an image of the attack's objective minus what the detector would see.

    .. math:: \min(\text{margin}, 2) - w \max(s(x) - t, 0)

    Below the threshold t a lower score is worth nothing, and beyond a clear mistake a larger margin
    is worth nothing, so every step goes where something is left to win.  The gradients of both
    terms get the same length before they are added, so w does not depend on the score's unit.  The
    best image of the path is returned.

    Attributes:
      threat: What the attacker may do.
      detector: What is to be passed; its score is differentiated.
      detector_key: The key that the detector draws with; the attacker knows it.
      threshold: The score t that raises no alarm.
      weight: The weight w; 0 is an attack that does not know the detector.
      cutoff: Steps have no frequencies from here on, cycles per pixel.  A detector of fine waves
        is passed by an attack without any, sooner than by one that must unmake its own.
      num_steps: Gradient steps.
      objective: What is raised besides.

    References:
      Carlini and Wagner, "Adversarial Examples Are Not Easily Detected", AISec 2017; Tramer et al.,
      "On Adaptive Attacks to Adversarial Example Defenses", NeurIPS 2020; Bryniarski et al.,
      "Evading Adversarial Example Detection Defenses with Orthogonal Projected Gradient Descent",
      ICLR 2022 (why the two gradients are scaled apart).
    """

    threat: Any
    detector: Any
    detector_key: jax.Array
    threshold: jax.Array | float
    weight: jax.Array | float = 1.0
    cutoff: jax.Array | float = 1.0
    num_steps: int = struct.field(pytree_node=False, default=40)
    objective: Objective = struct.field(pytree_node=False, default=capped_margin)

    def __check_init__(self):
        """Checks the weight and the steps."""
        _check_numbers(self)

    @property
    def gradient_evaluations(self) -> int:
        """Input gradients per image."""
        return 2 * self.num_steps

    def __call__(
        self, key: jax.Array, model: Model, image: jax.Array, label: jax.Array | None = None
    ) -> jax.Array:
        """Returns the adversarial image, ``[H, W, 3]`` in [0, 1]."""
        terms = self._terms(model, image, label)
        reach = _length(self.threat.sample(key, image) - image)

        def step(number, carry):
            current, best = carry
            (value, score), backward = jax.vjp(terms, current)
            [up], [seen] = backward((1.0, 0.0)), backward((0.0, 1.0))
            best = self._better(best, current, value, score)
            length = reach * _step_length(number / self.num_steps)
            moved = current + length * _direction(self, up, seen, score)
            return self.threat.project(moved, image), best

        start = (image, (image, jnp.full((), -jnp.inf)))
        last, best = lax.fori_loop(0, self.num_steps, step, start)
        return self._better(best, last, *terms(last))[0]

    def _better(self, best, current: jax.Array, value: jax.Array, score: jax.Array):
        value = value - self.weight * jax.nn.relu(score - self.threshold)
        wins = value > best[1]
        return jnp.where(wins, current, best[0]), jnp.where(wins, value, best[1])

    def _terms(self, model: Model, image: jax.Array, label: jax.Array | None) -> Callable:
        images = image[None]
        clean = lax.stop_gradient(model(images))
        labels = None if label is None else jnp.reshape(label, (1,))

        def terms(candidate):
            inputs = AttackInputs(clean, model(candidate[None]), images, candidate[None], labels)
            return value_of(self.objective, inputs), _mean_score(self, model, candidate[None])

        return terms


@struct.dataclass
class UniversalEvasionState:
    """The perturbation, the running direction ``[H, W, 3]``, and how many steps were made."""

    delta: jax.Array
    velocity: jax.Array
    number: jax.Array


@struct.dataclass
class UniversalEvasion:
    """The same for one perturbation of all images, averaged over a batch.

    Attributes:
      model: The screened model, which the detector asks.
      detector: As for `Evasion`, as are the next six.
      detector_key: ...
      threshold: ...
      weight: ...
      cutoff: ...
      num_steps: ...
      objective: ...
      momentum: Share of the last direction that is kept, in [0, 1).
    """

    model: Any
    detector: Any
    detector_key: jax.Array
    threshold: jax.Array | float
    weight: jax.Array | float = 1.0
    cutoff: jax.Array | float = 1.0
    num_steps: jax.Array | int = 200
    momentum: jax.Array | float = 0.9
    objective: Objective = struct.field(pytree_node=False, default=capped_margin)
    name: str = struct.field(pytree_node=False, default="universal_evasion")

    def __check_init__(self):
        """Checks the weight and the steps."""
        _check_numbers(self)

    def init(self, key, image_shape, threat) -> UniversalEvasionState:
        """Starts near zero, where no detector sees anything."""
        start = frequencies.low_pass(random_delta(key, image_shape, threat), cutoff=self.cutoff)
        start = _START * start
        return UniversalEvasionState(start, jnp.zeros_like(start), jnp.float32(0))

    def step(self, state, threat, batch):
        """Moves the perturbation once; returns the new state and the objective before it."""
        value, up = batch.value_and_grad(self.objective, state.delta)
        score, seen = batch.value_and_grad(
            lambda inputs: _mean_score(self, self.model, inputs.adversarial_images), state.delta
        )
        velocity = self.momentum * state.velocity + _direction(self, up, seen, score)
        reach = _length(random_delta(jax.random.key(0), state.delta.shape, threat))
        length = reach * _step_length(state.number / self.num_steps)
        moved = batch.project(state.delta + length * _unit(velocity))
        return UniversalEvasionState(moved, velocity, state.number + 1), value

    def delta(self, state, threat) -> jax.Array:
        """Returns the perturbation, ``[H, W, 3]``."""
        return state.delta


def _check_numbers(attack: Evasion | UniversalEvasion) -> None:
    """Raises ValueError for a weight or steps that are numbers with which nothing is attacked."""
    if struct.is_number(attack.weight) and not np.isfinite(attack.weight):
        raise ValueError(f"weight must be a finite number, got {attack.weight}")
    if struct.is_number(attack.num_steps) and attack.num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {attack.num_steps}")


def _mean_score(attack: Evasion | UniversalEvasion, model: Model, images: jax.Array) -> jax.Array:
    """Returns the detector's score, averaged over ``[batch, H, W, 3]``."""
    keyed = functools.partial(attack.detector.score, attack.detector_key, model)
    return jnp.mean(jax.vmap(keyed)(images))


def _direction(
    attack: Evasion | UniversalEvasion, up: jax.Array, seen: jax.Array, score: jax.Array
) -> jax.Array:
    """Returns the unit step that raises the objective, and lowers a score that raises an alarm.

    Args:
      attack: Its weight, threshold and cutoff.
      up: Gradient of the objective.
      seen: Gradient of the score.
      score: The score.
    """
    up, seen = (_unit(frequencies.low_pass(g, cutoff=attack.cutoff)) for g in (up, seen))
    knows = attack.weight > 0
    # Along the surface of equal scores: what the one step wins, the next would give back.
    along = _unit(up - jnp.where(knows, jnp.sum(up * seen), 0.0) * seen)
    alarm = jnp.where(score > attack.threshold, attack.weight, 0.0)
    return _unit(along - alarm * seen)


def _step_length(progress: jax.Array) -> jax.Array:
    """Returns the length of a step at a share of the way, in units of a random perturbation's."""
    return _FIRST_STEP * _LAST_STEP**progress


def _length(change: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(change**2))


def _unit(gradient: jax.Array) -> jax.Array:
    """Returns a gradient of length 1, or zero."""
    length = _length(gradient)
    return jnp.where(length > 0, gradient / jnp.where(length > 0, length, 1.0), 0.0)

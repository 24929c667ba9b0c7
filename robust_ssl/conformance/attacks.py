"""The laws of attacks: on each image by itself, and of one perturbation for all images."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl.attacks import FitBatch, UniversalAttack, fit
from robust_ssl.attacks.perturbation import at_step, within_budget
from robust_ssl.conformance.laws import (
    Laws,
    check_batch,
    made_of,
    made_up_images,
    share_of_devices,
    small_model,
    without_budget,
)
from robust_ssl.parallel import Parallel
from robust_ssl.threats import Linf
from robust_ssl.types import Attack, Model, Threat


def check_attack(
    attack: Attack | str,
    *,
    threat: Threat | None = None,
    model: Model | None = None,
    image_size: int = 8,
    batch: int = 3,
    needs_label: bool = False,
    seed: int = 0,
) -> None:
    """Checks that an attack keeps the laws of attacks.

    Its image has the shape and type of the original, in [0, 1] and inside the budget (projecting it
    changes nothing).  The same key gives the same image, under `jax.jit` too and whatever the
    neighbours in the batch.  An `epsilon` of 0, of the attack's threat or one inside it, returns
    the image.  `jax.jit` tells attack and threat from other classes (`robust_ssl.struct`).  At
    least one image moves: an attack that does nothing keeps every law.

    Args:
      attack: ``attack(key, model, image, label=None) -> image``; a class, or ``"module:Class"``,
        is called with the threat, `Linf` of 8/255 if none is given.
      threat: Whose `project` tells what is allowed; None takes ``attack.threat``.
      model: Attacked; None takes a small one with 4 classes.
      image_size: Height and width of the made-up images, pixels.
      batch: Number of made-up images, at least 2.
      needs_label: Call it with the model's own answer as the label, so that an attack which leaves
        misclassified images alone has something to do.
      seed: Of the made-up images.

    Raises:
      AssertionError: Names the attack and the law it breaks.
      ValueError: If there is no threat, or labels are needed and the model has no logits.

    Example:
      >>> def brighter(key, model, image, label=None):
      ...     return jnp.minimum(image + 0.05, 1.0)
      >>> check_attack(brighter, threat=Linf(0.1))
    """
    check_batch(batch)
    attack = made_of(attack, Linf(8 / 255) if threat is None else threat)
    laws = Laws.of(attack)
    laws.passable(attack)
    threat = getattr(attack, "threat", None) if threat is None else threat
    Laws.of(threat)
    if threat is None:
        raise ValueError(f"{laws.name} carries no threat: pass threat=, for example Linf(8 / 255)")
    random = np.random.default_rng(seed)
    images = made_up_images(random, batch, image_size)
    model = small_model(random, image_size) if model is None else model
    logits = model(images).logits if needs_label else None
    if needs_label and logits is None:
        message = "needs labels, but the model has no logits: pass a classifier"
        raise ValueError(f"{laws.name} {message}")
    labels = None if logits is None else jnp.argmax(logits, axis=-1).astype(jnp.int32)
    keys = jax.random.split(jax.random.key(seed), batch)

    def craft(attack, keys, images, labels):
        call = laws.calls(attack)
        return jax.vmap(lambda k, x, y: call(k, model, x, y))(keys, images, labels)

    label = None if labels is None else labels[0]
    one = laws.calls(attack, _label_advice)(keys[0], model, images[0], label)
    laws.images(one, images[0].shape, slack=0.0)
    adversarial = craft(attack, keys, images, labels)
    laws.images(adversarial, images.shape, slack=0.0)
    allowed = jax.vmap(threat.project)(adversarial, images)
    laws.close(adversarial, allowed, f"leaves the budget of {threat}")
    laws.hold(
        not (adversarial == images).all(),
        "moved no image, so nothing is known of the other laws: pass a model that it can attack, "
        "or give it a larger budget or more steps",
    )
    again = craft(attack, keys, images, labels)
    laws.mostly_close(again, adversarial, "gives another image for the same key", 0.0)
    compiled = jax.jit(lambda *batch: craft(attack, *batch))
    together = np.asarray(compiled(keys, images, labels))
    laws.mostly_close(together, adversarial, "gives something else under jax.jit", 0.01)
    for place in range(batch):
        others = images[:, ::-1].at[place].set(images[place])
        beside = np.asarray(compiled(keys, others, labels))
        differs = float(np.max(np.abs(beside[place] - together[place])))
        law = f"'s image depends on its neighbours in the batch (place {place}, {differs:.4f})"
        laws.hold(differs <= 1e-5, law)
    calm = without_budget(getattr(attack, "threat", None))
    if calm is not None:
        unmoved = craft(dataclasses.replace(attack, threat=calm), keys, images, labels)
        laws.close(unmoved, images, "moves the image although epsilon is 0")


def _label_advice(error: Exception) -> str:
    absent = "NoneType" in str(error)
    return "; its label is None: needs_label=True gives it one" if absent else ""


def check_universal_attack(
    attack: UniversalAttack | str,
    *,
    threat: Callable[[Any], Threat] = Linf,
    epsilon: float = 0.1,
    model: Model | None = None,
    image_size: int = 8,
    batch: int = 8,
    num_steps: int = 2,
    seed: int = 0,
) -> None:
    """Checks that a universal attack keeps the laws of fitting.

    Its perturbation is allowed before and after every step, and zero where the budget is.  The
    objective is a finite scalar, and the state keeps its shape.  The same key gives the same
    perturbation, under `jax.jit` too, beside another member, and on several devices if there are.

    Args:
      attack: With `init`, `step` and `delta`; a class, or ``"module:Class"``, is called.
      threat: Makes a threat of a budget, as for `attacks.fit`.
      epsilon: The budget.
      model: Attacked; None takes a small one with four blocks.
      image_size: Height and width of the made-up images, pixels.
      batch: Number of made-up images; with 4 or 2 devices a multiple of that is tried on them.
      num_steps: Steps of the fit.
      seed: Of the made-up images and of the fit.

    Raises:
      AssertionError: Names the attack and the law it breaks.

    Example:
      >>> check_universal_attack("robust_ssl.attacks:RandomNoise")
    """
    check_batch(batch)
    attack = made_of(attack)
    laws = Laws.of(attack, "init", "step", "delta")
    laws.passable(attack)
    random = np.random.default_rng(seed)
    images = [made_up_images(random, batch, image_size) for _ in range(num_steps)]
    model = small_model(random, image_size) if model is None else model
    key, budget = jax.random.key(seed), threat(jnp.float32(epsilon))

    deltas = functools.partial(_deltas, laws, attack, model, images, key)
    alone = deltas(budget)
    laws.close(deltas(budget), alone, "gives another perturbation for the same key")
    compiled = deltas(budget, jax.jit)
    laws.mostly_close(compiled, alone, "gives something else under jax.jit")
    calm = without_budget(budget)
    if calm is not None:
        still = deltas(calm)
        laws.close(still, np.zeros_like(still), "has a perturbation at epsilon 0")

    # Two members at once: the one that was fitted by hand, and one with half of its budget.
    budgets = jnp.asarray([epsilon, epsilon / 2], jnp.float32)
    members = {"keys": jnp.stack([key, key]), "epsilons": budgets, "threat": threat}
    batches = [{"images": np.asarray(pixels)} for pixels in images]
    fitted = functools.partial(fit, attack, model, batches, image_shape=alone.shape[1:], **members)
    one = fitted(parallel=Parallel.create(num_devices=1))
    law = "gives something else beside another member"
    laws.mostly_close(one.perturbations.delta[0], compiled[-1], law)
    devices = share_of_devices(batch)
    if devices > 1:
        several = fitted(parallel=Parallel.create(num_devices=devices))
        law = "depends on the number of devices: take values and gradients of the batch"
        laws.close(several.curve, one.curve, law, 1e-3)
        laws.mostly_close(several.perturbations.delta, one.perturbations.delta, law)


def _deltas(laws, attack, model, images, key, budget, compile=lambda step: step) -> np.ndarray:
    """Fits one member by hand; returns the perturbation before and after each step."""
    shape = images[0].shape[1:]

    def step(state, pixels, number):
        threat = at_step(budget, key, number)
        made = laws.calls(attack.step)(state, threat, FitBatch.on(model, threat, pixels))
        law = ".step must return (state, objective)"
        laws.hold(isinstance(made, tuple) and len(made) == 2, law)
        return made

    def checked(delta):
        laws.hold(jnp.shape(delta) == shape, f".delta must return {shape}, got {jnp.shape(delta)}")
        laws.hold(jnp.issubdtype(delta.dtype, jnp.floating), f".delta must be float: {delta.dtype}")
        laws.finite(delta, "returns a perturbation that is not finite")
        allowed = within_budget(delta, budget)
        laws.close(delta, allowed, f"leaves the budget of {budget}: project it")
        return delta

    step, state = compile(step), laws.calls(attack.init)(key, shape, budget)
    delta_of = laws.calls(attack.delta)
    deltas = [checked(delta_of(state, budget))]
    for number, pixels in enumerate(images):
        before = _shapes(state)
        state, value = step(state, pixels, jnp.int32(number))
        scalar = jnp.shape(value) == ()
        laws.hold(scalar, f".step must return the objective as a scalar, got {jnp.shape(value)}")
        laws.hold(jnp.isfinite(value), f"has an objective that is not finite: {value}")
        law = ".step must keep the shapes and types of the state that init made"
        laws.hold(before == _shapes(state), f"{law}: {before} became {_shapes(state)}")
        deltas.append(checked(delta_of(state, budget)))
    return np.stack(deltas)


def _shapes(state: Any) -> Any:
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.asarray(x).dtype), state)

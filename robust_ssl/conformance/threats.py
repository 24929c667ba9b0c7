"""The laws of what an attacker may do to an image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import threats
from robust_ssl.attacks import perturbation
from robust_ssl.build import resolve
from robust_ssl.conformance.laws import (
    Laws,
    check_batch,
    made_up_images,
    one_by_one,
    without_budget,
)
from robust_ssl.types import Threat


def check_threat(
    threat: Threat | Callable[[Any], Threat] | str,
    *,
    epsilon: float = 8 / 255,
    image_size: int = 8,
    batch: int = 3,
    seed: int = 0,
) -> None:
    """Checks that a threat keeps the laws of budgets.

    What it projects and samples must lie in the budget and in [0, 1]; projecting twice must be
    projecting once, and the image itself is allowed; steps are finite and go uphill; a batch under
    `jax.jit` gives what each image gives by itself.  One perturbation for all images must keep the
    same laws, and the threat must survive being saved.

    Args:
      threat: With `sample`, `project` and `steepest`; or what makes one of a budget: a class, a
        function, ``"module:Class"``.
      epsilon: The budget, where the threat is yet to be made.
      image_size: Height and width of the made-up images, pixels.
      batch: Number of made-up images, at least 2.
      seed: Of the made-up images.

    Raises:
      AssertionError: Names the threat and the law it breaks.

    Example:
      >>> check_threat("robust_ssl.threats:Linf", epsilon=0.1)
    """
    check_batch(batch)
    threat = resolve(threat) if isinstance(threat, str) else threat
    if isinstance(threat, type) or not hasattr(threat, "project"):
        threat = threat(epsilon)
    laws = Laws.of(threat, "sample", "project", "steepest")
    laws.passable(threat)
    random, key = np.random.default_rng(seed), jax.random.key(seed)
    images = made_up_images(random, batch, image_size)
    try:
        threats.check(threat, images.shape[1:])
    except ValueError as error:
        raise AssertionError(f"{laws.name} does not pass threats.check: {error}") from error
    changes = jnp.asarray(random.normal(size=images.shape), jnp.float32)
    _check_project(laws, threat, images, changes)
    _check_sample(laws, threat, images, jax.random.split(key, batch))
    _check_steepest(laws, threat, changes)
    _check_delta(laws, threat, images, changes[0], key)
    _check_saved(laws, threat)


def _gray(images: jax.Array) -> jax.Array:
    """Returns images near gray: the cut to [0, 1] may take a change out of a `threats.Band`."""
    return 0.5 + 0.1 * (images - 0.5)


def _check_project(laws: Laws, threat: Threat, images: jax.Array, changes: jax.Array) -> None:
    project = jax.vmap(threat.project)
    projected = jax.jit(project)(images + changes, images)
    laws.images(projected, images.shape, ".project")
    alone = one_by_one(threat.project, images + changes, images)
    laws.close(projected, alone, ".project gives something else in a batch under jax.jit")
    if hasattr(threat, "norm") and hasattr(threat, "epsilon"):
        sizes = jax.vmap(threat.norm)(projected - images)
        inside = float(jnp.max(sizes)) <= float(threat.epsilon) * (1 + 1e-4) + 1e-6
        laws.hold(inside, f".project leaves the ball: {sizes} with epsilon {threat.epsilon}")
    laws.close(project(images, images), images, "does not allow the image itself")
    gray = _gray(images)
    once = project(gray + 0.3 * jnp.tanh(changes), gray)
    laws.close(project(once, gray), once, ".project twice is not project once")
    calm = without_budget(threat)
    if calm is not None:
        still = jax.vmap(calm.project)(images + changes, images)
        laws.close(still, images, ".project moves the image although epsilon is 0")
    gradient = jax.grad(lambda candidates: jnp.sum(project(candidates, images) ** 2))
    for candidates in (images, images + changes):
        laws.finite(gradient(candidates), ".project has a gradient not finite")


def _check_sample(laws: Laws, threat: Threat, images: jax.Array, keys: jax.Array) -> None:
    sample, gray = jax.vmap(threat.sample), _gray(images)
    samples = sample(keys, images)
    laws.images(samples, images.shape, ".sample")
    laws.close(sample(keys, images), samples, ".sample gives another image for the same key")
    samples = sample(keys, gray)
    allowed = jax.vmap(threat.project)(samples, gray)
    laws.close(samples, allowed, ".sample is not allowed: project changes it")


def _check_steepest(laws: Laws, threat: Threat, gradients: jax.Array) -> None:
    steps = jax.vmap(threat.steepest)(gradients)
    law = f".steepest must keep the shape {gradients.shape}, got {steps.shape}"
    laws.hold(steps.shape == gradients.shape, law)
    for step in (*steps, threat.steepest(jnp.zeros_like(gradients[0]))):
        laws.finite(step, ".steepest is not finite, for example of a zero gradient")
    uphill = jnp.sum(steps * gradients, axis=(1, 2, 3))
    laws.hold((uphill > 0).all(), f".steepest does not go uphill: {uphill}")
    if hasattr(threat, "norm"):
        sizes = jax.vmap(threat.norm)(steps)
        law = f".steepest must be a unit step, got the sizes {sizes}"
        laws.hold((sizes <= 1 + 1e-4).all(), law)


def _check_delta(laws: Laws, threat: Threat, images: jax.Array, change, key: jax.Array) -> None:
    """Checks one perturbation for all images."""
    shape, larger = change.shape, (change.shape[0] + 2, change.shape[1] + 2)
    deltas = {"within_budget": perturbation.within_budget(0.3 * jnp.tanh(change), threat)}
    deltas["random_delta"] = perturbation.random_delta(key, shape, threat)
    if hasattr(threat, "epsilon") or hasattr(threat, "delta_of"):
        deltas["delta_of_pattern"] = perturbation.delta_of_pattern(jnp.sign(change), threat)
    deltas["resize_delta"] = perturbation.resize_delta(deltas["within_budget"], larger, threat)
    for source, delta in deltas.items():
        expected = (*larger, 3) if source == "resize_delta" else shape
        law = f"makes a delta of shape {delta.shape}, not {expected}, in {source}"
        laws.hold(delta.shape == expected, law)
        law = f"makes a delta that is not allowed: projecting changes that of {source}"
        laws.close(perturbation.within_budget(delta, threat), delta, law)
    moved = deltas["random_delta"]
    attacked = jax.vmap(lambda image: perturbation.apply_delta(moved, image, threat))(images)
    laws.images(attacked, images.shape, ", applied,")
    keyed = threat.keyed(key) if hasattr(threat, "keyed") else threat
    gradient = jax.grad(
        lambda delta: jnp.sum(perturbation.attacked_images(delta, images, keyed) ** 2)
    )
    for delta in (jnp.zeros(shape), moved):
        laws.finite(gradient(delta), "gives a delta a gradient that is not finite")


def _check_saved(laws: Laws, threat: Threat) -> None:
    try:
        loaded = threats.from_entries(threats.to_entries(threat), _classes(threat))
    except ValueError as error:
        raise AssertionError(f"{laws.name} cannot be saved and loaded: {error}") from error
    law = "is another threat when it is loaded"
    same = jax.tree.structure(loaded) == jax.tree.structure(threat)
    laws.hold(same, f"{law}: {loaded} instead of {threat}")
    laws.close(loaded, jax.tree.map(jnp.float32, threat), law)


def _classes(threat: Any) -> dict[str, type]:
    """Returns the classes of a threat and of those inside, by the kind a file names."""
    kind = type(threat)
    classes = {f"{kind.__module__}:{kind.__qualname__}": kind}
    for field in dataclasses.fields(threat) if dataclasses.is_dataclass(threat) else ():
        classes |= _classes(getattr(threat, field.name))
    return classes

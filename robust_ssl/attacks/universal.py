"""One perturbation for all images: how it is fitted.

Fitting is a pair of pure functions, ``init`` and ``step``, so that `fit` can `jax.vmap` them over
*members*, that is seeds and budgets: one compilation gives a whole accuracy-against-epsilon curve,
and the clean images go through the model once for all members.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import objectives, struct, threats
from robust_ssl.attacks.fit_batch import FitBatch
from robust_ssl.attacks.perturbation import (
    UniversalPerturbation,
    at_step,
    check_fits_gray,
    delta_of_pattern,
    random_delta,
)
from robust_ssl.keys import check_key
from robust_ssl.parallel import Parallel
from robust_ssl.types import Model, Objective, Threat


class UniversalAttack(Protocol):
    """How a perturbation is fitted: a frozen pytree value with three pure functions.

    `state` is any pytree of arrays.  Randomness comes from the key of `init`; a step is a function
    of the state, the threat and the batch.  A threat that is random itself, as a patch of random
    location, comes to `step` with a key for that step, which the batch reads.

    Two more members are read where they are there: `name`, for tables and file names, and
    ``gradients_per_batch(images)``, for an attack whose step does not take one input gradient for
    each image.

    Example:
      >>> @struct.dataclass
      ... class SteepestAscent:
      ...     step_size: float = 2e-3
      ...     def init(self, key, image_shape, threat):
      ...         return random_delta(key, image_shape, threat)
      ...     def step(self, state, threat, batch):
      ...         value, gradient = batch.value_and_grad(objectives.feature_l2, state)
      ...         return batch.project(state + self.step_size * batch.steepest(gradient)), value
      ...     def delta(self, state, threat):
      ...         return state
      >>> SteepestAscent().init(jax.random.key(0), (8, 8, 3), threats.Linf(4 / 255)).shape
      (8, 8, 3)
    """

    def init(self, key: jax.Array, image_shape: tuple[int, ...], threat: Threat) -> Any:
        """Returns the state before the first step."""

    def step(self, state: Any, threat: Threat, batch: FitBatch) -> tuple[Any, jax.Array]:
        """Returns the next state and the objective before it."""

    def delta(self, state: Any, threat: Threat) -> jax.Array:
        """Returns the perturbation, ``[H, W, 3]``, inside the budget."""


def usual_length(threat: Threat, pixels: float) -> jax.Array | float:
    """Returns the step of a universal attack where none is given.

    `pixels`, by which every pixel moves.  Under `L2` that would be the length of the whole move,
    and no number of steps would go far; there, and under any other threat with an `epsilon` but
    `Linf`, it is the share of the budget that `pixels` is of 10/255.

    Example:
      >>> usual_length(threats.Linf(8 / 255), 2e-3), round(usual_length(threats.L2(3.0), 2e-3), 3)
      (0.002, 0.153)
    """
    inner = threat.threat if isinstance(threat, threats.Band) else threat
    by_pixel = isinstance(inner, threats.Linf) or not hasattr(inner, "epsilon")
    return pixels if by_pixel else inner.epsilon * (pixels * 255 / 10)


@struct.dataclass
class UniversalPGDState:
    """State of `UniversalPGD`: the perturbation and the running direction, ``[H, W, 3]`` each."""

    delta: jax.Array
    velocity: jax.Array


@struct.dataclass
class UniversalPGD:
    """Momentum sign ascent on an objective averaged over the batch, from a random start.

    Attributes:
      step_size: Length of a step, pixel units; None is `usual_length` of 2e-3.
      momentum: Share of the last direction that is kept, in [0, 1).
      objective: What is maximized; of the same function one program is kept (docs/attacks.md).

    References:
      Moosavi-Dezfooli et al., "Universal Adversarial Perturbations", CVPR 2017 (the problem);
      Dong et al., "Boosting Adversarial Attacks with Momentum", CVPR 2018, Algorithm 1 (the step).
    """

    step_size: jax.Array | float | None = None
    momentum: jax.Array | float = 0.9
    objective: Objective = struct.field(pytree_node=False, default=objectives.feature_l2)
    name: str = struct.field(pytree_node=False, default="universal_pgd")

    def init(self, key, image_shape, threat) -> UniversalPGDState:
        """Starts at a random allowed perturbation: zero is stationary for feature distances."""
        start = random_delta(key, image_shape, threat)
        return UniversalPGDState(delta=start, velocity=jnp.zeros_like(start))

    def step(self, state, threat, batch):
        """Moves the perturbation once; returns the new state and the objective before it."""
        value, gradient = batch.value_and_grad(self.objective, state.delta)
        scale = jnp.mean(jnp.abs(gradient))
        velocity = self.momentum * state.velocity + gradient / jnp.where(scale > 0, scale, 1.0)
        length = self.step_size
        if length is None:
            length = usual_length(threat, 2e-3)  # UAP-PGD's first rate
        moved = state.delta + length * batch.steepest(velocity)
        return UniversalPGDState(delta=batch.project(moved), velocity=velocity), value

    def delta(self, state, threat) -> jax.Array:
        """Returns the perturbation, ``[H, W, 3]``."""
        return state.delta


@struct.dataclass
class RandomNoise:
    """Baseline: every pixel at the budget with a random sign (a patch: black or white), not fitted.

    What it does to a model is what any perturbation of that size does; an attack is worth what it
    does beyond.

    Attributes:
      objective: What the curve reports.
    """

    objective: Objective = struct.field(pytree_node=False, default=objectives.feature_l2)
    name: str = struct.field(pytree_node=False, default="random_noise")

    def init(self, key, image_shape, threat) -> jax.Array:
        """Draws the signs."""
        return delta_of_pattern(jax.random.rademacher(key, image_shape, jnp.float32), threat)

    def step(self, state, threat, batch):
        """Changes nothing; returns the state and the objective."""
        return state, batch.value(self.objective, state)

    def delta(self, state, threat) -> jax.Array:
        """Returns the noise, ``[H, W, 3]``."""
        return state


@struct.dataclass
class FittedUniversal:
    """What `fit` returns.

    Attributes:
      perturbations: All members in one value, with a leading member axis.
      curve: The objective of each step before its update, float ``[steps, members]``.
    """

    perturbations: UniversalPerturbation
    curve: np.ndarray

    def __len__(self) -> int:
        """Returns the number of members."""
        return len(self.perturbations.delta)

    def member(self, index: int) -> UniversalPerturbation:
        """Returns one perturbation, ready to be applied or saved."""
        return jax.tree.map(lambda leaf: leaf[index], self.perturbations)


def members(seeds: Sequence[int], epsilons: Sequence[float]) -> tuple[jax.Array, jax.Array]:
    """Returns keys and budgets of every pair, seed by seed: two arrays of ``len * len``.

    `fit` checks the budgets: what they may be depends on the threat.

    Raises:
      ValueError: If a list is empty.

    Example:
      >>> keys, epsilons = members(seeds=(0, 1), epsilons=(0.25, 0.5))
      >>> keys.shape, epsilons.tolist()
      ((4,), [0.25, 0.5, 0.25, 0.5])
    """
    if not len(seeds) or not len(epsilons):
        raise ValueError(f"need at least one seed and one epsilon, got {seeds} and {epsilons}")
    keys = jax.vmap(jax.random.key)(jnp.asarray(np.repeat(np.asarray(seeds), len(epsilons))))
    return keys, jnp.asarray(np.tile(np.asarray(epsilons, np.float32), len(seeds)))


def fit(
    attack: UniversalAttack,
    model: Model,
    batches: Iterable[Mapping[str, Any]],
    *,
    keys: jax.Array,
    epsilons: jax.Array,
    image_shape: tuple[int, int, int],
    parallel: Parallel,
    threat: Callable[[Any], Threat] = threats.Linf,
    on_step: Callable[[int, jax.Array], None] | None = None,
) -> FittedUniversal:
    """Fits one perturbation per member against a model, all members at once.

    The model is an argument of the compiled step: fitting against another one of the same shapes
    does not compile again.  The host never waits for a step.

    Args:
      attack: How to fit.
      model: What is attacked; it is not changed.
      batches: Mappings with ``"images"``, float ``[batch, H, W, 3]`` in [0, 1] (surrogate images:
        the attacker does not have the downstream ones), the batch a multiple of the devices.  Who
        does have them gives ``"labels"`` too, int32 ``[batch]``, for an objective that needs them.
      keys: One random key per member, ``[members]``; see `members`.
      epsilons: One budget per member, float ``[members]``: pixel units, or what `threat` takes.
      image_shape: (height, width, 3).
      parallel: Over which devices, and how; the result does not depend on it.
      threat: Makes a threat of a budget: `threats.Linf`, `threats.L2`, `threats.Patch` (of an
        area), ``lambda epsilon: threats.Band(threats.Linf(epsilon), 0, 0.125)``.  A perturbation
        without an image is judged on a gray one, so a budget of `threats.Linf` is at most 0.5.
      on_step: Called with the step's number and its objective ``[members]``, which is still being
        computed: reading it waits for it.

    Returns:
      The perturbations and the curve of the objective.

    Raises:
      ValueError: If the model is a plain function, there are no batches, an image has another
        shape, a budget is one that the threat cannot have or above 0.5 under `threats.Linf`, the
        numbers of keys and budgets differ, or an objective or a perturbation is not finite, or
        larger than its budget.

    Example:
      >>> from robust_ssl import models
      >>> encoder = models.resnet18(jax.random.key(0), width=8, image_size=8)
      >>> keys, epsilons = members(seeds=(0,), epsilons=(4 / 255, 8 / 255))
      >>> fitted = fit(UniversalPGD(), encoder, [{"images": np.full((2, 8, 8, 3), 0.5, "f4")}],
      ...              keys=keys, epsilons=epsilons, image_shape=(8, 8, 3),
      ...              parallel=Parallel.create(num_devices=1))
      >>> fitted.curve.shape, fitted.member(1).delta.shape
      ((1, 2), (8, 8, 3))
    """
    check_key(keys, "keys")
    _check_model(model)
    if keys.shape != np.shape(epsilons):
        raise ValueError(f"got {keys.shape} keys and {np.shape(epsilons)} epsilons; give as many")
    budgets = jax.vmap(lambda epsilon: _made(threat, epsilon))(jnp.asarray(epsilons, jnp.float32))
    threats.check(budgets, tuple(image_shape))
    check_fits_gray(budgets, tuple(image_shape))
    states = _init_members(attack, tuple(image_shape), keys, budgets)
    parallel = parallel.anew_for(model)
    constants = parallel.replicate((attack, model, budgets, keys))
    states, step, curve = parallel.replicate((states, jnp.int32(0))), _fit_step(parallel), []
    for number, batch in enumerate(batches):
        images = batch["images"]
        if tuple(images.shape[1:]) != tuple(image_shape):
            raise ValueError(
                f"batch {number}: expected images [batch, *{tuple(image_shape)}], got shape "
                f"{tuple(images.shape)}; resize the data or change image_shape"
            )
        given = {name: batch[name] for name in ("images", "labels") if name in batch}
        states, values = step((constants, states), parallel.put(given))
        curve.append(values)
        if on_step is not None:
            on_step(number, values)
    if not curve:
        raise ValueError("there is nothing to fit on: `batches` is empty")
    deltas = _deltas_of_members(attack, states[0], budgets)
    curve = np.stack([np.asarray(values) for values in curve])
    name = getattr(attack, "name", type(attack).__name__)
    _check_finite(name, curve, np.asarray(deltas))
    _check_budgets(name, deltas, budgets)
    _check_moved(name, deltas, budgets)
    return FittedUniversal(UniversalPerturbation(deltas, budgets, name=name), curve)


def _made(threat: Callable[[Any], Threat], epsilon: jax.Array) -> Threat:
    """Returns the threat of a budget; raises ValueError if there is none, or it is no pytree."""
    made = threat(epsilon)
    try:
        threats.check_is_threat(made)
        struct.check_passable(made)
    except ValueError as error:
        name = getattr(threat, "__name__", type(threat).__name__)
        raise ValueError(f"threat={name} must make a threat of a budget: {error}") from error
    return made


def _check_model(model: Any) -> None:
    """Raises ValueError for a model that is no pytree, which no compiled step takes."""
    if jax.tree.structure(model) != jax.tree.structure(0):
        return
    name = getattr(model, "__name__", type(model).__name__)
    raise ValueError(
        f"the encoder {name} is a plain function or object, and a compiled step takes models whose "
        f"weights are arrays; {how_to_make_encoder(name)}"
    )


def how_to_make_encoder(name: str) -> str:
    """Returns what an error advises of a function or an object that is no encoder."""
    return (
        f"make an encoder of it: robust_ssl.from_callable({name}, image_size) for a function of "
        "images to features [n, numbers], from_nnx or from_torch for a module"
    )


def _check_finite(name: str, curve: np.ndarray, deltas: np.ndarray) -> None:
    finite = np.isfinite(curve).all(axis=0) & np.isfinite(deltas).all(axis=(1, 2, 3))
    if finite.all():
        return
    bad, (steps, _) = np.flatnonzero(~finite), np.nonzero(~np.isfinite(curve))
    where = f"first in step {steps.min()}" if len(steps) else f"after the last step, {len(curve)}"
    raise ValueError(
        f"{name}: the objective or the perturbation of member(s) {bad.tolist()} of {len(finite)} "
        f"is not finite, {where}; look at what the encoder gives for these images (its outputs, "
        "its weights, the mean and std of its normalization) and at the images themselves"
    )


def _check_budgets(name: str, deltas: jax.Array, budgets: Threat) -> None:
    """Raises ValueError if a perturbation is larger than it may be; a patch's is its place's."""
    if hasattr(budgets, "project_delta") or not hasattr(budgets, "norm"):
        return
    sizes = np.asarray(jax.vmap(lambda budget, delta: budget.norm(delta))(budgets, deltas))
    limits = np.broadcast_to(np.asarray(budgets.epsilon), sizes.shape)
    over = np.flatnonzero(sizes > limits * (1 + 1e-4) + 1e-6)
    if over.size:
        sizes_over = ", ".join(f"{sizes[i]:.4g} where {limits[i]:.4g} is allowed" for i in over)
        raise ValueError(
            f"{name}: the perturbation of member(s) {over.tolist()} is larger than its budget: "
            f"{sizes_over}; its `delta` must return an allowed one, as `within_budget` does"
        )


def _check_moved(name: str, deltas: jax.Array, budgets: Threat) -> None:
    """Raises ValueError if a threat of a user's own leaves nothing of a perturbation."""
    known = hasattr(budgets, "norm") or hasattr(budgets, "project_delta")
    if not known and not np.asarray(deltas).any():
        raise ValueError(
            f"{name}: {type(budgets).__name__} allows no change of a gray image, on which a "
            "perturbation for all images is judged, so none was fitted; give it sample_delta, "
            "project_delta and apply, as threats.Patch has them, or attack each image by itself"
        )


@functools.partial(jax.jit, static_argnums=1)
def _init_members(attack, image_shape, keys, budgets):
    return jax.vmap(lambda key, budget: attack.init(key, image_shape, budget))(keys, budgets)


@jax.jit
def _deltas_of_members(attack, states, budgets):
    return jax.vmap(attack.delta)(states, budgets)


def _fit_step(parallel: Parallel) -> Callable:
    """Returns the compiled step; kept, so that the next fit finds it compiled."""
    return parallel.made_once(_compiled_step)


def _compiled_step(parallel: Parallel) -> Callable:
    def step(state, batch):
        (attack, model, budgets, keys), (states, number) = state
        clean = model(batch["images"])  # once for all members

        def one(member, budget, key):
            threat = at_step(budget, key, number)
            labels = batch.get("labels")
            seen = FitBatch(model, threat, batch["images"], clean, parallel.axis_name, labels)
            return attack.step(member, threat, seen)

        states, values = jax.vmap(one)(states, budgets, keys)
        return (states, number + 1), values

    return parallel.compile(step)

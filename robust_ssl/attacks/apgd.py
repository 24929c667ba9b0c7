"""APGD: projected gradient ascent that chooses its own step size.

Written for one image; the budget and the target rank are leaves, so that other budgets and all
targets of a targeted attack share one compiled function.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from robust_ssl import struct
from robust_ssl.attacks.perturbation import value_of
from robust_ssl.objectives import labelled
from robust_ssl.types import AttackInputs, Model, Objective, Threat

FIRST_STEP = 2.0  # times epsilon; Croce and Hein 2020, Section 3.2
MOMENTUM = 0.75  # weight of the new step, its alpha; Section 3.2


def draw(model: Model, key: jax.Array) -> Model:
    """Returns one draw of a randomized model; any other model is returned as it is.

    A model is randomized if it has a method ``with_key(key)`` that returns the deterministic model
    of that key, for example a frozen dataclass that holds a key and replaces it.

    Example:
      >>> draw(jnp.sin, jax.random.key(0)) is jnp.sin
      True
    """
    return model.with_key(key) if hasattr(model, "with_key") else model


def fails(value: jax.Array, gradient: jax.Array) -> jax.Array:
    """Returns whether an attack cannot go on from a point: its objective or gradient is NaN.

    An objective of infinity may have a NaN for a gradient: there is nothing above it.

    Example:
      >>> bool(fails(jnp.array(1.0), jnp.array([0.0, jnp.nan])))
      True
    """
    return jnp.isnan(value) | (jnp.isnan(gradient).any() & (value < jnp.inf))


def misclassified(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Returns whether logits ``[classes]`` give another answer than `label`; NaN gives none.

    Example:
      >>> bool(misclassified(jnp.array([jnp.nan, 0.0]), jnp.array(0)))
      True
    """
    return (jnp.argmax(logits) != label) | jnp.isnan(logits).any()


def budget(threat: Threat, name: str) -> jax.Array | float:
    """Returns the budget of a threat, or raises ValueError: the attack `name` needs one.

    Example:
      >>> from robust_ssl import threats
      >>> budget(threats.Linf(0.25), "APGD")
      0.25
    """
    if not hasattr(threat, "epsilon"):
        raise ValueError(
            f"{name} measures its steps by `epsilon`, so it takes the threats Linf, L2 and Band, "
            f"or one with such a budget, got {type(threat).__name__}; PGD takes any"
        )
    return threat.epsilon


class Tries:
    """The bounds and the cost of an attack of `restarts` tries with `num_steps` gradients each."""

    def __post_init__(self):
        """Checks the static fields."""
        if self.num_steps < 1 or self.restarts < 1:
            raise ValueError(
                f"num_steps and restarts must be at least 1, got num_steps={self.num_steps} and "
                f"restarts={self.restarts}"
            )

    @property
    def gradient_evaluations(self) -> int:
        """Input gradients per image."""
        return self.num_steps * self.restarts


def _with_rank(objective: Objective, rank: jax.Array | int | None) -> Objective:
    if rank is None:
        return objective
    parameters = inspect.signature(objective).parameters
    if "rank" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise ValueError(
            "a rank names the target of an objective with a parameter `rank`, as dlr_targeted and "
            "margin_targeted of robust_ssl.objectives.labelled are; objective "
            f"{getattr(objective, '__name__', objective)} has none: take one of those, or rank=None"
        )
    return functools.partial(objective, rank=rank)


def checkpoints(num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns after which steps the step size is looked at, and how many steps lie before.

    The first window is 22 % of the steps; each one is 3 % of them shorter, but none below 6 %.
    The first step of the first window is compared with the start, as in the paper; their code
    (``check_oscillation``) reads a zero there, an entry of its list of losses not yet filled.

    Returns:
      Whether there is a checkpoint after step i, bool ``[num_steps]``, and the length of the
      window that ends there (0 where none ends), int32 ``[num_steps]``.

    Example:
      >>> np.flatnonzero(checkpoints(100)[0]).tolist()
      [21, 40, 56, 69, 79, 86, 92, 98]

    References:
      Croce and Hein, ICML 2020, Section 3.2, in the whole steps of their code.
    """
    window = max(int(0.22 * num_steps), 1)
    lengths = np.zeros(num_steps, np.int32)
    last = window - 1
    while last < num_steps:
        lengths[last] = window
        window = max(window - max(int(0.03 * num_steps), 1), max(int(0.06 * num_steps), 1))
        last += window
    return lengths > 0, lengths


@struct.dataclass
class _Candidate:
    """A point to be returned."""

    point: jax.Array
    wrong: jax.Array  # bool: the model misclassifies it
    value: jax.Array


def _candidate(point, wrong: jax.Array, value: jax.Array, gradient: jax.Array) -> _Candidate:
    """A point as a candidate; where the attack fails NaN, which no other number is better than."""
    failed = fails(value, gradient) & ~wrong
    point = jnp.where(failed, jnp.nan, point)
    return _Candidate(point, wrong, jnp.where(failed, jnp.inf, value))


def _better(one: _Candidate, other: _Candidate) -> _Candidate:
    """Takes a misclassified point before any other, then the higher value; the first on a tie."""
    wins = (other.wrong & ~one.wrong) | ((other.wrong == one.wrong) & (other.value > one.value))
    return jax.tree.map(lambda a, b: jnp.where(wins, b, a), one, other)


@struct.dataclass
class _Path:
    """Where the ascent stands: the point, the best one by value, and what the window has shown."""

    point: jax.Array
    gradient: jax.Array
    value: jax.Array  # at the point last evaluated, which a restart from the best leaves behind
    before: jax.Array  # the point one step earlier
    step_size: jax.Array
    best_point: jax.Array
    best_gradient: jax.Array
    best_value: jax.Array
    raised: jax.Array  # steps of this window that raised the value
    best_at_checkpoint: jax.Array
    halved: jax.Array  # whether the last checkpoint halved the step size


@struct.dataclass
class APGD:
    """Auto-PGD: ascent with momentum that halves its step size when it no longer gains.

    The step starts at twice the budget.  At fixed checkpoints it is halved, and the ascent goes on
    from the best point so far, if fewer than a share `rho` of the window's steps raised the
    objective, or if the best value is the one of the last checkpoint and the step was not halved
    there.  Of all points seen a misclassified one is returned if there is any, else the one with
    the highest objective; without a label or without logits only the objective counts.  If none is
    misclassified and the objective or its gradient was NaN, so is what is returned.

    It starts at ``threat.sample``.  (The released code scales that draw to the ball's surface,
    which for images differs by less than a thousandth of the budget.)  A randomized model (see
    `draw`) is drawn anew at every step.

    Attributes:
      threat: With a budget `epsilon`: `Linf`, `L2`, or a `Band` of them.
      objective: What is raised.  With a `rank` it is called as
        ``objective(inputs, rank=rank)``.
      rank: Which wrong class a targeted objective moves to, 1 is the likeliest for the clean
        image; None for objectives without a target.  A leaf: all targets compile once.
      num_steps: Gradient steps of a try, at least 1.
      restarts: Independent tries of which the best point is returned, at least 1.
      rho: Share of the steps that must raise the objective, or the step size is halved.
      eot: Draws of a randomized model over which objective, gradient and logits are averaged.

    Raises:
      ValueError: If `num_steps`, `restarts` or `eot` is below 1; when called, if `eot` is above 1
        and the model is not randomized, if the threat has no `epsilon`, or if there is a `rank`
        but the objective takes none.

    Example:
      >>> from robust_ssl import threats
      >>> APGD(threats.Linf(8 / 255), num_steps=100, restarts=5).gradient_evaluations
      505

    References:
      Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
      parameter-free attacks", ICML 2020, Algorithm 1.
      Athalye et al., "Obfuscated Gradients Give a False Sense of Security", ICML 2018, Section 4.2
      (expectation over transformation).
    """

    threat: Threat
    objective: Objective = struct.field(pytree_node=False, default=labelled.cross_entropy)
    rank: jax.Array | int | None = None
    num_steps: int = struct.field(pytree_node=False, default=100)
    restarts: int = struct.field(pytree_node=False, default=1)
    rho: float = struct.field(pytree_node=False, default=0.75)
    eot: int = struct.field(pytree_node=False, default=1)

    def __post_init__(self):
        """Checks the static fields."""
        if min(self.num_steps, self.restarts, self.eot) < 1:
            raise ValueError(
                f"num_steps, restarts and eot must be at least 1, got num_steps={self.num_steps}, "
                f"restarts={self.restarts} and eot={self.eot}"
            )

    @property
    def gradient_evaluations(self) -> int:
        """Input gradients per image."""
        return (self.num_steps + 1) * self.restarts * self.eot

    def __call__(
        self, key: jax.Array, model: Model, image: jax.Array, label: jax.Array | None = None
    ) -> jax.Array:
        """Returns the adversarial image, ``[H, W, 3]`` in [0, 1]."""
        look = self._look(key, model, image, label)

        def attempt(index, best):
            return _better(best, self._climb(jax.random.fold_in(key, index), look, image))

        none = _Candidate(image, jnp.asarray(False), jnp.asarray(-jnp.inf, image.dtype))
        if self.restarts == 1:
            return attempt(0, none).point
        return lax.fori_loop(0, self.restarts, attempt, none).point

    def _look(self, key: jax.Array, model: Model, image: jax.Array, label: jax.Array | None):
        """Returns ``look(point, key) -> (value, wrong), gradient``."""
        if self.eot > 1 and not hasattr(model, "with_key"):
            raise ValueError(
                f"eot={self.eot} averages over draws of a randomized model, but the model has no "
                "method with_key(key); take eot=1 for a deterministic one"
            )
        objective = _with_rank(self.objective, self.rank)
        images, labels = image[None], None if label is None else jnp.reshape(label, (1,))
        clean = lax.stop_gradient(draw(model, key)(images))

        def once(point: jax.Array, key: jax.Array):
            outputs = draw(model, key)(point[None])
            inputs = AttackInputs(clean, outputs, images, point[None], labels)
            return value_of(objective, inputs), outputs.logits

        def several(point: jax.Array, key: jax.Array):
            draws = jax.vmap(once, in_axes=(None, 0))(point, jax.random.split(key, self.eot))
            return jax.tree.map(lambda x: jnp.mean(x, axis=0), draws)

        ascend = jax.value_and_grad(once if self.eot == 1 else several, has_aux=True)

        def look(point: jax.Array, key: jax.Array):
            (value, logits), gradient = ascend(point, key)
            has_answer = label is not None and logits is not None
            wrong = misclassified(logits[0], label) if has_answer else jnp.asarray(False)
            return (value, wrong), gradient

        return look

    def _climb(self, key: jax.Array, look: Callable, image: jax.Array) -> _Candidate:
        """Makes one try."""
        start_key, draw_key = jax.random.split(key)
        start = self.threat.sample(start_key, image)
        (value, wrong), gradient = look(start, jax.random.fold_in(draw_key, 0))
        path = _Path(
            point=start,
            gradient=gradient,
            value=value,
            before=start,
            step_size=jnp.asarray(FIRST_STEP * budget(self.threat, "APGD"), image.dtype),
            best_point=start,
            best_gradient=gradient,
            best_value=value,
            raised=jnp.zeros((), jnp.int32),
            best_at_checkpoint=value,
            halved=jnp.asarray(True),  # so that only too few gains can halve it the first time
        )
        is_checkpoint, windows = map(jnp.asarray, checkpoints(self.num_steps))

        def step(index, carry):
            path, best = carry
            moved = self._move(path, image, jnp.where(index == 0, 1.0, MOMENTUM))
            (value, wrong), gradient = look(moved, jax.random.fold_in(draw_key, index + 1))
            best = _better(best, _candidate(moved, wrong, value, gradient))
            path = _advance(path, moved, value, gradient)
            checked = self._check(path, windows[index])
            return jax.tree.map(
                lambda a, b: jnp.where(is_checkpoint[index], b, a), path, checked
            ), best

        best = _candidate(start, wrong, value, gradient)
        return lax.fori_loop(0, self.num_steps, step, (path, best))[1]

    def _move(self, path: _Path, image: jax.Array, weight: jax.Array) -> jax.Array:
        ahead = path.step_size * self.threat.steepest(path.gradient)
        ahead = self.threat.project(path.point + ahead, image) - path.point
        carried = path.point - path.before
        return self.threat.project(path.point + weight * ahead + (1 - weight) * carried, image)

    def _check(self, path: _Path, window: jax.Array) -> _Path:
        """Halves the step size and goes back to the best point, if one of the conditions holds."""
        too_few = path.raised <= self.rho * window
        stuck = ~path.halved & (path.best_at_checkpoint >= path.best_value)
        halve = too_few | stuck
        return path.replace(
            point=jnp.where(halve, path.best_point, path.point),
            gradient=jnp.where(halve, path.best_gradient, path.gradient),
            step_size=jnp.where(halve, path.step_size / 2, path.step_size),
            raised=jnp.zeros_like(path.raised),
            best_at_checkpoint=path.best_value,
            halved=halve,
        )


def _advance(path: _Path, moved: jax.Array, value: jax.Array, gradient: Any) -> _Path:
    """Takes the new point in, and remembers it if it is the best."""
    wins = value > path.best_value
    return path.replace(
        point=moved,
        gradient=gradient,
        value=value,
        before=path.point,
        best_point=jnp.where(wins, moved, path.best_point),
        best_gradient=jnp.where(wins, gradient, path.best_gradient),
        best_value=jnp.where(wins, value, path.best_value),
        raised=path.raised + (value > path.value),
    )

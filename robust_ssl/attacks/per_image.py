"""Attacks that craft one perturbation for each image: FGSM, PGD, EmbedAttack.

Each is a frozen pytree value called as ``attack(key, model, image, label)`` for one image;
`attack_batch` runs it on many.  The budget and the step size are leaves: an attack rebuilt with
other numbers does not compile again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from robust_ssl import objectives, struct, threats
from robust_ssl.attacks.apgd import Tries, budget, draw, fails
from robust_ssl.attacks.perturbation import value_of
from robust_ssl.keys import check_key
from robust_ssl.pixels import float_pixels
from robust_ssl.types import Attack, AttackInputs, Model, Objective, Threat

_DRAWS = 2**31 - 1  # key number of the draws of a randomized model; no try has it


def attack_batch(
    attack: Attack,
    key: jax.Array,
    model: Model,
    images: jax.Array,
    labels: jax.Array | None = None,
    indices: jax.Array | None = None,
) -> jax.Array:
    """Attacks every image of a batch by itself, in one batched pass per step.

    The key of an image is ``fold_in(key, indices[i])``: with its *global* index an image gets the
    same perturbation whatever its batch, its neighbours or the number of devices.  Call it under
    `jax.jit` (or `Parallel.map`).

    Args:
      attack: A per-image or a fitted universal attack.
      key: Random key of the whole batch.
      model: What is attacked.
      images: Pixels in [0, 1], float ``[batch, H, W, 3]``.  Half-precision ones become float32,
        whose steps are far below a budget.
      labels: int32 ``[batch]``; None for attacks that need none.
      indices: int32 ``[batch]``; None is 0, 1, 2, ...

    Returns:
      Adversarial images, float32 ``[batch, H, W, 3]`` in [0, 1].

    Raises:
      TypeError: If the images are integers, or the attack returns no floats.
      ValueError: If the attack returns another shape than that of its image.

    Example:
      >>> from robust_ssl import models, threats
      >>> encoder = models.resnet18(jax.random.key(0), width=8, image_size=8)
      >>> attack = EmbedAttack(threats.Linf(8 / 255), num_steps=1)
      >>> attack_batch(attack, jax.random.key(1), encoder, jnp.full((2, 8, 8, 3), 0.5)).shape
      (2, 8, 8, 3)
    """
    check_key(key)
    images = float_pixels(images)
    indices = jnp.arange(images.shape[0]) if indices is None else indices
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)
    if labels is None:
        attacked = jax.vmap(lambda k, image: attack(k, model, image))(keys, images)
    else:
        one = jax.vmap(lambda k, image, label: attack(k, model, image, label))
        attacked = one(keys, images, labels)
    return checked(attack, attacked, images)


def checked(attack: Attack, attacked: Any, images: jax.Array) -> jax.Array:
    """Returns what an attack made of images ``[batch, H, W, 3]`` as float32.

    Raises:
      TypeError: If it is no array of floats, by the attack's name.
      ValueError: If it has another shape than the images.
    """
    shape, dtype = (getattr(attacked, name, None) for name in ("shape", "dtype"))
    is_float = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    if is_float and shape == images.shape:
        return jnp.asarray(attacked, jnp.float32)
    function = getattr(attack, "func", attack)  # of a partial
    called = getattr(attack, "name", "") or getattr(function, "__name__", type(function).__name__)
    returned = type(attacked).__name__ if dtype is None else f"{dtype} {list(shape[1:])}"
    raise (ValueError if is_float else TypeError)(
        f"attack {called} must return the attacked image as it gets it, float pixels in [0, 1] "
        f"{list(images.shape[1:])}, and returned {returned}"
    )


def usual_step_size(threat: Threat, num_steps: int) -> jax.Array | float:
    """Returns the step of `PGD` where none is given: what is usual for the threat.

    2/255 for `Linf`; for any other threat with an `epsilon` 2.5 times the way to the boundary in
    `num_steps` equal steps, so that every point of the ball can be reached from every other; for
    one without, as `Patch`, whose pixels may take any value, a tenth of the range of a pixel.

    Example:
      >>> usual_step_size(threats.L2(0.5), 10)
      0.125

    References:
      Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018:
      Section 5 (2/255 for CIFAR-10), and 2.5 epsilon / num_steps for L2.
    """
    if isinstance(threat, threats.Linf):
        return 2 / 255
    return 2.5 * threat.epsilon / num_steps if hasattr(threat, "epsilon") else 0.1


def _objective_at(
    objective: Objective, key: jax.Array, model: Model, image: jax.Array, label: jax.Array | None
) -> Callable[[jax.Array, jax.Array | int], jax.Array]:
    """Returns the objective of an adversarial image and the number of a randomized model's draw."""
    images = image[None]
    key = jax.random.fold_in(key, _DRAWS)
    # Objectives that never look at the clean outputs cost no clean pass: it is dead code then.
    clean = lax.stop_gradient(draw(model, key)(images))
    labels = None if label is None else jnp.reshape(label, (1,))

    def value(adversarial: jax.Array, number: jax.Array | int) -> jax.Array:
        moved = draw(model, jax.random.fold_in(key, number))(adversarial[None])
        inputs = AttackInputs(clean, moved, images, adversarial[None], labels)
        return value_of(objective, inputs)

    return value


@struct.dataclass
class FGSM:
    """One step of the whole budget along the steepest direction, from the image itself.

    Attributes:
      threat: With a budget `epsilon`: `Linf`, `L2`, or a `Band` of them.
      objective: What is raised; it must not be stationary at the image, as feature distances are.

    Raises:
      ValueError: When called, if the threat has no `epsilon`.

    Example:
      >>> from robust_ssl import models, threats
      >>> encoder = models.resnet18(jax.random.key(0), width=8, image_size=8)
      >>> net = models.classifier(jax.random.key(1), encoder, 3, head="linear")
      >>> image = jnp.full((8, 8, 3), 0.5)
      >>> moved = FGSM(threats.Linf(0.25))(jax.random.key(2), net, image, jnp.array(1))
      >>> round(float(jnp.max(jnp.abs(moved - image))), 4)
      0.25

    References:
      Goodfellow et al., "Explaining and Harnessing Adversarial Examples", ICLR 2015, Section 4.
    """

    threat: Any
    objective: Objective = struct.field(pytree_node=False, default=objectives.cross_entropy)

    @property
    def gradient_evaluations(self) -> int:
        """Input gradients per image."""
        return 1

    def __call__(
        self, key: jax.Array, model: Model, image: jax.Array, label: jax.Array | None = None
    ) -> jax.Array:
        """Returns the adversarial image, ``[H, W, 3]``; `key` draws a randomized model only."""
        length = budget(self.threat, "FGSM")
        gradient = jax.grad(_objective_at(self.objective, key, model, image, label))(image, 0)
        return self.threat.project(image + length * self.threat.steepest(gradient), image)


@struct.dataclass
class PGD(Tries):
    """Projected gradient ascent on an objective, inside a threat.

    Only the image gets a gradient.  With `keep_best` the best point of the whole path is returned,
    so the objective never ends below its start; that costs one forward pass more than the
    ``num_steps`` gradients.  Training takes ``keep_best=False``: exactly ``num_steps`` gradients.
    Where the objective or its gradient is NaN the image that is returned is, too.  A randomized
    model (`robust_ssl.attacks.apgd.draw`) is drawn anew at every step.

    Attributes:
      threat: What the attacker may do.
      step_size: Length of a step, pixel units; None is `usual_step_size`.
      objective: What is raised; of the same function one program is kept (docs/attacks.md).
      num_steps: Gradient steps, at least 1.
      random_start: Start at a random allowed image, not at the image itself.  Needed where the
        objective is stationary at the image, as feature distances are.
      restarts: Independent tries of which the best point is returned, at least 1; more than one
        needs `random_start`, or all tries are the same.
      keep_best: Return the best point seen, not the last.

    Raises:
      ValueError: If `num_steps` or `restarts` is below 1, or there is nothing random to restart.

    Example:
      >>> from robust_ssl import models, threats
      >>> encoder = models.resnet18(jax.random.key(0), width=8, image_size=8)
      >>> net = models.classifier(jax.random.key(1), encoder, 3, head="linear")
      >>> attack = PGD(threats.Linf(8 / 255), num_steps=2)
      >>> attack(jax.random.key(2), net, jnp.full((8, 8, 3), 0.5), jnp.array(1)).shape
      (8, 8, 3)

    References:
      Madry et al., as for `usual_step_size`, Section 2.1.
    """

    threat: Any
    step_size: jax.Array | float | None = None
    objective: Objective = struct.field(pytree_node=False, default=objectives.cross_entropy)
    num_steps: int = struct.field(pytree_node=False, default=10)
    random_start: bool = struct.field(pytree_node=False, default=True)
    restarts: int = struct.field(pytree_node=False, default=1)
    keep_best: bool = struct.field(pytree_node=False, default=True)

    def __post_init__(self):
        """Checks the static fields."""
        super().__post_init__()
        if self.restarts > 1 and not (self.random_start and self.keep_best):
            raise ValueError(
                f"restarts={self.restarts} needs random_start=True and keep_best=True: otherwise "
                "the tries are equal, or there is no best to return"
            )

    def __call__(
        self, key: jax.Array, model: Model, image: jax.Array, label: jax.Array | None = None
    ) -> jax.Array:
        """Returns the adversarial image, ``[H, W, 3]`` in [0, 1]."""
        value = _objective_at(self.objective, key, model, image, label)
        if not self.keep_best:
            return self._last(value, image, self._start(key, image))

        def attempt(index, best):
            start = self._start(jax.random.fold_in(key, index), image)
            first = index * (self.num_steps + 1)  # every look has a draw of its own
            return self._best(lambda x, step: value(x, first + step), image, start, best)

        best = (image, jnp.full((), -jnp.inf))
        if self.restarts == 1:
            best = attempt(0, best)
        else:
            best = lax.fori_loop(0, self.restarts, attempt, best)
        return jnp.where(jnp.isnan(best[1]), jnp.nan, best[0])

    def _start(self, key: jax.Array, image: jax.Array) -> jax.Array:
        return self.threat.sample(key, image) if self.random_start else image

    def _move(self, current: jax.Array, gradient: jax.Array, image: jax.Array) -> jax.Array:
        length = self.step_size
        if length is None:
            length = usual_step_size(self.threat, self.num_steps)
        return self.threat.project(current + length * self.threat.steepest(gradient), image)

    def _last(self, value, image: jax.Array, start: jax.Array) -> jax.Array:
        gradient = jax.grad(value)
        return lax.fori_loop(
            0, self.num_steps, lambda i, x: self._move(x, gradient(x, i), image), start
        )

    def _best(self, value, image: jax.Array, start: jax.Array, best):
        def better(best, current, reached):
            # NaN is above no number: unless it wins, a failed attack would return where it began.
            wins = (reached > best[1]) | (jnp.isnan(reached) & (best[1] < jnp.inf))
            return jnp.where(wins, current, best[0]), jnp.where(wins, reached, best[1])

        def step(number, carry):
            current, best = carry
            # The gradient brings the value along, so looking for the best point is free.
            reached, gradient = jax.value_and_grad(value)(current, number)
            reached = jnp.where(fails(reached, gradient), jnp.nan, reached)
            return self._move(current, gradient, image), better(best, current, reached)

        last, best = lax.fori_loop(0, self.num_steps, step, (start, best))
        return better(best, last, value(last, self.num_steps))


class FeaturePGD(Tries):
    """What the attacks share that are `PGD` on features, from a random start, without a label.

    Zero change is a stationary point of a distance of features, so the start is not an option.
    """

    label_free = True  # so it can be crafted on an encoder alone
    restarts = 1
    keep_best = False

    def __call__(
        self, key: jax.Array, model: Model, image: jax.Array, label: jax.Array | None = None
    ) -> jax.Array:
        """Returns the adversarial image, ``[H, W, 3]`` in [0, 1]; `label` is not looked at."""
        objective = self._aim(model, image)
        tries = {"restarts": self.restarts, "keep_best": self.keep_best}
        attack = PGD(self.threat, self.step_size, objective, self.num_steps, **tries)
        return attack(key, model, image)

    def _aim(self, model: Model, image: jax.Array) -> Objective:
        """Returns what is raised for one image."""
        return self.objective


@struct.dataclass
class EmbedAttack(FeaturePGD):
    """PGD that drives an image's features away from its own clean features, without a label.

    It needs the encoder only, so it is downstream-agnostic.  Its attributes are those of `PGD`, the
    objective a distance of features.

    References:
      Kim et al., "Adversarial Self-Supervised Contrastive Learning", NeurIPS 2020
      (the label-free attack on representations).
    """

    threat: Threat
    step_size: jax.Array | float | None = None
    objective: Objective = struct.field(pytree_node=False, default=objectives.feature_l2)
    num_steps: int = struct.field(pytree_node=False, default=20)
    restarts: int = struct.field(pytree_node=False, default=1)
    keep_best: bool = struct.field(pytree_node=False, default=True)

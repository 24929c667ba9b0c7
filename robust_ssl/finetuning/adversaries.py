"""Perturbations that training carries from step to step.

A per-image attack of k steps costs k gradients before the update's own.  An adversary here costs
none: the update's backward pass gives the gradient for its perturbations along with that for the
weights, and both move.  Its state is a part of the training state and is checkpointed with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from robust_ssl import struct
from robust_ssl.attacks.perturbation import (
    UniversalPerturbation,
    apply_delta,
    attacked_images,
    random_delta,
    within_budget,
)

COLLECTION = "attack"  # where the variables of a training state keep an adversary's deltas


@runtime_checkable
class Adversary(Protocol):
    """What `make_step` takes as `attack` besides per-image attacks: a pytree value.

    One with an attribute ``by_image = True`` has a perturbation for every training image: `init`
    gets their number as `batch_size`, and `apply` images' places in the training set as `indices`.
    """

    def init(self, key: jax.Array, image_shape: tuple[int, ...], batch_size: int) -> jax.Array:
        """Returns the first perturbations, one float array, allowed by the threat."""

    def apply(
        self, deltas: jax.Array, key: jax.Array, images: jax.Array, indices: jax.Array
    ) -> jax.Array:
        """Returns the attacked images ``[n, H, W, 3]``, valid, with a gradient for `deltas`.

        `indices` are the images' places in the global batch, from which all that is random per
        image is drawn.
        """

    def update(
        self, deltas: jax.Array, gradient: jax.Array, key: jax.Array, step: jax.Array
    ) -> jax.Array:
        """Returns the perturbations of the next step; `gradient` is that of the training loss."""


def check_inner(attack: Any) -> None:
    """Raises ValueError unless training can attack with a value that was made of a threat.

    Example:
      >>> check_inner(object())
      Traceback (most recent call last):
      ValueError: object is no pytree, so no compiled step takes it: make its class with
      robust_ssl.struct.dataclass
    """
    struct.check_passable(attack)
    name = type(attack).__name__
    if not (callable(attack) or isinstance(attack, Adversary)):
        raise ValueError(
            f"{name} cannot attack in training: it must be called as attack(key, model, image, "
            "label), or have the methods of finetuning.Adversary"
        )
    fields = [*getattr(attack, "__dataclass_fields__", ())]
    if "threat" in fields[1:] and hasattr(getattr(attack, fields[0]), "project"):
        raise ValueError(f"the first field of {name} must be its threat, and is {fields[0]!r}")


def by_image(attack: Any) -> bool:
    """Returns whether an adversary has a perturbation for every image of the training set."""
    return getattr(attack, "by_image", False)


def deltas_in(variables: Mapping[str, Any], attack: Any) -> Mapping[str, jax.Array]:
    """Returns the perturbations that a training state keeps, by name; none without an adversary.

    Raises:
      ValueError: If the attack is an adversary, and the state keeps none.

    Example:
      >>> dict(deltas_in({"params": {}}, None))
      {}
    """
    if isinstance(attack, Adversary) and COLLECTION not in variables:
        of = "num_images" if by_image(attack) else "batch_size"
        raise ValueError(
            f"{type(attack).__name__} keeps perturbations in the state, and this one has none: "
            f"init_state(classifier, tx, attack, key=..., {of}=...)"
        )
    return variables.get(COLLECTION, {})


@struct.dataclass
class UniversalPool:
    r"""A few universal perturbations, each raised by the gradient that the update needs anyway.

    Image `i` gets a member of the pool chosen at random, or, with probability `clean_share`, none.
    After the step every member moves uphill and is projected:

    .. math:: \delta_k \leftarrow \Pi\big(\delta_k + \eta\, s(\nabla_{\delta_k} L)\big)

    with `s` the threat's steepest direction.  With a clean share and one loss on the attacked
    images a step costs what a step of usual fine-tuning of the same layers costs, and the gradient
    for the stem's input.  A pool of several, of which the oldest is drawn anew every `renew_every`
    steps, keeps training from learning one perturbation by heart.

    Attributes:
      threat: What a universal perturbation may do: `Linf`, `L2`, a `Band` of frequencies, a
        `Patch`.
      step_size: `eta`, pixel units; None is a fifth of the threat's `epsilon`, and a tenth of the
        range of a pixel for a threat without one.  A leaf.
      clean_share: Share of images that stay as they are, in [0, 1].  A leaf.
      size: Perturbations in the pool, at least 1.
      renew_every: Steps between two renewals, each of one member in turn; None renews none.

    Example:
      >>> from robust_ssl import threats
      >>> pool = UniversalPool(threats.Linf(0.1), clean_share=0.0, size=1)
      >>> deltas = pool.init(jax.random.key(0), (4, 4, 3), batch_size=2)
      >>> images = jnp.full((2, 4, 4, 3), 0.5)
      >>> moved = pool.apply(deltas, jax.random.key(1), images, jnp.arange(2))
      >>> bool(jnp.all(jnp.abs(moved - images - deltas) < 1e-6))
      True

    References:
      Shafahi et al., "Universal Adversarial Training", AAAI 2020, Algorithm 3 (one perturbation,
      moved together with the weights).  The pool, its renewal and the clean share are ours.
    """

    threat: Any
    step_size: jax.Array | float | None = None
    clean_share: jax.Array | float = 0.5
    size: int = struct.field(pytree_node=False, default=4)
    renew_every: int | None = struct.field(pytree_node=False, default=None)

    def __post_init__(self):
        if self.size < 1 or (self.renew_every is not None and self.renew_every < 1):
            raise ValueError(
                f"a pool needs size >= 1 and renew_every >= 1 or None, got {self.size} and "
                f"{self.renew_every}"
            )
        # Inside a compiled function it is an array without a value.
        if isinstance(self.clean_share, int | float) and not 0 <= self.clean_share <= 1:
            raise ValueError(f"clean_share must be in [0, 1], got {self.clean_share}")

    @property
    def gradient_evaluations(self) -> int:
        """Input gradients besides the update's own: none."""
        return 0

    def init(self, key: jax.Array, image_shape: tuple[int, ...], batch_size: int) -> jax.Array:
        """Returns random allowed perturbations, float ``[size, H, W, 3]``."""
        del batch_size
        keys = jax.random.split(key, self.size)
        return jax.vmap(lambda k: random_delta(k, image_shape, self.threat))(keys)

    def apply(
        self, deltas: jax.Array, key: jax.Array, images: jax.Array, indices: jax.Array
    ) -> jax.Array:
        """Returns the attacked images ``[n, H, W, 3]``; see `Adversary.apply`."""

        # Keyed by the place in the global batch: the same on any number of devices.
        def one(image, index):
            choice, coin, place = jax.random.split(jax.random.fold_in(key, index), 3)
            delta = deltas[jax.random.randint(choice, (), 0, self.size)]
            attacked = _attacked(delta, image, self.threat, place)
            return jnp.where(jax.random.bernoulli(coin, self.clean_share), image, attacked)

        return jax.vmap(one)(images, indices)

    def update(
        self, deltas: jax.Array, gradient: jax.Array, key: jax.Array, step: jax.Array
    ) -> jax.Array:
        """Returns the perturbations after a step uphill, ``[size, H, W, 3]``."""
        pool = _uphill(deltas, gradient, self.threat, _step_size(self, 1 / 5))
        if self.renew_every is None:
            return pool
        fresh = random_delta(key, deltas.shape[1:], self.threat)
        # Members take turns, so each of them lives for size * renew_every steps.
        turn, rest = jnp.divmod(step + 1, self.renew_every)
        oldest = (jnp.arange(self.size) == turn % self.size) & (rest == 0)
        return jnp.where(oldest.reshape(-1, 1, 1, 1), fresh[None], pool)

    def members(self, deltas: jax.Array) -> list[Any]:
        """Returns the perturbations as attacks, for scoring."""
        return [UniversalPerturbation(delta, self.threat, name="pool") for delta in deltas]


@struct.dataclass
class FreeReplays:
    """Adversarial training "for free": one perturbation per place in the batch.

    Each batch is shown `replays` times in a row; each time the perturbations and the weights move
    by the gradients of the same backward pass.  Perturbations are carried over to the next batch.
    An epoch passes over the data once, so divide the epochs of other methods by `replays` for the
    same number of gradients.

    Attributes:
      threat: What the attacker may do to an image.
      step_size: Length of a step, pixel units; None is the threat's whole `epsilon`, as published.
        A leaf.
      replays: How often each batch is shown, at least 1.

    Example:
      >>> from robust_ssl import threats
      >>> free = FreeReplays(threats.Linf(0.1))
      >>> free.init(jax.random.key(0), (4, 4, 3), batch_size=2).shape
      (2, 4, 4, 3)

    References:
      Shafahi et al., "Adversarial Training for Free!", NeurIPS 2019, Algorithm 1 (8 replays).
    """

    threat: Any
    step_size: jax.Array | float | None = None
    replays: int = struct.field(pytree_node=False, default=8)

    def __post_init__(self):
        if self.replays < 1:
            raise ValueError(f"replays must be at least 1, got {self.replays}")

    @property
    def gradient_evaluations(self) -> int:
        """Input gradients besides the update's own: none."""
        return 0

    def init(self, key: jax.Array, image_shape: tuple[int, ...], batch_size: int) -> jax.Array:
        """Returns zeros, float ``[batch_size, H, W, 3]``."""
        del key
        # Algorithm 1 starts at zero, unlike one-step training with a random start.
        return jnp.zeros((batch_size, *image_shape))

    def apply(
        self, deltas: jax.Array, key: jax.Array, images: jax.Array, indices: jax.Array
    ) -> jax.Array:
        """Returns the attacked images ``[n, H, W, 3]``; see `Adversary.apply`."""
        if len(images) > len(deltas):
            raise ValueError(
                f"a batch of {len(images)} images, but perturbations for {len(deltas)}: give "
                "init_state the batch_size of the step"
            )
        return _all_attacked(deltas[indices], key, images, indices, self.threat)

    def update(
        self, deltas: jax.Array, gradient: jax.Array, key: jax.Array, step: jax.Array
    ) -> jax.Array:
        """Returns the perturbations after a step uphill, ``[batch_size, H, W, 3]``."""
        del key, step
        return _uphill(deltas, gradient, self.threat, _step_size(self, 1.0))


@struct.dataclass
class ATTA:
    """One perturbation for each training image, remembered from epoch to epoch.

    An image meets the perturbation that it had when it was last seen, moved by the gradient of that
    update.  So a few epochs add up to an attack of as many steps, at no cost: the published form
    takes a gradient of its own before each update, this one the update's.  There is a floating
    point image in memory for every image of the set, twice, so it is for small sets.

    Attributes:
      threat: What the attacker may do to an image.
      step_size: Length of a step, pixel units; None is half of the threat's `epsilon` (ours).  A
        leaf.

    Example:
      >>> from robust_ssl import threats
      >>> atta = ATTA(threats.Linf(0.1))
      >>> atta.init(jax.random.key(0), (4, 4, 3), batch_size=50).shape  # of the training set
      (50, 4, 4, 3)

    References:
      Zheng et al., "Efficient Adversarial Training with Transferable Adversarial Examples", CVPR
      2020, without its inverse augmentation: images must not be augmented.
    """

    threat: Any
    step_size: jax.Array | float | None = None

    by_image = True

    @property
    def gradient_evaluations(self) -> int:
        """Input gradients besides the update's own: none."""
        return 0

    def init(self, key: jax.Array, image_shape: tuple[int, ...], batch_size: int) -> jax.Array:
        """Returns random allowed perturbations, float ``[batch_size, H, W, 3]``."""
        keys = jax.random.split(key, batch_size)
        return jax.vmap(lambda k: random_delta(k, image_shape, self.threat))(keys)

    def apply(
        self, deltas: jax.Array, key: jax.Array, images: jax.Array, indices: jax.Array
    ) -> jax.Array:
        """Returns the attacked images ``[n, H, W, 3]``; see `Adversary.apply`."""
        return _all_attacked(deltas[indices], key, images, indices, self.threat)

    def update(
        self, deltas: jax.Array, gradient: jax.Array, key: jax.Array, step: jax.Array
    ) -> jax.Array:
        """Returns the perturbations; those of images that were not in the batch stay."""
        del key, step
        # Their gradient is zero, and so is the steepest step.
        return _uphill(deltas, gradient, self.threat, _step_size(self, 1 / 2))


def _all_attacked(
    deltas: jax.Array, key: jax.Array, images: jax.Array, indices: jax.Array, threat: Any
) -> jax.Array:
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)
    return jax.vmap(lambda d, x, k: _attacked(d, x, threat, k))(deltas, images, keys)


def _attacked(delta: jax.Array, image: jax.Array, threat: Any, key: jax.Array) -> jax.Array:
    """The attacked image, with the gradient that fitting needs (see `attacked_images`)."""
    if hasattr(threat, "apply"):
        return apply_delta(delta, image, threat, key)
    return attacked_images(delta, image[None], threat)[0]


def _uphill(deltas: jax.Array, gradient: jax.Array, threat: Any, step_size: Any) -> jax.Array:
    # One by one: each perturbation has the whole budget for itself.
    directions = jax.vmap(threat.steepest)(gradient)
    return jax.vmap(lambda delta: within_budget(delta, threat))(deltas + step_size * directions)


def _step_size(adversary: Any, share: float) -> Any:
    if adversary.step_size is not None:
        return adversary.step_size
    return share * adversary.threat.epsilon if hasattr(adversary.threat, "epsilon") else 0.1

"""Universal attacks on the layers of an encoder: L4A, SSP, FFF, STD; and UAP-PGD.

All but FFF are `UniversalPGD` with an objective, a step size and a name of their own.  A layer is
the name of a tap or the place of a block, as in `robust_ssl.objectives.layers`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from robust_ssl import objectives, struct
from robust_ssl.attacks.perturbation import GRAY, random_delta, share_at_budget
from robust_ssl.attacks.universal import UniversalPGD, UniversalPGDState, usual_length
from robust_ssl.objectives import layers
from robust_ssl.types import Objective


class _Ascent:
    """What the attacks share that are `UniversalPGD` on an `objective` of their own."""

    momentum = 0.0

    def init(self, key, image_shape, threat) -> UniversalPGDState:
        """Starts at a random allowed perturbation: zero is stationary for distances."""
        return self._pgd(self.step_size).init(key, image_shape, threat)

    def step(self, state, threat, batch):
        """Moves the perturbation once; returns the new state and the objective before it."""
        length = self.step_size
        if length is None:
            length = usual_length(threat, 2e-4)  # PAP's released settings
        return self._pgd(length).step(state, threat, batch)

    def delta(self, state, threat) -> jax.Array:
        """Returns the perturbation, ``[H, W, 3]``."""
        return self._pgd(self.step_size).delta(state, threat)

    def _pgd(self, step_size) -> UniversalPGD:
        return UniversalPGD(step_size, momentum=self.momentum, objective=self.objective)


@struct.dataclass
class L4ABase(_Ascent):
    """Low-level layer lifting: sign ascent on the energy of a shallow block.

    Published with a budget of 0.05 and batches of 16.  Its short step needs some thousands of
    them; with a hundred, a `step_size` of 2e-3 is meant.

    Attributes:
      step_size: Length of a step, pixel units; None is `usual_length` of 2e-4.
      layer: What is lifted.

    Example:
      >>> from robust_ssl import threats
      >>> state = L4ABase().init(jax.random.key(0), (8, 8, 3), threats.Linf(0.05))
      >>> bool(jnp.abs(L4ABase().delta(state, threats.Linf(0.05))).max() <= 0.05)
      True

    References:
      Ban and Dong, "Pre-trained Adversarial Perturbations", NeurIPS 2022 (low-level layer
      lifting attack, L4A-base).
    """

    step_size: jax.Array | float | None = None
    layer: int | str = struct.field(pytree_node=False, default=0)
    name: str = struct.field(pytree_node=False, default="l4a_base")

    measure = staticmethod(layers.activation_energy)

    @property
    def objective(self) -> Objective:
        """What is maximized."""
        return functools.partial(self.measure, layer=self.layer)


@struct.dataclass
class L4AFuse(_Ascent):
    """L4A that lifts the next block as well: `L4ABase` with a second layer (L4A-fuse).

    Attributes:
      step_size: Length of a step, pixel units; None is `usual_length` of 2e-4.
      layer: The first of the two blocks.
      weight: Of the second one.

    Example:
      >>> L4AFuse().objective.keywords
      {'layer': 0, 'weight': 1.0}
    """

    step_size: jax.Array | float | None = None
    layer: int | str = struct.field(pytree_node=False, default=0)
    weight: float = struct.field(pytree_node=False, default=1.0)  # PAP
    name: str = struct.field(pytree_node=False, default="l4a_fuse")

    def __post_init__(self):
        """Checks the weight."""
        if not math.isfinite(self.weight):
            raise ValueError(f"weight must be a finite number, got {self.weight}")

    @property
    def objective(self) -> Objective:
        """What is maximized."""
        return functools.partial(layers.fused_energy, layer=self.layer, weight=self.weight)


@struct.dataclass
class L4AUGSState:
    """State of `L4AUGS`."""

    ascent: UniversalPGDState
    key: jax.Array  # the member's
    count: jax.Array  # steps so far, int32 scalar


@struct.dataclass
class L4AUGS(L4AFuse):
    """L4A on Gaussian images, so that the perturbation does not lean on the surrogate images.

    `L4AFuse`, but each image of the batch is replaced by noise around a brightness of its own; only
    the number and size of the images matter (uniform Gaussian sampling, L4A-ugs).

    Attributes:
      means: Smallest and largest mean of an image, pixel units.
      stds: Smallest and largest standard deviation of an image, pixel units.

    Example:
      >>> images = L4AUGS().gaussian_images(jax.random.key(0), jnp.arange(2), (8, 8, 3))
      >>> images.shape, bool(0.3 < images.mean() < 0.7)
      ((2, 8, 8, 3), True)
    """

    weight: float = struct.field(pytree_node=False, default=0.01)  # PAP
    means: tuple[float, float] = struct.field(pytree_node=False, default=(0.4, 0.6))
    stds: tuple[float, float] = struct.field(pytree_node=False, default=(0.05, 0.10))
    name: str = struct.field(pytree_node=False, default="l4a_ugs")

    def init(self, key, image_shape, threat) -> L4AUGSState:
        """Starts at a random allowed perturbation and keeps a key for the images."""
        start_key, images_key = jax.random.split(key)
        start = super().init(start_key, image_shape, threat)
        return L4AUGSState(start, images_key, jnp.zeros((), jnp.int32))

    def step(self, state, threat, batch):
        """Moves the perturbation once; returns the new state and the objective before it."""
        key = jax.random.fold_in(state.key, state.count)
        draw = functools.partial(self.gaussian_images, key, image_shape=batch.image_shape)
        ascent, value = super().step(state.ascent, threat, batch.with_images(draw))
        return state.replace(ascent=ascent, count=state.count + 1), value

    def delta(self, state, threat) -> jax.Array:
        """Returns the perturbation, ``[H, W, 3]``."""
        return super().delta(state.ascent, threat)

    def gaussian_images(self, key, indices, image_shape) -> jax.Array:
        """Draws an image for each *global* index, ``[len(indices), H, W, 3]``, cut to [0, 1]."""

        def draw(index):
            mean_key, std_key, noise_key = jax.random.split(jax.random.fold_in(key, index), 3)
            mean = jax.random.uniform(mean_key, (), minval=self.means[0], maxval=self.means[1])
            std = jax.random.uniform(std_key, (), minval=self.stds[0], maxval=self.stds[1])
            return jnp.clip(mean + std * jax.random.normal(noise_key, image_shape), 0.0, 1.0)

        return jax.vmap(draw)(indices)


@struct.dataclass
class SSP(L4ABase):
    """Self-supervised perturbation: drives a middle layer away from its clean activation.

    Published for single images; here one perturbation raises the mean over the batch, with the step
    of L4A, since the universal form has no published one.  `layer` is by default the end of a
    ResNet-18's second stage; a ViT of 12 blocks takes 4.

    Example:
      >>> SSP(layer="stage2/block2").objective.keywords
      {'layer': 'stage2/block2'}

    References:
      Naseer et al., "A Self-supervised Approach for Adversarial Robustness", CVPR 2020
      (self-supervised perturbation).
    """

    layer: int | str = struct.field(pytree_node=False, default=3)
    name: str = struct.field(pytree_node=False, default="ssp")

    measure = staticmethod(layers.activation_distance)


@struct.dataclass
class STD(L4ABase):
    """Dispersion reduction: flattens a middle layer, in the mean over the batch.

    Published for single images; step and layer are those of `SSP`.

    References:
      Lu et al., "Enhancing Cross-Task Black-Box Transferability of Adversarial Examples with
      Dispersion Reduction", CVPR 2020, Algorithm 1.
    """

    layer: int | str = struct.field(pytree_node=False, default=3)
    name: str = struct.field(pytree_node=False, default="std")

    measure = staticmethod(layers.negative_dispersion)


@struct.dataclass
class FFFState:
    """State of `FFF`."""

    current: jax.Array  # the perturbation, [H, W, 3]
    opt_state: Any  # of Adam
    saturation: jax.Array  # share of the entries at the budget after the last step, before halving
    best: jax.Array  # the perturbation of the highest objective so far, [H, W, 3]
    best_value: jax.Array  # its objective


_ADAM = optax.scale_by_adam()


@struct.dataclass
class FFF:
    """Fast Feature Fool: makes all blocks fire on a gray image, without any data.

    The images of a step are not looked at: the perturbation stands on a gray image, and so a step
    costs one image's gradient whatever the batch.  When most entries sit at the budget and stay
    there, the perturbation is halved to make room, as published; that is a matter of budgets that
    bound each entry, and does not happen under `threats.L2` or in a patch.  The paper picks the
    result by its fooling rate on other data; here it is the point with the highest objective.

    Attributes:
      learning_rate: Of Adam, pixel units.
      full: Share of entries at the budget from which the perturbation may be halved.
      layers: What is summed; None is every block.

    Example:
      >>> FFF().gradients_per_batch(16)
      1

    References:
      Mopuri et al., "Fast Feature Fool", BMVC 2017 (the attack); Mopuri et al.,
      "Generalizable Data-free Objective for Crafting Universal Adversarial Perturbations", TPAMI
      2018 (norms for means, and the halving).
    """

    learning_rate: jax.Array | float = 0.1 / 255  # 0.1 on pixels in [0, 255]
    full: jax.Array | float = 0.5
    layers: tuple[int | str, ...] | None = struct.field(pytree_node=False, default=None)
    name: str = struct.field(pytree_node=False, default="fff")

    @property
    def objective(self) -> Objective:
        """What is maximized."""
        return functools.partial(layers.log_activation_norms, layers=self.layers)

    def gradients_per_batch(self, images: int) -> int:
        """Returns the input gradients of one step of the fit: it looks at no image."""
        return 1

    def init(self, key, image_shape, threat) -> FFFState:
        """Starts at a random allowed perturbation."""
        start = random_delta(key, image_shape, threat)
        nothing = jnp.zeros((), jnp.float32)
        return FFFState(start, _ADAM.init(start), nothing, start, jnp.full((), -jnp.inf))

    def step(self, state, threat, batch):
        """Moves the perturbation once; returns the new state and the objective before it."""
        gray = batch.only(jnp.full((1, *batch.image_shape), GRAY))
        value, gradient = gray.value_and_grad(self.objective, state.current)
        direction, opt_state = _ADAM.update(gradient, state.opt_state)
        moved = state.current + self.learning_rate * direction
        allowed = batch.project(moved)
        saturation = share_at_budget(allowed, threat)
        # 1e-5 is the published limit for "stays there".
        stuck = (saturation > self.full) & (jnp.abs(saturation - state.saturation) < 1e-5)
        better = value > state.best_value
        return FFFState(
            current=jnp.where(stuck, 0.5 * allowed, allowed),
            opt_state=opt_state,
            saturation=saturation,
            best=jnp.where(better, state.current, state.best),
            best_value=jnp.where(better, value, state.best_value),
        ), value

    def delta(self, state, threat) -> jax.Array:
        """Returns the best perturbation seen, ``[H, W, 3]``."""
        return state.best


@struct.dataclass
class UAPPGD(_Ascent):
    """UAP-PGD: on every batch, momentum steps of one length and then shorter ones.

    A batch costs ``2 * num_steps`` gradients.  Features have no loss to raise, so their distance
    from the clean ones takes its place.

    Attributes:
      step_size: Length of the first steps, pixel units.
      fine_step_size: Length of the others, pixel units.
      momentum: Share of the last direction that is kept, in [0, 1).
      num_steps: Steps of each length on one batch, at least 1.
      objective: What is maximized.

    Raises:
      ValueError: If `num_steps` is below 1.

    Example:
      >>> UAPPGD(num_steps=5).gradients_per_batch(16)
      160

    References:
      Deng and Karam, "Universal Adversarial Attack via Enhanced Projected Gradient Descent",
      ICIP 2020 (momentum PGD on the mean over the batch).
    """

    step_size: jax.Array | float = 2e-3
    fine_step_size: jax.Array | float = 2e-4
    momentum: jax.Array | float = 0.9
    num_steps: int = struct.field(pytree_node=False, default=10)
    objective: Objective = struct.field(pytree_node=False, default=objectives.feature_l2)
    name: str = struct.field(pytree_node=False, default="uap_pgd")

    def __post_init__(self):
        """Checks the static fields."""
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")

    def gradients_per_batch(self, images: int) -> int:
        """Returns the input gradients of one step of the fit."""
        return 2 * self.num_steps * images

    def step(self, state, threat, batch):
        """Makes all steps on one batch; returns the new state and the objective before them."""
        lengths = jnp.stack([jnp.asarray(self.step_size), jnp.asarray(self.fine_step_size)])

        def move(state, length):
            return self._pgd(length).step(state, threat, batch)

        state, values = lax.scan(move, state, jnp.repeat(lengths, self.num_steps))
        return state, values[0]

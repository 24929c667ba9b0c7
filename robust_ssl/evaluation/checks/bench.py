"""What the checks are measured on: compiled passes over a sample of images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl.attacks.per_image import attack_batch
from robust_ssl.evaluation.checks.path import OBJECTIVES, is_wrong, logits_of, objective_value
from robust_ssl.evaluation.metrics import compiled, excess, on_some, predictions, quantize
from robust_ssl.parallel import Parallel

DIRECTIONS = 8  # per image, for finite differences
_MARGIN = OBJECTIVES.index("margin")


@dataclasses.dataclass(frozen=True)
class Bench:
    """Images, and how functions of them are run: spread over devices, in batches of one size.

    Attributes:
      images: Pixels, float32 ``[n, H, W, 3]``.
      labels: int32 ``[n]``.
      parallel: Over which devices.
      batch_size: At most so many images at once.
    """

    images: np.ndarray
    labels: np.ndarray
    parallel: Parallel
    batch_size: int

    def run(self, function: Callable, constants: Any, **more: np.ndarray) -> Any:
        """Returns ``function(constants, batch)`` over all images, NumPy ``[n, ...]`` leaves.

        Args:
          function: Of this module, or any at the top of a module: it is compiled once.
          constants: What is the same for all images; its first entry may be a key.
          **more: Further arrays ``[n, ...]`` per image; ``images``, ``labels`` and ``indices``
            replace what there is.
        """
        rows = np.arange(len(self.images), dtype=np.int32)
        batch = {"images": self.images, "labels": self.labels, "indices": rows, **more}
        size = min(self.batch_size, len(rows))
        function, constants = compiled(self.parallel, function), self.parallel.replicate(constants)
        parts = [part for _, part in on_some(function, constants, batch, rows, size)]
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def forward(constants, batch):
    """Returns the logits of the images."""
    (model,) = constants
    return model(batch["images"]).logits


def strike(constants, batch):
    """Returns the images of an attack."""
    key, model, attack = constants
    return attack_batch(attack, key, model, batch["images"], batch["labels"], batch["indices"])


def climb(constants, batch):
    """Returns the recorded paths of a `Climb`, from random starts or from ``start``."""
    key, model, attack, goes_on = constants

    def one(index, image, label, start):
        # Keyed by the image's place, so that an image's path depends on no other image.
        random = attack.threat.sample(jax.random.fold_in(key, index), image)
        path = attack(model, jnp.where(goes_on, start, random), image, label)
        return {"best": path.best, "hit": path.hit, "losses": path.losses}

    return jax.vmap(one)(batch["indices"], batch["images"], batch["labels"], batch["start"])


def scored(constants, batch):
    """Returns what is right on ``adversarial``, exact and rounded, and how far it is outside."""
    model, threat = constants
    adversarial = batch["adversarial"]
    # One pass for both, which is compiled once.
    both = jnp.concatenate([adversarial, quantize(adversarial)])
    exact, rounded = jnp.split(predictions(model, both), 2)
    return {
        "exact": exact == batch["labels"],
        "rounded": rounded == batch["labels"],
        "excess": excess(threat, adversarial, batch["images"]),
    }


def probe(constants, batch):
    """Returns, image by image, what gradients, one step, noise and finite differences say."""
    key, model, threat = constants

    def one(index, image, label):
        keys = jax.random.split(jax.random.fold_in(key, index), 3)
        # A quarter of the budget: what an attack's steps are long, and far above float32's noise.
        length = threat.epsilon / 4
        normal = jax.random.normal(keys[2], (DIRECTIONS, *image.shape))
        directions = jax.vmap(threat.steepest)(normal)
        # Off the edges of [0, 1], where a model that cuts its input has no two-sided slope: by what
        # a pixel is moved below, which in an L2 ball is far less than the length.
        edge = jnp.minimum(length * jnp.max(jnp.abs(directions)), 0.5)
        point = jnp.clip(threat.sample(keys[1], image), edge, 1 - edge)
        # The network is passed twice, once with a gradient and once without: each pass that a
        # program holds is compiled by itself.
        (slope, margin_slope), logits = _slopes(model, [image, point], label)
        # Of the whole budget, as the attack's: noise inside the ball would be easier to beat.
        noise = threat.steepest(jax.random.normal(keys[0], image.shape))
        changes = [threat.steepest(slope), noise]
        moved = [quantize(threat.project(image + threat.epsilon * c, image)) for c in changes]
        ends = [point[None] + sign * length * directions for sign in (1, -1)]
        seen = jax.vmap(lambda x: logits_of(model, x))(jnp.concatenate([jnp.stack(moved), *ends]))
        values = jax.vmap(lambda x: objective_value(x, label, _MARGIN))(seen[len(moved) :])
        return {
            "clean": ~is_wrong(logits, label),
            "vanished": _vanished(slope),
            "margin_vanished": _vanished(margin_slope),
            "one_step": ~is_wrong(seen[0], label),
            "noise": ~is_wrong(seen[1], label),
            "predicted": jnp.sum(directions * margin_slope[None], axis=(1, 2, 3)),
            "measured": (values[:DIRECTIONS] - values[DIRECTIONS:]) / (2 * length),
        }

    return jax.vmap(one)(batch["indices"], batch["images"], batch["labels"])


def _slopes(model, points: list[jax.Array], label: jax.Array):
    """Returns the gradients of cross-entropy and margin at a point each; the first's logits."""
    logits, pull = jax.vjp(jax.vmap(lambda x: logits_of(model, x)), jnp.stack(points))
    by_logits = [
        jax.grad(objective_value)(each, label, OBJECTIVES.index(name))
        for each, name in zip(logits, ("cross_entropy", "margin"), strict=True)
    ]
    (slopes,) = pull(jnp.stack(by_logits))
    return slopes, logits[0]


def _vanished(gradient: jax.Array) -> jax.Array:
    # Exactly zero: a small gradient still has signs, which is all that an Linf step needs.
    return ~jnp.any(gradient != 0) | ~jnp.isfinite(gradient).all()

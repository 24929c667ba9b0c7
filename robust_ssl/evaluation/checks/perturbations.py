"""Checks 21 to 27 on a perturbation and a classifier, in a few passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import threats
from robust_ssl.attacks.perturbation import UniversalPerturbation, random_delta
from robust_ssl.evaluation.checks import bench, universal
from robust_ssl.evaluation.checks.bench import Bench
from robust_ssl.evaluation.checks.path import Climb
from robust_ssl.evaluation.checks.result import Verdict, not_run
from robust_ssl.evaluation.metrics import to_pixels
from robust_ssl.parallel import Parallel
from robust_ssl.types import Classifier

NUM_STEPS = 20
NOISES = 3  # the strongest of so many is the baseline


def shuffled(key: jax.Array, delta: jax.Array) -> jax.Array:
    """Returns the perturbation with its pixels in another order, each with its colors.

    Only pixels that are not zero change places, so a patch stays in its place.

    Args:
      key: Random key.
      delta: Float ``[H, W, 3]``.

    Example:
      >>> delta = jnp.zeros((2, 2, 3)).at[0].set(0.5)
      >>> bool((shuffled(jax.random.key(0), delta) == delta).all())
      True
    """
    pixels = delta.reshape(-1, delta.shape[-1])
    places = np.flatnonzero(np.any(np.asarray(pixels) != 0, axis=-1))
    order = jax.random.permutation(key, places)
    return pixels.at[places].set(pixels[order]).reshape(delta.shape)


def examine_universal(
    classifier: Classifier,
    perturbation: UniversalPerturbation,
    images: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    *,
    key: jax.Array,
    reported: np.ndarray | None = None,
    fitted_images: np.ndarray | None = None,
    other_seeds: Sequence[UniversalPerturbation] = (),
    hardened: bool = False,
    crafted_again: UniversalPerturbation | None = None,
    elsewhere: UniversalPerturbation | None = None,
    variables_before: Any = None,
    num_steps: int = NUM_STEPS,
    parallel: Parallel | None = None,
    batch_size: int = 128,
) -> Verdict:
    """Says whether the figure of a universal perturbation can be believed: checks 21 to 27.

    Costs `num_steps` gradients per image and a few forward passes per perturbation.

    Args:
      classifier: What the perturbation is used on.
      perturbation: One member of a fit, ``delta [H, W, 3]``.
      images: A sample of the evaluated images, uint8 or float in [0, 1], ``[n, H, W, 3]``.
      labels: Integer ``[n]``.
      key: Random key.
      reported: Correct under all perturbations that the figure counts, bool ``[n]``; None counts
        `perturbation` alone.
      fitted_images: Some of the images it was fitted on, for check 23; no labels needed.
      other_seeds: The same attack with two more seeds, for check 24.
      hardened: Whether the classifier's encoder was trained after `perturbation` was crafted on
        it: then check 25 asks for `crafted_again`.
      crafted_again: Fitted against the encoder as it is now.
      elsewhere: The patch at random places where `perturbation`'s is fixed, or the other way
        round; a patch without it fails check 26.
      variables_before: The classifier's variables before attacking and scoring, for check 27.
      num_steps: Of the per-image attack of check 21.
      parallel: Over which devices; None is the first one.
      batch_size: At most so many images at once.

    Returns:
      The verdict; what was not given is listed as not run.

    Raises:
      ValueError: If there is no image, or the images have another size than the perturbation.
    """
    images, labels = np.asarray(to_pixels(images), np.float32), np.asarray(labels, np.int32)
    _check_sizes(perturbation, images, labels)
    sample = Bench(images, labels, parallel or Parallel.create(num_devices=1), batch_size)
    keys = jax.random.split(key, 4)

    def under(other: UniversalPerturbation | None, of: Bench = sample):
        if other is None:
            return None
        # The name is static: with one for all they compile once.
        return of.run(bench.universal, (keys[0], classifier, other.replace(name="examined")))

    own = under(perturbation)
    reported = own["correct"] if reported is None else np.asarray(reported, bool)
    found = (
        _per_image(sample, classifier, perturbation.threat, keys[1], num_steps, own["correct"]),
        _baselines(perturbation, under, keys[2:], own["correct"]),
    )
    if fitted_images is None:
        found += not_run([23], "no images that it was fitted on were given")
    else:
        seen = np.asarray(to_pixels(fitted_images), np.float32)
        seen = Bench(seen, np.zeros(len(seen), np.int32), sample.parallel, batch_size)
        flipped = under(perturbation, seen)["flipped"]
        found += (universal.holds_on_new_images(flipped, own["flipped"]),)
    if len(other_seeds) < 2:
        found += not_run([24], f"it takes three seeds, {1 + len(other_seeds)} given")
    else:
        others = [under(other)["correct"] for other in other_seeds]
        found += (universal.seeds_agree([own["correct"], *others]),)
    found += _once_more(perturbation, under, reported, hardened, crafted_again, elsewhere)
    if variables_before is None:
        found += not_run([27], "the variables before the evaluation were not given")
    else:
        found += (universal.statistics_unchanged(variables_before, classifier.variables),)
    perturbations = 2 + NOISES + len(other_seeds)
    return Verdict(found, len(images), num_steps + (2 * perturbations + 1) / 3)


def _check_sizes(perturbation: UniversalPerturbation, images, labels) -> None:
    if images.ndim != 4 or not len(images) or labels.shape != images.shape[:1]:
        raise ValueError(
            "examine_universal takes images [n, H, W, 3] and labels [n], n at least 1, got "
            f"{images.shape} and {labels.shape}"
        )
    if perturbation.delta.shape != images.shape[1:]:
        raise ValueError(
            f"the perturbation {perturbation.name!r} has size {perturbation.delta.shape}, the "
            f"images have {images.shape[1:]}; resize it with .resized({images.shape[1:3]})"
        )


def _per_image(sample: Bench, classifier, threat, key, num_steps: int, correct: np.ndarray):
    """Runs check 21: the attack starts at random, as weak as a per-image attack may be."""
    climb = Climb(threat, jnp.asarray(0, jnp.int32), num_steps)
    constants = (key, classifier, climb, jnp.asarray(False))
    path = sample.run(bench.climb, constants, start=sample.images)
    scored = sample.run(bench.scored, (classifier, threat), adversarial=path["best"])
    return universal.per_image_not_weaker(correct, scored["rounded"])


def _baselines(perturbation: UniversalPerturbation, under, keys, correct: np.ndarray):
    """Runs check 22."""
    shape, threat = perturbation.delta.shape, perturbation.threat
    noises = [
        under(perturbation.replace(delta=random_delta(k, shape, threat)))["correct"]
        for k in jax.random.split(keys[0], NOISES)
    ]
    moved = perturbation.replace(delta=shuffled(keys[1], perturbation.delta))
    strongest = min(noises, key=np.mean)
    baselines = {"random noise": strongest, "its own pixels shuffled": under(moved)["correct"]}
    return universal.beats_noise_and_shuffle(correct, baselines)


def _once_more(perturbation, under, reported: np.ndarray, hardened: bool, again, elsewhere):
    """Runs checks 25 and 26."""
    if hardened or again is not None:
        redone = under(again)
        found = (universal.crafted_again(reported, redone and redone["correct"]),)
    else:
        found = not_run([25], "the encoder is the one that it was crafted on")
    if not isinstance(perturbation.threat, threats.Patch):
        return found + not_run([26], "it is no patch")
    moved = under(elsewhere)
    return (*found, universal.patch_places(reported, moved and moved["correct"]))

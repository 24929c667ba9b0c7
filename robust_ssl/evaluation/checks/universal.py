"""Does one perturbation for all images do what is said of it?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl.evaluation.checks.comparisons import of_difference, of_gain, perhaps
from robust_ssl.evaluation.checks.result import Check, at_most, status_of_difference
from robust_ssl.evaluation.counts import difference


def shuffled(key: jax.Array, delta: jax.Array) -> jax.Array:
    """Returns a perturbation ``[H, W, 3]`` with its pixels in another order, each with its colors.

    Only pixels that are not zero change places, so a patch stays in its place.

    Example:
      >>> delta = jnp.zeros((2, 2, 3)).at[0].set(0.5)
      >>> bool((shuffled(jax.random.key(0), delta) == delta).all())
      True
    """
    # On the host, since how many pixels are not zero decides the shape of what is permuted.
    pixels = np.array(delta).reshape(-1, delta.shape[-1])
    places = np.flatnonzero(np.any(pixels != 0, axis=-1))
    pixels[places] = pixels[np.asarray(jax.random.permutation(key, places))]
    return jnp.asarray(pixels.reshape(delta.shape))


def per_image_not_weaker(universal: np.ndarray, per_image: np.ndarray, limit: float = 0.0) -> Check:
    """Measures by how much one perturbation for all beats one for each image of the same budget.

    The limit is 0: what is allowed to all is allowed to each.

    Example:
      >>> per_image_not_weaker(np.zeros(9, bool), np.ones(9, bool)).status
      'failed'
    """
    return of_difference(
        "per_image_not_weaker",
        difference(per_image, universal),
        limit,
        meaning="The per-image attack, which may do all that the universal one does, does less.",
        advice="Tune the per-image attack. If that does not help, see the checks of the gradient.",
    )


def beats_noise_and_shuffle(
    correct: np.ndarray,
    baselines: Mapping[str, np.ndarray],
    limit: float = 0.02,
    *,
    fitted_here: bool = True,
) -> Check:
    """Measures by how much the perturbation beats the strongest of its baselines.

    Args:
      correct: Correct under the perturbation, bool ``[n]``.
      baselines: Correct under random universal noise of its size and under its own pixels
        shuffled, by name.
      limit: The gain must be larger.
      fitted_here: Whether it was fitted on this model's encoder.  On another one it may do
        nothing, for that is what a defence is for: a note at worst.

    Example:
      >>> right = np.ones(9, bool)
      >>> beats_noise_and_shuffle(right, {"noise": right}).status
      'failed'
      >>> beats_noise_and_shuffle(right, {"noise": right}, fitted_here=False).status
      'note'
    """
    # The strongest baseline counts: shuffled pixels have the sizes and colors of the perturbation
    # and lack only its shape, which is what a fit has to earn.
    name = min(baselines, key=lambda baseline: np.mean(baselines[baseline]))
    withstands = f"On this model the perturbation does hardly more than {name} of its size."
    here = "Fit it longer or with another objective. Do not call what it leaves robustness."
    elsewhere = "See that it breaks ordinary fine-tuning. Else it is weak and proves nothing."
    return of_gain(
        "beats_noise_and_shuffle",
        difference(baselines[name], correct),
        limit,
        meaning=f"The perturbation does hardly more than {name} of its size: it has learned "
        "nothing.",
        advice=here if fitted_here else elsewhere,
        withstands=None if fitted_here else withstands,
    )


def holds_on_new_images(fitted: np.ndarray, new: np.ndarray, limit: float = 0.1) -> Check:
    """Measures by how much more predictions change on the images it was fitted on.

    The fooling rate needs no label, and images that an attacker fits on have none.

    Both are bool, one for each image: whether its prediction changed.

    Example:
      >>> holds_on_new_images(np.ones(9, bool), np.zeros(9, bool)).value
      1.0
    """
    gap = float(np.mean(fitted) - np.mean(new))
    # Two samples, so the errors of both shares add up.
    half = 1.96 * float(np.sqrt(np.var(fitted) / len(fitted) + np.var(new) / len(new)))
    status = status_of_difference(gap - limit, half, 0.0)
    meaning = "On new images, which count, it is much weaker than on those it was fitted on."
    meaning = perhaps(meaning) if status == "note" else meaning
    advice = "Fit it on more images. A defence looks good against this one by that alone."
    return Check("holds_on_new_images", status, gap, limit, meaning, advice)


def seeds_agree(correct: Sequence[np.ndarray], limit: float = 0.03) -> Check:
    """Measures the spread of the accuracy over three or more seeds of the fit.

    Example:
      >>> seeds_agree([np.ones(9, bool), np.ones(9, bool), np.zeros(9, bool)]).value
      1.0
    """
    weakest, strongest = max(correct, key=np.mean), min(correct, key=np.mean)
    return of_difference(
        "seeds_agree",
        difference(weakest, strongest),
        limit,
        meaning="The figure depends on the seed of the attack.",
        advice="Report the worst case over the seeds and the spread, or fit longer.",
    )


def crafted_again_agrees(
    reported: np.ndarray, again: np.ndarray | None, limit: float = 0.002
) -> Check:
    """Measures by how much a perturbation crafted on the hardened encoder does more.

    Args:
      reported: Correct under the perturbations crafted on the public encoder, bool ``[n]``.
      again: Correct under perturbations crafted through the whole pipeline against the encoder
        as it is after hardening, bool ``[n]``; None where nobody has crafted one, which fails.
      limit: Largest difference; more is a note: the second figure is the one to go by.  So is a
        second figure that is higher by more than chance: an attacker who sees the defence can do
        what others can, so this one has not tried hard enough.

    Example:
      >>> crafted_again_agrees(np.ones(9, bool), None).status
      'failed'
    """
    # Replaying what was made before hardening says nothing of an attacker who knows the defence.
    value, status = None, "failed"
    meaning = (
        "Only perturbations made before hardening were replayed: their attacker did not see the "
        "defence."
    )
    if again is not None:
        value, half = difference(reported, again)
        status = "passed" if -max(limit, half) <= value <= limit else "note"
        does = "more" if value > 0 else "less"
        meaning = f"Perturbations crafted again on the hardened encoder do {does} than the public."
    advice = "Craft against the hardened encoder, long enough, and go by the worst case over both."
    return Check("crafted_again_agrees", status, value, limit, meaning, advice)


def patch_places_agree(
    reported: np.ndarray, elsewhere: np.ndarray | None, limit: float = 0.02
) -> Check:
    """Measures by how much a patch at the other kind of place does more.

    Args:
      reported: Correct under the patch of the figure, bool ``[n]``.
      elsewhere: Correct under a patch at random places where the figure's is fixed, or the other
        way round, bool ``[n]``; None where nobody has tried, which fails.
      limit: Largest difference; more is a note.

    Example:
      >>> patch_places_agree(np.ones(9, bool), np.ones(9, bool)).status
      'passed'
    """
    advice = "Score it at the fixed and at random places, and report the worst case."
    if elsewhere is None:
        meaning = "The patch was tried at one kind of place only."
        return Check("patch_places_agree", "failed", None, limit, meaning, advice)
    value, _ = difference(reported, elsewhere)
    meaning = "The patch does more at the other kind of place."
    return at_most("patch_places_agree", value, limit, math.inf, meaning=meaning, advice=advice)


def model_unchanged(before: Any, after: Any, limit: float = 0.0) -> Check:
    """Measures the largest change of a model's variables by attacking and scoring it.

    Both are trees of arrays, for example ``batch_stats``; of another shape, they have changed
    without bound.

    Example:
      >>> model_unchanged({"mean": np.zeros(3)}, {"mean": np.full(3, 0.5)}).value
      0.5
    """
    # With jax.tree.map alone, trees of another shape would raise where they should fail.
    shapes = [jax.tree.map(np.shape, tree) for tree in (before, after)]
    if shapes[0] != shapes[1]:
        value = float("inf")
    else:
        pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
        changes = [np.max(np.abs(np.asarray(x) - np.asarray(y)), initial=0.0) for x, y in pairs]
        value = float(max(changes, default=0.0))
    return at_most(
        "model_unchanged",
        value,
        limit,
        meaning="The model after the evaluation is not the one before: adversarial images moved "
        "it.",
        advice="Attack and score in evaluation mode.",
    )

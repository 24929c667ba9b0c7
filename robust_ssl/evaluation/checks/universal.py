"""Checks 21 to 27: does one perturbation for all images do what is said of it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from robust_ssl.evaluation.checks.result import (
    Check,
    status_at_most,
    status_of_difference,
    status_of_gain,
)
from robust_ssl.evaluation.counts import difference

_SOURCE = "limit of this package"


def per_image_not_weaker(universal: np.ndarray, per_image: np.ndarray, limit: float = 0.0) -> Check:
    """Check 21: by how much one perturbation for all beats one for each image.

    Args:
      universal: Correct under the universal perturbation, bool ``[n]``.
      per_image: Correct under a per-image attack of the same budget, bool ``[n]``.
      limit: Largest difference: what is allowed to all is allowed to each.

    Example:
      >>> per_image_not_weaker(np.zeros(9, bool), np.ones(9, bool)).status
      'failed'
    """
    value, half = difference(per_image, universal)
    return Check(
        21,
        value,
        limit,
        status_of_difference(value, half, limit),
        "The per-image attack, which may do all that the universal one does, does less.",
        "The per-image attack is badly tuned or sees a masked gradient: see its own verdict.",
        _SOURCE,
    )


def beats_noise_and_shuffle(
    correct: np.ndarray, baselines: Mapping[str, np.ndarray], limit: float = 0.02
) -> Check:
    """Check 22: by how much the perturbation beats the strongest of its baselines.

    Args:
      correct: Correct under the perturbation, bool ``[n]``.
      baselines: Correct under random universal noise of its size and under its own pixels
        shuffled, by name.
      limit: The gain must be larger.

    Example:
      >>> right = np.ones(9, bool)
      >>> beats_noise_and_shuffle(right, {"noise": right}).status
      'failed'
    """
    name = min(baselines, key=lambda baseline: np.mean(baselines[baseline]))
    gain, half = difference(baselines[name], correct)
    return Check(
        22,
        gain,
        limit,
        status_of_gain(gain, half, limit),
        f"The perturbation does hardly more than {name} of its size: it has learnt nothing.",
        "Fit it longer or with another objective; do not call what it leaves robustness.",
        _SOURCE,
    )


def holds_on_new_images(fitted: np.ndarray, new: np.ndarray, limit: float = 0.1) -> Check:
    """Check 23: by how much more predictions it changes on the images it was fitted on.

    The fooling rate needs no label, and images that an attacker fits on have none.

    Args:
      fitted: Whether a prediction changed on an image it was fitted on, bool ``[m]``.
      new: The same on images it has not seen, bool ``[n]``.
      limit: Largest gap.

    Example:
      >>> holds_on_new_images(np.ones(9, bool), np.zeros(9, bool)).value
      1.0
    """
    gap = float(np.mean(fitted) - np.mean(new))
    # Two samples, so the errors of both shares add up.
    half = 1.96 * float(np.sqrt(np.var(fitted) / len(fitted) + np.var(new) / len(new)))
    return Check(
        23,
        gap,
        limit,
        status_of_difference(gap - limit, half, 0.0),
        "It fits the images it was made from: on new ones, which count, it is much weaker.",
        "Fit it on more images; a defence looks good against this one by that alone.",
        _SOURCE,
    )


def seeds_agree(correct: Sequence[np.ndarray], limit: float = 0.03) -> Check:
    """Check 24: the spread of the accuracy over seeds of the fit.

    Args:
      correct: Correct under the perturbation of each seed, bool ``[n]`` each; three or more.
      limit: Largest spread.

    Example:
      >>> seeds_agree([np.ones(9, bool), np.ones(9, bool), np.zeros(9, bool)]).value
      1.0
    """
    weakest, strongest = max(correct, key=np.mean), min(correct, key=np.mean)
    value, half = difference(weakest, strongest)
    return Check(
        24,
        value,
        limit,
        status_of_difference(value, half, limit),
        "The figure depends on the seed of the attack.",
        "Report the worst case over the seeds and the spread, or fit longer.",
        _SOURCE,
    )


def crafted_again(reported: np.ndarray, again: np.ndarray | None, limit: float = 0.002) -> Check:
    """Check 25: by how much a perturbation crafted on the hardened encoder does more.

    Args:
      reported: Correct under the perturbations crafted on the public encoder, bool ``[n]``.
      again: Correct under perturbations crafted through the whole pipeline against the encoder
        as it is after hardening, bool ``[n]``; None where nobody has crafted one, which fails.
      limit: Largest difference; more is a note: the second figure is the one to go by.  So is a
        second figure that is higher by more than chance: who sees the defence can do what others
        can, so its maker has not tried hard enough.

    Example:
      >>> crafted_again(np.ones(9, bool), None).status
      'failed'
    """
    if again is None:
        value, status = None, "failed"
        meaning = (
            "Only perturbations made before hardening were replayed: their maker did not see the "
            "defence."
        )
    else:
        value, half = difference(reported, again)
        status = "passed" if -max(limit, half) <= value <= limit else "note"
        does = "more" if value > 0 else "less"
        meaning = f"Perturbations crafted again on the hardened encoder do {does} than the public."
    return Check(
        25,
        value,
        limit,
        status,
        meaning,
        "Craft against the hardened encoder, long enough, and go by the worst case over both.",
        "Tramer et al. 2020; limit of this package",
    )


def patch_places(reported: np.ndarray, elsewhere: np.ndarray | None, limit: float = 0.02) -> Check:
    """Check 26: by how much a patch at the other kind of place does more.

    Args:
      reported: Correct under the patch of the figure, bool ``[n]``.
      elsewhere: Correct under a patch at random places where the figure's is fixed, or the other
        way round, bool ``[n]``; None where nobody has tried, which fails.
      limit: Largest difference; more is a note.

    Example:
      >>> patch_places(np.ones(9, bool), np.ones(9, bool)).status
      'passed'
    """
    value, status = None, "failed"
    if elsewhere is not None:
        value, _ = difference(reported, elsewhere)
        status = "passed" if value <= limit else "note"
    return Check(
        26,
        value,
        limit,
        status,
        "The patch was tried at one kind of place only, or does more at the other.",
        "Score it at the fixed and at random places, and report the worst case.",
        _SOURCE,
    )


def statistics_unchanged(before: Any, after: Any, limit: float = 0.0) -> Check:
    """Check 27: the largest change of a model's variables by attacking and scoring it.

    Args:
      before: A tree of arrays, for example ``batch_stats`` before the evaluation.
      after: The same afterwards.
      limit: Largest change.

    Returns:
      The finding; trees of another shape have changed without bound.

    Example:
      >>> statistics_unchanged({"mean": np.zeros(3)}, {"mean": np.full(3, 0.5)}).value
      0.5
    """
    shapes = [jax.tree.map(np.shape, tree) for tree in (before, after)]
    if shapes[0] != shapes[1]:
        value = float("inf")
    else:
        pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
        changes = [np.max(np.abs(np.asarray(x) - np.asarray(y)), initial=0.0) for x, y in pairs]
        value = float(max(changes, default=0.0))
    return Check(
        27,
        value,
        limit,
        status_at_most(value, limit),
        "The model after the evaluation is not the one before: adversarial images moved it.",
        "Attack and score in evaluation mode.",
        "errors seen in released code",
    )

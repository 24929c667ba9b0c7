"""Checks 7 to 17: did the attack try hard enough?

All take NumPy arrays of the same images in the same order.  ``correct`` under an attack is bool
``[n]``.  Differences of accuracies over their limit are held against the disagreements between the
two (`counts.difference`): on few images what may be an accident is a note.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
from scipy import special

from robust_ssl.evaluation.checks.result import (
    Check,
    not_run,
    status_at_most,
    status_of_difference,
    status_of_gain,
)
from robust_ssl.evaluation.counts import difference

_PINTOR = "Pintor et al. 2022"
_CARLINI = "Carlini et al. 2019, Section 3"


def falling_steps(losses: np.ndarray, limit: float = 0.1, note: float = 0.3) -> Check:
    """Check 7: the share of steps after which the mean objective is lower than before.

    Args:
      losses: The objective along the path, float ``[n, num_steps + 1]``.
      limit: Largest share that passes; from the prototype.
      note: Largest that is a note.

    Example:
      >>> falling_steps(np.array([[0.0, 1.0, 0.5, 2.0]])).status
      'failed'
    """
    mean = np.mean(np.asarray(losses, np.float64), axis=0)
    share = float(np.mean(np.diff(mean) < -_tremble(mean)))  # a tremble is no step down
    if not np.isfinite(mean).all():
        share = math.nan
    return Check(
        7,
        share,
        limit,
        status_at_most(share, limit, note),
        "The attack's own objective keeps falling: steps are too long, or the gradient is wrong.",
        "Take smaller steps (APGD halves them by itself); if that does not help, see check 6.",
        _PINTOR,
    )


FEW = 0.05  # of the images: what is left to gain by a longer attack
ALPHA = 0.05  # how often a share at its limit may be called more than that


def converged(
    losses: np.ndarray,
    limit: float = 0.05,
    window: int = 10,
    still_right: np.ndarray | None = None,
) -> Check:
    """Check 8: the share of the whole rise that the last steps brought.

    Whether the share is over its limit by more than the images' differences is asked with a
    one-sided t-test of each image's late rise less `limit` times its whole rise: what may be chance
    is a note.

    Args:
      losses: The objective along the path, float ``[n, num_steps + 1]``.
      limit: Largest share, of the best mean so far minus the start; from the prototype.
      window: How many steps are the last ones; at most half of them.
      still_right: The images that the attack has not broken, bool ``[n]``; only their loss says
        whether more steps could lower the figure, and where they are at most `FEW` of all they
        could not lower it much: a note at worst.  None is all of them.

    Example:
      >>> converged(np.array([[0.0, 4.0, 5.0]]), window=1).value
      0.2
      >>> converged(np.array([[0.0, 4.0, 5.0]]), still_right=np.array([False])).status
      'not run'
    """
    losses = np.asarray(losses, np.float64)
    right = np.ones(len(losses), bool) if still_right is None else np.asarray(still_right, bool)
    left = losses[right]
    if not len(left):
        return not_run([8], "no image is left that more steps could break")[0]
    best = np.maximum.accumulate(left, axis=1)
    window = min(window, (best.shape[1] - 1) // 2)
    rise, late = best[:, -1] - best[:, 0], best[:, -1] - best[:, -1 - window]
    share = float(late.sum() / rise.sum()) if rise.mean() > _tremble(best) else 0.0
    if not np.isfinite(left).all():
        share = math.nan
    few = still_right is not None and right.mean() <= FEW
    unsure = not math.isnan(share) and (few or not _positive(late - limit * rise))
    status = status_at_most(share, limit)
    return Check(
        8,
        share,
        limit,
        "note" if status == "failed" and unsure else status,
        f"The loss was still rising at the end on what is left, {len(left)} images: more steps may "
        "break more (see check 10).",
        "Double num_steps until the figure stands still.",
        f"{_PINTOR}; limit of this package",
    )


def _positive(values: np.ndarray) -> bool:
    """Whether the mean is above zero by more than chance: one-sided t-test at `ALPHA`."""
    n = len(values)
    if n < 2:
        return False
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    if error <= 1e-12 * float(np.max(np.abs(values))):
        return float(np.mean(values)) > 0
    return float(special.stdtr(n - 1, -np.mean(values) / error)) <= ALPHA


def _tremble(values: np.ndarray) -> float:
    """What a plateau moves in float32 by its last digits."""
    return 1e-6 * max(float(np.max(np.abs(values))), 1e-12)


def silent_hits(hit: np.ndarray, correct: np.ndarray, limit: float = 0.01) -> Check:
    """Check 9: images misclassified on the way, whose returned point is classified correctly.

    Each is an image that the attack has broken and the figure counts as right.  Whether there are
    more of them than `limit` allows is asked with an exact binomial test: a few of few images are a
    note.

    Args:
      hit: Whether some point on the path was misclassified, bool ``[n]``.
      correct: Whether the point that the attack returns is classified correctly, bool ``[n]``.
      limit: Largest share.

    Example:
      >>> silent_hits(np.array([True, True, True]), np.array([True, True, False])).status
      'failed'
      >>> silent_hits(np.arange(65) < 1, np.ones(65, bool)).status
      'note'
    """
    missed = np.asarray(hit, bool) & np.asarray(correct, bool)
    count, n = int(missed.sum()), len(missed)
    if not n:
        return not_run([9], "there is no image to attack")[0]
    beyond = float(special.bdtrc(count - 1, n, limit)) <= ALPHA if count else False
    status = status_at_most(count / n, limit)
    return Check(
        9,
        count / n,
        limit,
        "note" if status == "failed" and not beyond else status,
        f"The attack found adversarial images and gave back others, for {count} of {n}.",
        "Return a misclassified point wherever one was seen, not the last or that of highest loss.",
        f"{_PINTOR}; limit of this package",
    )


def twice_the_steps(once: np.ndarray, twice: np.ndarray, limit: float = 0.02) -> Check:
    """Check 10: by how much the accuracy falls when the steps are doubled.

    Args:
      once: Correct under the attack as reported.
      twice: Correct under twice the steps.
      limit: Largest fall; from the prototype.

    Example:
      >>> twice_the_steps(np.ones(100, bool), np.arange(100) > 9).status
      'failed'
    """
    value, half = difference(once, twice)
    return Check(
        10,
        value,
        limit,
        status_of_difference(value, half, limit),
        "More steps break more images, so the figure is the attack's, not the model's.",
        "Report what more steps, or APGD with restarts, leave.",
        "Carlini et al. 2019 (verify convergence); Tramer et al. 2020",
    )


def iterative_not_weaker(iterative: np.ndarray, one_step: np.ndarray, limit: float = 0.0) -> Check:
    """Check 11: by how much the accuracy under one step is below that under many.

    Args:
      iterative: Correct under the reported attack.
      one_step: Correct under FGSM.
      limit: Largest difference.

    Example:
      >>> iterative_not_weaker(np.ones(9, bool), np.zeros(9, bool)).status
      'failed'
    """
    value, half = difference(iterative, one_step)
    return Check(
        11,
        value,
        limit,
        status_of_difference(value, half, limit),
        "One step does more than many, so the many are badly tuned or the gradient is masked.",
        "Tune the step size; if that does not help, see checks 4 to 6.",
        f"{_CARLINI}; Athalye et al. 2018",
    )


def objectives_agree(
    correct: Mapping[str, np.ndarray], first: str = "cross_entropy", limit: float = 0.02
) -> Check:
    """Check 12: by how much another objective beats the one that the figure comes from.

    One-sided: an objective weaker than the first does the figure no harm.

    Args:
      correct: Correct under the same attack, by objective.
      first: The objective that the others are held against.
      limit: Largest difference; from the prototype.

    Example:
      >>> right, wrong = np.ones(9, bool), np.zeros(9, bool)
      >>> objectives_agree({"cross_entropy": right, "margin": wrong}).value
      1.0
    """
    found = [difference(correct[first], other) for other in correct.values()]
    value, half = max(found)
    strongest = min(correct, key=lambda name: np.mean(correct[name]))
    return Check(
        12,
        value,
        limit,
        status_of_difference(value, half, limit),
        f"The objective {strongest} breaks more images than {first}: the loss is saturated.",
        f"Report the worst case over several objectives, {strongest} among them.",
        "Croce and Hein 2020, Section 4; limit of this package",
    )


def falls_with_epsilon(correct: Mapping[float, np.ndarray], limit: float = 0.01) -> Check:
    """Check 13: the largest rise of the accuracy from one budget to the next larger one.

    Args:
      correct: Correct under the same attack, by budget.
      limit: Largest rise; from the prototype.

    Example:
      >>> falls_with_epsilon({0.1: np.ones(9, bool), 0.2: np.zeros(9, bool)}).value
      -1.0
    """
    budgets = sorted(correct)
    pairs = itertools.pairwise(budgets)
    value, half = max(difference(correct[larger], correct[less]) for less, larger in pairs)
    return Check(
        13,
        value,
        limit,
        status_of_difference(value, half, limit),
        "A larger budget leaves more images right, so the attack does not use what it may.",
        "Scale the step size with epsilon; if that does not help, see checks 4 to 6.",
        _CARLINI,
    )


def full_range_breaks_all(correct: np.ndarray, limit: float = 0.01) -> Check:
    """Check 14: the accuracy left when every pixel may take any value.

    Args:
      correct: Correct under an attack whose budget reaches every image.
      limit: Largest accuracy; from the prototype.

    Example:
      >>> full_range_breaks_all(np.array([True, False])).status
      'failed'
    """
    share = float(np.mean(correct))
    return Check(
        14,
        share,
        limit,
        status_at_most(share, limit),
        "With no limit on the change the attack still fails, so it cannot find what is there.",
        "Nothing this attack says of smaller budgets counts; see checks 4 to 6.",
        f"{_CARLINI}; {_PINTOR}",
    )


def beats_noise(
    noise: np.ndarray, correct: np.ndarray, limit: float = 0.02, able: bool = False
) -> Check:
    """Check 15: by how much the attack's accuracy is below that under random noise of its size.

    Args:
      noise: Correct under random noise.
      correct: Correct under the reported attack.
      limit: The gain must be larger; from the prototype.
      able: Whether an attack that breaks the model where the budget suffices (check 14) gains no
        more: a model that is robust at this budget leaves nothing to gain, so it is a note at
        worst.

    Example:
      >>> beats_noise(np.ones(9, bool), np.ones(9, bool)).status
      'failed'
      >>> beats_noise(np.ones(9, bool), np.ones(9, bool), able=True).status
      'note'
    """
    gain, half = difference(noise, correct)
    status = status_of_gain(gain, half, limit)
    return Check(
        15,
        gain,
        limit,
        "note" if able and status == "failed" else status,
        "Random noise does as much as the attack.",
        "Either epsilon is too small to tell anything, or the gradient is useless: checks 4 to 6.",
        f"{_CARLINI}; limit of this package",
    )


def black_box_not_stronger(
    correct: np.ndarray, black_box: np.ndarray, limit: float = 0.002
) -> Check:
    """Check 16: by how much a black-box attack leaves less accuracy than the reported ones.

    Args:
      correct: Correct under the reported attacks.
      black_box: Correct under Square, which sees outputs only.
      limit: Largest difference; from the prototype, one image of 497.

    Example:
      >>> black_box_not_stronger(np.ones(9, bool), np.zeros(9, bool)).status
      'failed'
    """
    value, half = difference(correct, black_box)
    return Check(
        16,
        value,
        limit,
        status_of_difference(value, half, limit),
        "An attack without gradients beats those with: the gradient is masked.",
        "Report the worst case with Square, find what masks the gradient, attack without it.",
        "Croce and Hein 2020, flags (Square improves); Athalye et al. 2018",
    )


def transfer_not_stronger(correct: np.ndarray, transfer: np.ndarray, limit: float = 0.002) -> Check:
    """Check 17: by how much images crafted on a surrogate leave less accuracy.

    Args:
      correct: Correct under the reported attacks.
      transfer: Correct on the surrogate's adversarial images.
      limit: Largest difference; from the prototype.

    Example:
      >>> transfer_not_stronger(np.zeros(9, bool), np.ones(9, bool)).status
      'passed'
    """
    value, half = difference(correct, transfer)
    return Check(
        17,
        value,
        limit,
        status_of_difference(value, half, limit),
        "Adversarial images of another model beat those made for this one: the gradient is masked.",
        "Report the worst case with the transferred ones; see checks 4 to 6.",
        f"{_CARLINI}; Tramer et al. 2020",
    )

"""Did the attack arrive, and did it try hard enough?

All take NumPy arrays of the same images in the same order: bool ``[n]``, correct under an attack,
the reported one first.  Differences of accuracies over their limit are held against the
disagreements between the two (`counts.difference`): on few images what may be an accident is a
note.  Default limits are the prototype's, drawn on 497 images.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
from scipy import special

from robust_ssl.evaluation.checks.comparisons import of_difference, of_gain
from robust_ssl.evaluation.checks.result import Check, at_most, not_run, status_at_most
from robust_ssl.evaluation.counts import difference

FEW = 0.05  # of the images: what is left to gain by a longer attack
ALPHA = 0.05  # how often a share at its limit may be called more than that
BOUNCE = 2e-3  # of the whole rise: sign steps bounced on honest victims' plateaus by 0.9e-3


def steps_raise_loss(losses: np.ndarray, limit: float = 0.1, note: float = 0.3) -> Check:
    """Measures the share of steps after which the mean objective is lower than before.

    Args:
      losses: The objective along the path, float ``[n, num_steps + 1]``.
      limit: Largest share that passes; from the prototype.
      note: Largest that is a note.

    Example:
      >>> steps_raise_loss(np.array([[0.0, 1.0, 0.5, 2.0]])).status
      'failed'
    """
    mean = np.mean(np.asarray(losses, np.float64), axis=0)
    # Signs jump between the corners of a plateau: without this, who withstands a small budget, and
    # is on the plateau after five steps, had a quarter of falling steps.
    least = max(_tremble(mean), BOUNCE * float(np.max(mean) - mean[0]))
    share = float(np.mean(np.diff(mean) < -least))
    # Comparisons with NaN are false, so that a broken path would look like one that never falls.
    if not np.isfinite(mean).all():
        share = math.nan
    return at_most(
        "steps_raise_loss",
        share,
        limit,
        note=note,
        meaning="The attack's own objective keeps falling: steps are too long, or the gradient is "
        "wrong.",
        advice="Take smaller steps (APGD halves them by itself). If that does not help, see the "
        "checks of the gradient.",
    )


def converged(
    losses: np.ndarray,
    limit: float = 0.05,
    window: int = 10,
    still_right: np.ndarray | None = None,
) -> Check:
    """Measures the share of the whole rise that the last steps brought.

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
        return not_run("converged", "No image is left that more steps could break.")[0]
    # The best so far, since an attack returns that and not the point where it stands.
    best = np.maximum.accumulate(left, axis=1)
    window = min(window, (best.shape[1] - 1) // 2)
    rise, late = best[:, -1] - best[:, 0], best[:, -1] - best[:, -1 - window]
    share = float(late.sum() / rise.sum()) if rise.mean() > _tremble(best) else 0.0
    if not np.isfinite(left).all():
        share = math.nan
    few = still_right is not None and right.mean() <= FEW
    unsure = not math.isnan(share) and (few or not _positive(late - limit * rise))
    status = status_at_most(share, limit)
    status = "note" if status == "failed" and unsure else status
    meaning = (
        f"The loss was still rising at the end on what is left, {len(left)} images: more steps may "
        "break more."
    )
    advice = "Double num_steps until the figure stands still."
    return Check("converged", status, share, limit, meaning, advice)


def _positive(values: np.ndarray) -> bool:
    """Whether the mean is above zero by more than chance: one-sided t-test at `ALPHA`."""
    n = len(values)
    if n < 2:
        return False
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    # Images that all rise alike leave nothing to divide by, and nothing to chance.
    if error <= 1e-12 * float(np.max(np.abs(values))):
        return float(np.mean(values)) > 0
    return float(special.stdtr(n - 1, -np.mean(values) / error)) <= ALPHA


def _tremble(values: np.ndarray) -> float:
    """What a plateau moves in float32 by its last digits."""
    return 1e-6 * max(float(np.max(np.abs(values))), 1e-12)


def no_silent_hits(hit: np.ndarray, correct: np.ndarray, limit: float = 0.01) -> Check:
    """Counts images misclassified on the way, whose returned point is classified correctly.

    Each is an image that the attack has broken and the figure counts as right.  Whether there are
    more of them than `limit` allows is asked with an exact binomial test: a few of few images are a
    note.

    Args:
      hit: Whether some point on the path was misclassified, bool ``[n]``.
      correct: Whether the point that the attack returns is classified correctly, bool ``[n]``.
      limit: Largest share.

    Example:
      >>> no_silent_hits(np.array([True, True, True]), np.array([True, True, False])).status
      'failed'
      >>> no_silent_hits(np.arange(65) < 1, np.ones(65, bool)).status
      'note'
    """
    missed = np.asarray(hit, bool) & np.asarray(correct, bool)
    count, n = int(missed.sum()), len(missed)
    if not n:
        return not_run("no_silent_hits", "There is no image to attack.")[0]
    # bdtrc is the chance of more than its first argument, so count - 1 asks for count or more.
    beyond = float(special.bdtrc(count - 1, n, limit)) <= ALPHA if count else False
    status = status_at_most(count / n, limit)
    status = "note" if status == "failed" and not beyond else status
    meaning = f"The attack met adversarial images and gave back others, for {count} of {n}."
    advice = (
        "Return a misclassified point wherever one was seen, not the last or that of highest loss."
    )
    return Check("no_silent_hits", status, count / n, limit, meaning, advice)


def twice_the_steps_not_stronger(once: np.ndarray, twice: np.ndarray, limit: float = 0.02) -> Check:
    """Measures by how much the accuracy falls when the steps are doubled.

    Example:
      >>> twice_the_steps_not_stronger(np.ones(100, bool), np.arange(100) > 9).status
      'failed'
    """
    return of_difference(
        "twice_the_steps_not_stronger",
        difference(once, twice),
        limit,
        meaning="More steps break more images, so the figure is the attack's, not the model's.",
        advice="Report what more steps, or APGD with restarts, leave.",
    )


def one_step_not_stronger(iterative: np.ndarray, one_step: np.ndarray, limit: float = 0.0) -> Check:
    """Measures by how much the accuracy under one step (FGSM) is below the reported one.

    Example:
      >>> one_step_not_stronger(np.ones(9, bool), np.zeros(9, bool)).status
      'failed'
    """
    return of_difference(
        "one_step_not_stronger",
        difference(iterative, one_step),
        limit,
        meaning="One step does more than many, so the many are badly tuned or the gradient is "
        "masked.",
        advice="Tune the step size. If that does not help, see the checks of the gradient.",
    )


def objectives_agree(
    correct: Mapping[str, np.ndarray], first: str = "cross_entropy", limit: float = 0.02
) -> Check:
    """Measures by how much another objective beats the one that the figure comes from.

    One-sided: an objective weaker than the first does the figure no harm.

    Args:
      correct: Correct under the same attack, by objective.
      first: The objective that the others are held against.
      limit: Largest difference.

    Example:
      >>> right, wrong = np.ones(9, bool), np.zeros(9, bool)
      >>> objectives_agree({"cross_entropy": right, "margin": wrong}).value
      1.0
    """
    strongest = min(correct, key=lambda name: np.mean(correct[name]))
    return of_difference(
        "objectives_agree",
        max(difference(correct[first], other) for other in correct.values()),
        limit,
        meaning=f"The objective {strongest} breaks more images than {first}: the loss is "
        "saturated.",
        advice=f"Report the worst case over several objectives, {strongest} among them.",
    )


def accuracy_falls_with_epsilon(correct: Mapping[float, np.ndarray], limit: float = 0.01) -> Check:
    """Measures the largest rise of the accuracy from one budget to the next larger one.

    Example:
      >>> accuracy_falls_with_epsilon({0.1: np.ones(9, bool), 0.2: np.zeros(9, bool)}).value
      -1.0
    """
    pairs = itertools.pairwise(sorted(correct))
    return of_difference(
        "accuracy_falls_with_epsilon",
        max(difference(correct[larger], correct[less]) for less, larger in pairs),
        limit,
        meaning="A larger budget leaves more images right, so the attack does not use what it may.",
        advice="Scale the step size with epsilon. If that does not help, see the checks of the "
        "gradient.",
    )


def full_range_breaks_all(correct: np.ndarray, limit: float = 0.01) -> Check:
    """Measures the accuracy left when every pixel may take any value.

    Example:
      >>> full_range_breaks_all(np.array([True, False])).status
      'failed'
    """
    return at_most(
        "full_range_breaks_all",
        float(np.mean(correct)),
        limit,
        meaning="With no limit on the change the attack still fails, so it misses what is there.",
        advice="Believe nothing this attack says of smaller budgets. See the checks of the "
        "gradient.",
    )


def beats_noise(
    noise: np.ndarray, correct: np.ndarray, limit: float = 0.02, able: bool = False
) -> Check:
    """Measures by how much the attack's accuracy is below that under random noise of its size.

    Args:
      noise: Correct under random noise.
      correct: Correct under the reported attack.
      limit: The gain must be larger.
      able: Whether an attack that breaks the model where the budget suffices
        (`full_range_breaks_all`) gains no more: a model that is robust at this budget leaves
        nothing to gain, so it is a note at worst.

    Example:
      >>> beats_noise(np.ones(9, bool), np.ones(9, bool)).status
      'failed'
      >>> beats_noise(np.ones(9, bool), np.ones(9, bool), able=True).status
      'note'
    """
    gain, half = difference(noise, correct)
    more = "Random noise takes as much as the attack"
    if gain > 0:
        more = f"The attack takes only {100 * gain:.1f} points more than random noise"
    # The second one is the examination's own: it shows that the model, not the attack, is why.
    able_too = "A second attack, which does break the model at a larger epsilon, does no better."
    larger = "Compare attacks at a larger epsilon."
    return of_gain(
        "beats_noise",
        (gain, half),
        limit,
        meaning=f"{more}: that tells nothing.",
        advice=larger
        if able
        else f"{larger} If that does not help, see the checks of the gradient.",
        withstands=f"{more}. {able_too}" if able else None,
    )


def black_box_not_stronger(
    correct: np.ndarray, black_box: np.ndarray, limit: float = 0.002
) -> Check:
    """Measures by how much a black-box attack leaves less accuracy than the reported ones.

    The limit is one image of 497.

    Example:
      >>> black_box_not_stronger(np.ones(9, bool), np.zeros(9, bool)).status
      'failed'
    """
    return of_difference(
        "black_box_not_stronger",
        difference(correct, black_box),
        limit,
        meaning="An attack without gradients beats those with: the gradient is masked.",
        advice="Report the worst case with Square, find what masks the gradient, attack without "
        "it.",
    )


def transfer_not_stronger(correct: np.ndarray, transfer: np.ndarray, limit: float = 0.002) -> Check:
    """Measures by how much images crafted on a surrogate leave less accuracy than the reported.

    Example:
      >>> transfer_not_stronger(np.zeros(9, bool), np.ones(9, bool)).status
      'passed'
    """
    return of_difference(
        "transfer_not_stronger",
        difference(correct, transfer),
        limit,
        meaning="Adversarial images of another model beat those made for this one: the gradient is "
        "masked.",
        advice="Report the worst case with the transferred ones, and see the checks of the "
        "gradient.",
    )

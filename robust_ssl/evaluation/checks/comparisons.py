"""Outcomes of comparing two attacks on the same images, and what they say of a robust model."""

from __future__ import annotations

import dataclasses

import numpy as np

from robust_ssl.evaluation.checks.result import Check, status_of_difference, status_of_gain
from robust_ssl.evaluation.checks.table import ESSENTIAL, names_of
from robust_ssl.evaluation.counts import difference

GAINS = ("beats_noise", "beats_noise_and_shuffle")  # fail where there is no difference
# Full range is among them and is never taken back: it is no note, and its failure is a doubt.
COMPARISONS = (*names_of("strength"), *GAINS, "per_image_not_weaker", "crafted_again_agrees")
LITTLE = 0.02  # what an attack must take more than noise; who takes less in all cannot pass


def of_difference(
    name: str, measured: tuple[float, float], limit: float, *, meaning: str, advice: str
) -> Check:
    """Returns the outcome of a check that fails where a difference is over its limit.

    Measured are the difference and its half-width, `counts.difference`.

    Example:
      >>> of_difference("seeds_agree", (0.01, 0.05), 0.0, meaning="They differ.", advice="").meaning
      'Within chance on these images. If more images confirm it: they differ.'
    """
    status = status_of_difference(*measured, limit)
    meaning = perhaps(meaning) if status == "note" else meaning
    return Check(name, status, measured[0], limit, meaning, advice)


def of_gain(
    name: str,
    measured: tuple[float, float],
    limit: float,
    *,
    meaning: str,
    advice: str,
    withstands: str | None = None,
) -> Check:
    """Returns the outcome of a check that passes where a gain is over its limit.

    Measured are the gain and its half-width.  `withstands` is what it means where it is known that
    the model is why there is no gain: then the check is a note at worst.

    Example:
      >>> of_gain("beats_noise", (0.0, 0.01), 0.02, meaning="It does nothing.", advice="").status
      'failed'
    """
    status = status_of_gain(*measured, limit)
    if status != "passed" and withstands is not None:
        status, meaning = "note", withstands
    elif status == "note":
        meaning = perhaps(meaning)
    return Check(name, status, measured[0], limit, meaning, advice)


def perhaps(meaning: str) -> str:
    """Says the meaning of an outcome that may be chance."""
    later = meaning[0].lower() + meaning[1:]
    return f"Within chance on these images. If more images confirm it: {later}"


def settle(checks: tuple[Check, ...], clean: np.ndarray, worst: np.ndarray) -> tuple[Check, ...]:
    """Takes back what comparisons of attacks say of a model that withstands all of them.

    Where every attack together, the independent ones among them, takes at most `LITTLE` or no more
    than chance, no attack can beat another or noise, so that none does says nothing of the
    gradient.

    Args:
      checks: Outcomes.  If one has failed that is none of `GAINS`, or an essential one did not
        pass, nothing is changed: then the model may only seem to withstand.
      clean: Correct when nobody attacks, bool ``[n]``.
      worst: Correct under all attacks, bool ``[n]``.

    Returns:
      The outcomes, with `COMPARISONS` that did not pass as not run.

    Example:
      >>> noise = Check(name="beats_noise", status="failed", meaning="It does nothing.")
      >>> settle((noise,), np.ones(500, bool), np.arange(500) > 1)[0].meaning
      'Nothing to compare: all attacks together take 0.4 points.'
    """
    failed = {check.name for check in checks if check.status == "failed"}
    unclear = {check.name for check in checks if check.status == "note"}
    taken, half = difference(clean, worst)
    if failed - set(GAINS) or unclear & ESSENTIAL or taken > max(LITTLE, half):
        return checks
    # Not "passed": that a weak attack would have been noticed is not shown either.
    reason = f"Nothing to compare: all attacks together take {100 * taken:.1f} points."

    def settled(check: Check) -> Check:
        if check.name not in COMPARISONS or check.status not in ("note", "failed"):
            return check
        return dataclasses.replace(check, status="not run", meaning=reason, advice="")

    return tuple(map(settled, checks))


def nothing_left(checks: tuple[Check, ...], reported: np.ndarray) -> tuple[Check, ...]:
    """Turns failures into notes where the figure is 0: a gradient that hides has hidden nothing.

    Args:
      checks: Outcomes.
      reported: Correct under every attack of the evaluation, bool ``[n]``.

    Example:
      >>> masked = Check(name="gradient_not_zero", status="failed", meaning="It is zero.")
      >>> nothing_left((masked,), np.zeros(9, bool))[0].status
      'note'
    """
    if reported.any():
        return checks
    above = "The figure is 0 all the same, which no attack can lower. "
    hides = names_of(("gradients", "path", "strength"))

    def noted(check: Check) -> Check:
        if check.status != "failed" or check.name not in hides:
            return check
        return dataclasses.replace(check, status="note", meaning=above + check.meaning)

    return tuple(map(noted, checks))

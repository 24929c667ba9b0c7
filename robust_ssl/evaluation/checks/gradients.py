"""Is there a gradient, and does it tell the truth?"""

from __future__ import annotations

import numpy as np

from robust_ssl.evaluation.checks.result import Check, at_most, status_at_most

_ZERO_LIMIT = 0.01  # prototype: 0 on honest victims; over half on the rounded and the saturated


def gradient_not_zero(vanished: np.ndarray, limit: float = _ZERO_LIMIT) -> Check:
    """Measures the share of images whose cross-entropy has no gradient.

    `vanished`, bool ``[n]``: all of an image's gradient is 0, or an entry is not finite.

    Example:
      >>> gradient_not_zero(np.array([True, False, False, False])).value
      0.25
    """
    return at_most(
        "gradient_not_zero",
        float(np.mean(vanished)),
        limit,
        meaning="Attacks on the cross-entropy stand still on these images, which then count as "
        "robust.",
        advice="If the margin has a gradient, the loss is saturated: divide the logits by their "
        "scale, or attack margin or DLR. If not, the model blocks it.",
    )


def margin_gradient_not_zero(vanished: np.ndarray, limit: float = _ZERO_LIMIT) -> Check:
    """Measures the share of images whose logit margin has no gradient.

    The margin does not saturate, so a zero here is the model's own.

    Example:
      >>> margin_gradient_not_zero(np.array([False, False])).status
      'passed'
    """
    return at_most(
        "margin_gradient_not_zero",
        float(np.mean(vanished)),
        limit,
        meaning="The model itself gives no gradient (rounding, thresholds, a cut), so no gradient "
        "attack tells anything.",
        advice="Replace what blocks the gradient by a smooth stand-in (BPDA), and lean on "
        "black-box attacks.",
    )


def gradient_matches_differences(
    predicted: np.ndarray,
    measured: np.ndarray,
    limit: float = 0.7,
    note: float = 0.4,  # the victim whose gradient is partly cut lies between the two
) -> Check:
    r"""Correlates what the gradient promises with what the margin does.

    Image by image the cosine between slopes along the same random directions, by the gradient and
    by central differences, averaged over the images.  1 is a gradient that tells the truth; a
    straight-through gradient invents one, a cut gradient tells half of it.

    Args:
      predicted: :math:`\langle g, d\rangle`, float ``[n, directions]``.
      measured: :math:`(f(x + h d) - f(x - h d)) / 2h`, float ``[n, directions]``.
      limit: Smallest correlation that passes; from the prototype.
      note: Smallest that is a note.

    Returns:
      The outcome; an image without any slope counts as correlation 0.

    Example:
      >>> slopes = np.array([[1.0, -2.0, 0.5]])
      >>> round(gradient_matches_differences(slopes, 3 * slopes).value, 6)
      1.0
    """
    predicted, measured = np.asarray(predicted, np.float64), np.asarray(measured, np.float64)
    # Cosines and not one correlation over all: an image with steep slopes must not outvote others.
    lengths = np.linalg.norm(predicted, axis=1) * np.linalg.norm(measured, axis=1)
    cosines = np.sum(predicted * measured, axis=1) / np.where(lengths > 0, lengths, 1.0)
    value = float(np.mean(cosines))
    status = status_at_most(-value, -limit, -note)
    return Check(
        *("gradient_matches_differences", status, value, limit),
        meaning="The gradient does not point where the model's output rises, so attacks go astray.",
        advice="Look for stop_gradient, custom gradients and straight-through estimators. Attack "
        "the model without them, and lean on black-box attacks.",
    )

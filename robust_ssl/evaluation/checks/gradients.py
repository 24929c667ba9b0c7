"""Checks 4 to 6: is there a gradient, and does it tell the truth?"""

from __future__ import annotations

import numpy as np

from robust_ssl.evaluation.checks.result import Check, status_at_most

_ZERO_LIMIT = 0.01  # prototype: 0 on honest victims; over half on the rounded and the saturated


def zero_gradient(vanished: np.ndarray, limit: float = _ZERO_LIMIT) -> Check:
    """Check 4: the share of images whose cross-entropy has no gradient.

    Args:
      vanished: Whether every entry of an image's gradient is 0 or one is not finite, bool ``[n]``.
      limit: Largest share.

    Example:
      >>> zero_gradient(np.array([True, False, False, False])).value
      0.25
    """
    share = float(np.mean(vanished))
    return Check(
        4,
        share,
        limit,
        status_at_most(share, limit),
        "Attacks on the cross-entropy stand still on these images, which then count as robust.",
        "If check 5 passes, the loss is saturated: divide the logits by their scale, or attack "
        "margin or DLR. If not, see there.",
        "Croce and Hein 2020, flags (zero gradient); Carlini and Wagner 2017, Section III",
    )


def zero_margin_gradient(vanished: np.ndarray, limit: float = _ZERO_LIMIT) -> Check:
    """Check 5: the share of images whose logit margin has no gradient.

    The margin does not saturate, so a zero here is the model's own.

    Args:
      vanished: As for `zero_gradient`, bool ``[n]``.
      limit: Largest share.

    Example:
      >>> zero_margin_gradient(np.array([False, False])).status
      'passed'
    """
    share = float(np.mean(vanished))
    return Check(
        5,
        share,
        limit,
        status_at_most(share, limit),
        "The model itself gives no gradient (rounding, thresholds, a cut), so no gradient attack "
        "tells anything.",
        "Replace what blocks the gradient by a smooth stand-in (BPDA), and lean on black-box "
        "attacks.",
        "Athalye et al. 2018, Section 4",
    )


def finite_differences(
    predicted: np.ndarray,
    measured: np.ndarray,
    limit: float = 0.7,
    note: float = 0.4,
) -> Check:
    r"""Check 6: the correlation of what the gradient promises with what the margin does.

    Image by image the cosine between slopes along the same random directions, by the gradient and
    by central differences, averaged over the images.  1 is a gradient that tells the truth; a
    straight-through gradient invents one, a cut gradient tells half of it.

    Args:
      predicted: :math:`\langle g, d\rangle`, float ``[n, directions]``.
      measured: :math:`(f(x + h d) - f(x - h d)) / 2h`, float ``[n, directions]``.
      limit: Smallest correlation that passes; from the prototype.
      note: Smallest that is a note.

    Returns:
      The finding; an image without any slope counts as correlation 0.

    Example:
      >>> slopes = np.array([[1.0, -2.0, 0.5]])
      >>> round(finite_differences(slopes, 3 * slopes).value, 6)
      1.0
    """
    predicted, measured = np.asarray(predicted, np.float64), np.asarray(measured, np.float64)
    lengths = np.linalg.norm(predicted, axis=1) * np.linalg.norm(measured, axis=1)
    cosines = np.sum(predicted * measured, axis=1) / np.where(lengths > 0, lengths, 1.0)
    value = float(np.mean(cosines))
    return Check(
        6,
        value,
        limit,
        status_at_most(-value, -limit, -note),
        "The gradient does not point where the model's output rises, so attacks walk astray.",
        "Look for stop_gradient, custom gradients and straight-through estimators; attack the "
        "model without them, and lean on black-box attacks.",
        "Athalye et al. 2018, Section 3 (shattered gradients); limit of this package",
    )

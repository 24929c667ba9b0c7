"""Checks 18 to 20: was it counted as it should be?"""

from __future__ import annotations

import numpy as np

from robust_ssl.evaluation.checks.result import (
    Check,
    status_at_most,
    status_of_difference,
)
from robust_ssl.evaluation.counts import difference, wilson_interval


def budget_kept(excess: np.ndarray, limit: float = 1e-5) -> Check:
    """Check 18: how far an adversarial image is outside what the threat allows.

    Args:
      excess: Largest distance of a pixel to the nearest allowed image, which is in [0, 1] too,
        pixel units, float ``[n]``; NaN where a pixel is.
      limit: Largest distance: what float32 needs; torchattacks #136 asks for as much.

    Example:
      >>> budget_kept(np.array([0.0, 0.02])).status
      'failed'
    """
    value = float(np.max(excess))
    return Check(
        18,
        value,
        limit,
        status_at_most(value, limit),
        "Adversarial images leave the budget or [0, 1], so the figure is that of another threat.",
        "Project every image with threat.project before it is scored.",
        "RobustBench, rules; Croce and Hein 2020",
    )


def survives_rounding(exact: np.ndarray, rounded: np.ndarray, limit: float = 0.01) -> Check:
    """Check 19: by how much rounding the adversarial images to 8 bits mends the accuracy.

    Args:
      exact: Correct on the adversarial images as found.
      rounded: Correct on them rounded to 8 bits, as a file holds them.
      limit: Largest rise; from the prototype.

    Example:
      >>> survives_rounding(np.zeros(9, bool), np.ones(9, bool)).status
      'failed'
    """
    value, half = difference(rounded, exact)
    return Check(
        19,
        value,
        limit,
        status_of_difference(value, half, limit),
        "The adversarial images do not survive being saved, so they are no images.",
        "Round inside the attack, or look for a model that answers to changes below 1/255.",
        "Carlini et al. 2019, Section 4.9; limit of this package",
    )


def enough_images(correct: int, n: int, limit: float = 0.02) -> Check:
    """Check 20: half the width of the 95 % interval of the reported robust accuracy.

    Never worse than a note: a wide interval is no error, it has to be printed.

    Args:
      correct: Number of images right under the reported attacks.
      n: Number of images that they were tried on.
      limit: Largest half-width; 2,401 images suffice for any accuracy.

    Example:
      >>> enough_images(1200, 2401).status, enough_images(50, 100).status
      ('passed', 'note')
    """
    low, high = wilson_interval(correct, n)
    value = (high - low) / 2
    return Check(
        20,
        value,
        limit,
        status_at_most(value, limit, note=1.0),
        f"The figure is known to {100 * value:.1f} points only: {n} images are few.",
        "Score more images, up to about 2,400, or print the interval beside the figure.",
        "Wilson 1927; limit of this package",
    )

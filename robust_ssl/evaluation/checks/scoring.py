"""Was it counted as it should be?"""

from __future__ import annotations

import numpy as np

from robust_ssl.evaluation.checks.comparisons import of_difference
from robust_ssl.evaluation.checks.result import Check, at_most
from robust_ssl.evaluation.counts import difference, wilson_interval


def budget_kept(excess: np.ndarray, limit: float = 1e-5) -> Check:
    """Measures how far an adversarial image is outside what the threat allows.

    Args:
      excess: Largest distance of a pixel to the nearest allowed image, which is in [0, 1] too,
        pixel units, float ``[n]``; NaN where a pixel is.
      limit: Largest distance: what float32 needs; torchattacks #136 asks for as much.

    Example:
      >>> budget_kept(np.array([0.0, 0.02])).status
      'failed'
    """
    value = float(np.max(excess))  # the largest: one image outside is another threat
    return at_most(
        "budget_kept",
        value,
        limit,
        meaning="Adversarial images leave the budget or [0, 1], so the figure is that of another "
        "threat.",
        advice="Project every image with threat.project before it is scored.",
    )


def survives_rounding(exact: np.ndarray, rounded: np.ndarray, limit: float = 0.01) -> Check:
    """Measures by how much rounding the adversarial images to 8 bits mends the accuracy.

    Example:
      >>> survives_rounding(np.zeros(9, bool), np.ones(9, bool)).status
      'failed'
    """
    return of_difference(
        "survives_rounding",
        difference(rounded, exact),
        limit,
        meaning="The adversarial images do not survive being saved, so they are no images.",
        advice="Round inside the attack, or look for a model that answers to changes below 1/255.",
    )


def enough_images(correct: int, n: int, limit: float = 0.02) -> Check:
    """Measures half the width of the 95 % interval of the reported robust accuracy.

    Never worse than a note: a wide interval is no error, it has to be printed.

    Args:
      correct: Number of images right under the reported attacks.
      n: Number of images that they were tried on.
      limit: Largest half-width; 2,401 images suffice for any accuracy.

    Example:
      >>> enough_images(1200, 2401).status, enough_images(50, 100).status
      ('passed', 'note')
    """
    # Robust accuracies like to lie near 0, where the textbook interval would have no width.
    low, high = wilson_interval(correct, n)
    value = (high - low) / 2
    return at_most(
        "enough_images",
        value,
        limit,
        note=1.0,
        meaning=f"The figure is known to within {100 * value:.1f} points only: {n} images are few.",
        advice="Score more images, up to about 2,400, or print the interval beside the figure.",
    )

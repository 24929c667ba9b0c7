"""How well scores tell attacked images from clean ones: exact figures with intervals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from robust_ssl.evaluation import wilson_interval

RATES = {"at_1_percent": 0.01, "at_5_percent": 0.05}  # false alarms that are allowed, by name
JUDGED = RATES["at_5_percent"]  # whoever knows a detector aims below this one, and it is served
_Z = 1.959963984540054  # of 95 %


def auc(clean: np.ndarray, attacked: np.ndarray) -> float:
    """Returns the chance that an attacked image scores higher than a clean one.

    The area under the curve of true against false positives; equal scores count half.

    Args:
      clean: Scores of clean images, ``[n]``.
      attacked: Of attacked ones, ``[m]``.

    Returns:
      A share in [0, 1]; 0.5 tells nothing apart.

    Raises:
      ValueError: If one of both is empty.

    Example:
      >>> auc(np.array([1.0, 2.0]), np.array([2.0, 3.0]))
      0.875

    References:
      Hanley and McNeil, "The Meaning and Use of the Area under a ROC Curve", 1982.
    """
    if not len(clean) or not len(attacked):
        raise ValueError(f"needs scores of both kinds, got {len(clean)} and {len(attacked)}")
    ordered = np.sort(np.asarray(clean, np.float64))
    below = np.searchsorted(ordered, attacked, side="left")
    up_to = np.searchsorted(ordered, attacked, side="right")
    return float((below + up_to).sum() / (2 * len(clean) * len(attacked)))


def auc_interval(area: float, clean: int, attacked: int) -> tuple[float, float]:
    r"""Returns the 95 % interval of an area under the curve.

    It holds the areas A for which :math:`|A - \hat A| \le z \sqrt{v(A)}` with Hanley and McNeil's
    variance v.  As Wilson's it stays in [0, 1] and has a width at an area of 1, where theirs is 0.

    Args:
      area: What was measured.
      clean: Number of clean images.
      attacked: Number of attacked ones.

    Example:
      >>> low, high = auc_interval(1.0, 100, 100)
      >>> round(low, 3), high
      (0.98, 1.0)

    References:
      Newcombe, "Confidence intervals for an effect size measure based on the Mann-Whitney
      statistic, part 2", 2006, method 5.
    """
    mean = (clean + attacked) / 2 - 1

    def distance(value: float) -> float:
        spread = (1 - value) / (2 - value) + value / (1 + value)
        variance = value * (1 - value) * (1 + mean * spread) / (clean * attacked)
        return abs(value - area) - _Z * math.sqrt(variance)

    low = 0.0 if area == 0 else _root(distance, 0.0, area)
    high = 1.0 if area == 1 else _root(distance, 1.0, area)
    return low, high


def _root(distance, outside: float, inside: float) -> float:
    """Returns where `distance` turns from positive to negative, by halving."""
    for _ in range(60):
        middle = (outside + inside) / 2
        outside, inside = (middle, inside) if distance(middle) > 0 else (outside, middle)
    return inside


def threshold(clean: np.ndarray, rate: float) -> float:
    """Returns the least score above which at most a share of the clean images lies.

    Args:
      clean: Scores of clean images that nothing else is measured on, ``[n]``.
      rate: The share of false alarms that is allowed, in [0, 1).

    Example:
      >>> threshold(np.arange(100.0), 0.05)
      94.0
    """
    ordered = np.sort(np.asarray(clean, np.float64))
    return float(ordered[len(ordered) - 1 - math.floor(rate * len(ordered) + 1e-9)])


def share(hits: np.ndarray) -> dict[str, Any]:
    """Returns how many of the images, with Wilson's interval: ``share``, ``n``, ``ci95``.

    Example:
      >>> share(np.array([True, False]))["share"]
      0.5
    """
    count, total = int(np.sum(hits)), len(hits)
    low, high = wilson_interval(count, total)
    # No NaN, which JSON cannot hold; that nothing is known stands in the interval.
    return {"share": count / total if total else 0.0, "n": total, "ci95": [low, high]}


def alarms(calibration: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    """Returns the share of images above each threshold of `RATES`, by its name."""
    return {name: share(scores > threshold(calibration, rate)) for name, rate in RATES.items()}


def separation(clean: np.ndarray, attacked: np.ndarray) -> dict[str, Any]:
    """Returns ``auc`` and ``auc_ci95``."""
    area = auc(clean, attacked)
    return {"auc": area, "auc_ci95": list(auc_interval(area, len(clean), len(attacked)))}

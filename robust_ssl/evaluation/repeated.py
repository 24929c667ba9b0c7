"""Differences between trainings that were repeated with several seeds, image by image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from robust_ssl.evaluation.counts import wilson_interval

_ROUNDING = 1e-24  # a variance; one image of a million that differs by a hundredth makes 1e-16


class Advantage(NamedTuple):
    """By how much one share exceeds another.

    Attributes:
      mean: Over seeds and images.
      low: Lower end of the 95 % interval.
      high: Its upper end.
      p: One-sided: how likely so much is where there is no advantage beyond ``-margin``.
    """

    mean: float
    low: float
    high: float
    p: float


def advantage(first: np.ndarray, second: np.ndarray, margin: float = 0.0) -> Advantage:
    r"""Compares two recipes on the same images, trained with the same seeds.

    .. math:: \mathrm{Var}(\bar d) = \frac{s^2_\text{seeds}}{k} + \frac{s^2_\text{images}}{n}

    with `s` the sample deviations of the seeds' and of the images' mean differences, and Student's
    distribution by Welch's degrees of freedom.  What seeds and images do together is counted in
    both terms, so the interval is a little wide.

    Where every image says the same there is no variance to go by, which is not certainty.  Then a
    share `u` of images may speak against it, the upper end of Wilson's interval of none out of n:

    .. math:: (1 - u) \bar d \pm u, \qquad
       p = \left(\frac{1 - \mathrm{margin}}{1 + \bar d}\right)^n

    Args:
      first: Bool ``[seeds, n]``: which images were right with each seed.
      second: The same of the other recipe.
      margin: What `first` may be behind, a share: 0 asks whether it is ahead.

    Returns:
      The advantage; with one seed only the images speak.

    Raises:
      ValueError: If the shapes differ, or there are fewer than two images.

    Example:
      >>> ahead = np.array([[1, 1, 1, 0], [1, 1, 0, 1]])
      >>> float(advantage(ahead, np.zeros((2, 4))).mean)
      0.75
    """
    each = _each(first, second)
    mean, (variance, freedom) = float(each.mean()), _variance(each, each)
    if variance < _ROUNDING:
        return _without_variance(mean, each.shape[1], margin)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(variance)
    p = stats.t.sf((mean + margin) / math.sqrt(variance), freedom)
    return Advantage(mean, mean - half, mean + half, float(p))


def _without_variance(mean: float, images: int, margin: float) -> Advantage:
    """The advantage where all images say the same: two images may do so by chance."""
    _, against = wilson_interval(0, images)
    low, high = ((1 - against) * mean + sign * against for sign in (-1, 1))
    # The likeliest way to see no image against it where the mean is -margin.
    p = ((1 - margin) / (1 + mean)) ** images if mean > -margin else 1.0
    return Advantage(mean, max(low, -1.0), min(high, 1.0), p)


def gain_ratio(
    first: np.ndarray, base: np.ndarray, leader: np.ndarray
) -> tuple[float, float, float] | None:
    r"""Returns which part of the leader's gain over a base another recipe has, with its interval.

    .. math:: r = \frac{\bar a - \bar b}{\bar l - \bar b}

    Fieller's interval: all `r` for which :math:`(a - b) - r (l - b)` is zero within chance.

    Args:
      first: Bool ``[seeds, n]``, as the next two.
      base: From which gains are counted.
      leader: Whose gain is the whole.

    Returns:
      ``(ratio, low, high)``, 95 %; None where the leader's gain itself is not beyond chance, so
      that any ratio would do.

    Example:
      >>> one, none = np.ones((3, 50)), np.zeros((3, 50))
      >>> half = np.tile([1, 0], (3, 25))
      >>> round(gain_ratio(half, none, one)[0], 3)
      0.5
    """
    part, whole = _each(first, base), _each(leader, base)
    (uu, one), (vv, other) = _variance(part, part), _variance(whole, whole)
    uv, _ = _variance(part, whole)
    u, v, t = float(part.mean()), float(whole.mean()), stats.t.ppf(0.975, min(one, other))
    a, b, c = v**2 - t**2 * vv, u * v - t**2 * uv, u**2 - t**2 * uu
    # The test, since without a variance `a` says nothing of chance.
    if a <= 0 or v <= 0 or advantage(leader, base).p > 0.025:
        return None
    spread = math.sqrt(max(b**2 - a * c, 0.0))
    return u / v, (b - spread) / a, (b + spread) / a


def half_width_over_seeds(*estimates: tuple[float | None, int]) -> float:
    """Returns the 95 % half-width of the difference of two means over seeds, by Welch's t-test.

    Two seeds say little of how far a third would be from them: Student's factor for two recipes
    with two seeds each is 4.3 at best, with three 2.8.

    Args:
      *estimates: Of each recipe the sample deviation over its seeds and their number; None, of one
        seed, counts as no deviation, for nothing is known of it.

    Example:
      >>> round(half_width_over_seeds((0.02, 3), (0.02, 3)), 4), half_width_over_seeds((None, 1))
      (0.0453, 0.0)

    References:
      Welch, "The Generalization of Student's Problem", 1947.
    """
    terms = [(deviation**2 / n, n - 1) for deviation, n in estimates if deviation]
    if not terms:
        return 0.0
    variance, freedom = _welch(terms)
    return float(stats.t.ppf(0.975, freedom) * math.sqrt(variance))


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values that may be held to one level together, by Holm's step-down procedure.

    Example:
      >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
      [0.03, 0.06, 0.06]

    References:
      Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979.
    """
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * float(p_values[place])))
        adjusted[place] = largest
    return adjusted


def _each(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape or first.ndim != 2 or first.shape[1] < 2:
        raise ValueError(
            f"both must be [seeds, images] of the same, with two images or more, got {first.shape} "
            f"and {second.shape}"
        )
    return first - second


def _variance(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """The covariance of two means over seeds and images, and Welch's degrees of freedom."""
    seeds, images = x.shape
    terms = [(_covariance(x.mean(0), y.mean(0)) / images, images - 1)]
    if seeds > 1:
        terms.append((_covariance(x.mean(1), y.mean(1)) / seeds, seeds - 1))
    return _welch(terms)


def _welch(terms: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """The sum of variances, and its degrees of freedom from those of each."""
    total = sum(term for term, _ in terms)
    spread = sum(term**2 / freedom for term, freedom in terms)
    return total, total**2 / spread if spread else terms[0][1]


def _covariance(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.sum((x - x.mean()) * (y - y.mean())) / (len(x) - 1))

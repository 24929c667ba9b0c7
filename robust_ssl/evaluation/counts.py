"""Exact counts per image and per split, and the shares and intervals they give."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable
from typing import Any

import numpy as np


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    r"""Returns the interval of shares that `successes` out of `n` are compatible with.

    .. math:: \frac{k + z^2/2}{n + z^2} \pm \frac{z}{n + z^2}\sqrt{\frac{k(n-k)}{n} + \frac{z^2}{4}}

    Unlike the textbook interval it stays inside [0, 1] and keeps its width at 0 and n successes,
    where robust accuracies like to lie.

    Args:
      successes: Number of successes, 0 to `n`.
      n: Number of trials.
      confidence: Share of such intervals that hold the true share, in (0, 1).

    Returns:
      ``(low, high)``, shares in [0, 1]; ``(0, 1)`` when there was no trial.

    Raises:
      ValueError: If the counts or the confidence are impossible.

    Example:
      >>> low, high = wilson_interval(0, 10)
      >>> low, round(high, 4)
      (0.0, 0.2775)

    References:
      Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927.
      Newcombe, "Two-sided confidence intervals for the single proportion", 1998, method 3.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must be between 0 and n={n}, got {successes}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if n == 0:
        return 0.0, 1.0
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    center = (successes + z**2 / 2) / (n + z**2)
    half = z / (n + z**2) * math.sqrt(successes * (n - successes) / n + z**2 / 4)
    # At the ends the formula is exactly 0 or 1; rounding must not move it.
    low = 0.0 if successes == 0 else max(0.0, center - half)
    high = 1.0 if successes == n else min(1.0, center + half)
    return low, high


def independent_difference(
    first: int, first_n: int, second: int, second_n: int
) -> tuple[float, float]:
    r"""Returns the 95 % interval of the first share less the second, of images that are not paired.

    .. math:: p_1 - p_2 - \sqrt{(p_1 - l_1)^2 + (u_2 - p_2)^2}, \quad
              p_1 - p_2 + \sqrt{(u_1 - p_1)^2 + (p_2 - l_2)^2}

    with Wilson's interval :math:`(l, u)` of each share :math:`p`.

    Args:
      first: Successes of the first, 0 to `first_n`.
      first_n: Its trials, at least 1.
      second: Successes of the second.
      second_n: Its trials.

    Returns:
      ``(low, high)``, in [-1, 1].

    Raises:
      ValueError: If the counts are impossible.

    Example:
      >>> low, high = independent_difference(56, 70, 48, 80)
      >>> round(low, 4), round(high, 4)
      (0.0524, 0.3339)

    References:
      Newcombe, "Interval Estimation for the Difference Between Independent Proportions", 1998,
      method 10.
    """
    low_1, high_1 = wilson_interval(first, first_n)
    low_2, high_2 = wilson_interval(second, second_n)
    p_1, p_2 = first / first_n, second / second_n
    return (
        p_1 - p_2 - math.hypot(p_1 - low_1, high_2 - p_2),
        p_1 - p_2 + math.hypot(high_1 - p_1, p_2 - low_2),
    )


@dataclasses.dataclass(frozen=True)
class Counts:
    """Exact counts over a whole split, and the shares they give.

    A share is in [0, 1] and never NaN: where nothing was counted it is 0, and its interval (0, 1)
    says that nothing is known.

    Attributes:
      n: Number of images.
      clean_correct: Images that are classified correctly when nobody attacks.
      robust_correct: Images that are classified correctly under every attack.  An image that an
        attack happens to mend counts.
      succeeded: Images that were correct and are wrong under some attack.
      flipped: Images whose prediction some attack changed, right or wrong before.

    Example:
      >>> counts = Counts(n=16, clean_correct=8, robust_correct=2, succeeded=6, flipped=12)
      >>> counts.clean_accuracy, counts.robust_accuracy
      (0.5, 0.125)
      >>> counts.attack_success_rate, counts.fooling_rate
      (0.75, 0.75)
    """

    n: int
    clean_correct: int
    robust_correct: int
    succeeded: int
    flipped: int

    def __post_init__(self):
        for field in ("clean_correct", "robust_correct", "flipped"):
            if not 0 <= getattr(self, field) <= self.n:
                raise ValueError(f"{field}={getattr(self, field)} is not between 0 and n={self.n}")
        if not 0 <= self.succeeded <= self.clean_correct:
            raise ValueError(
                f"succeeded={self.succeeded} is not between 0 and "
                f"clean_correct={self.clean_correct}"
            )

    @property
    def _ratios(self) -> dict[str, tuple[int, int]]:
        return {
            "clean_accuracy": (self.clean_correct, self.n),
            "robust_accuracy": (self.robust_correct, self.n),
            "attack_success_rate": (self.succeeded, self.clean_correct),
            "fooling_rate": (self.flipped, self.n),
        }

    def _share(self, metric: str) -> float:
        part, whole = self._ratios[metric]
        # No NaN, which JSON cannot hold; that nothing is known stands in the interval.
        return part / whole if whole else 0.0

    @property
    def clean_accuracy(self) -> float:
        """Share of images that are correct when nobody attacks."""
        return self._share("clean_accuracy")

    @property
    def robust_accuracy(self) -> float:
        """Share of images that are correct under every attack."""
        return self._share("robust_accuracy")

    @property
    def attack_success_rate(self) -> float:
        """Share of the correctly classified images that the attack turns wrong."""
        return self._share("attack_success_rate")

    @property
    def fooling_rate(self) -> float:
        """Share of predictions that the attack changes."""
        return self._share("fooling_rate")

    @property
    def ci95(self) -> dict[str, tuple[float, float]]:
        """The 95 % Wilson interval of each share, by name."""
        return {name: wilson_interval(*ratio) for name, ratio in self._ratios.items()}

    def as_dict(self) -> dict[str, Any]:
        """Returns the part of a ``results.json`` entry that is counted."""
        shares = {name: self._share(name) for name in self._ratios}
        intervals = {name: list(interval) for name, interval in self.ci95.items()}
        return {"n": self.n, **shares, "ci95": intervals}


@dataclasses.dataclass(frozen=True)
class PerImage:
    """What happened to each image under one attack, or in the worst case over several.

    Attributes:
      clean_correct: Correct when nobody attacks, bool ``[n]``.
      robust_correct: Correct under the attack, bool ``[n]``.
      flipped: Prediction changed by the attack, bool ``[n]``.
      seconds: Wall time of attacking and classifying, compilation included.
      excess: Largest distance of a pixel to the nearest image that the attack's threat allows,
        pixel units; NaN where it was not measured.
    """

    clean_correct: np.ndarray
    robust_correct: np.ndarray
    flipped: np.ndarray
    seconds: float = 0.0
    excess: float = math.nan

    @property
    def counts(self) -> Counts:
        """The exact counts."""
        return Counts(
            n=len(self.clean_correct),
            clean_correct=int(self.clean_correct.sum()),
            robust_correct=int(self.robust_correct.sum()),
            succeeded=int((self.clean_correct & ~self.robust_correct).sum()),
            flipped=int(self.flipped.sum()),
        )


def worst_case(results: Iterable[PerImage]) -> PerImage:
    """Returns what the best of several attacks does to each image, chosen image by image.

    Its robust accuracy is at most that of each attack: an image counts only if none breaks it.

    Args:
      results: At least one result, all for the same images in the same order.

    Returns:
      Correct under all of them; flipped by any of them; the seconds added up; the largest excess
      that was measured.

    Example:
      >>> yes, no = np.array([True, True]), np.array([False, False])
      >>> first = PerImage(yes, np.array([True, False]), no)
      >>> second = PerImage(yes, np.array([False, True]), no)
      >>> worst_case([first, second]).counts.robust_accuracy
      0.0
    """
    results = list(results)
    return PerImage(
        clean_correct=results[0].clean_correct,
        robust_correct=np.logical_and.reduce([r.robust_correct for r in results]),
        flipped=np.logical_or.reduce([r.flipped for r in results]),
        seconds=sum(r.seconds for r in results),
        excess=largest_excess(results),
    )


def largest_excess(results: Iterable[PerImage]) -> float:
    """Returns how far any of the attacks left its own budget; NaN where none says."""
    return max((r.excess for r in results if not math.isnan(r.excess)), default=math.nan)


def difference(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    r"""Returns by how much the first share exceeds the second, with its 95 % half-width.

    Both are of the same images, so only those on which they disagree carry information: the mean
    :math:`\bar d` of the images' differences has the half-width :math:`1.96 \sqrt{\sum d^2} / n`
    where the two do not differ.  With b images right in the first only and c in the second only,
    that is :math:`(b - c) / n` and :math:`1.96 \sqrt{b + c} / n`, McNemar's test.

    Args:
      first: Bool ``[n]``, or in how many of several repetitions each was right, shares.
      second: The same of the same images.

    Returns:
      ``(difference, half_width)``, shares.

    Example:
      >>> yes, no = np.ones(4, bool), np.zeros(4, bool)
      >>> difference(yes, no)
      (1.0, 0.98)

    References:
      McNemar, "Note on the Sampling Error of the Difference Between Correlated Proportions", 1947.
    """
    # Of the same images, so an image that is hard for both says nothing and adds no noise.
    each = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    return float(each.mean()), 1.96 * math.sqrt(float(np.square(each).sum())) / len(each)


def balanced_accuracy(correct: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean over classes of the share of right images, in [0, 1].

    One answer for all images gets one over the number of classes, however many are of one class.

    Args:
      correct: Bool ``[n]``.
      labels: Integer ``[n]``; a class without images does not count.

    Example:
      >>> labels = np.array([0, 0, 0, 1])
      >>> balanced_accuracy(labels == 0, labels)
      0.5
    """
    _, places, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return float(np.mean(np.bincount(places, weights=correct) / counts))

"""Catastrophic overfitting: a model that withstands its own one-step attack and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence

History = Sequence[tuple[float, float]]  # of every epoch: accuracy under one step, under PGD


def overfitting_epoch(history: History, *, images: int, margin: float = 2.0) -> int | None:
    r"""Finds the epoch at which single-step training has overfitted to its own attack.

    It has where accuracy under PGD is below half of its best so far, while accuracy under the
    one-step attack is no lower than at that best epoch.  (Where both fall, training has diverged,
    which is another illness.)  Both comparisons leave room for what `images` images cannot tell:

    .. math:: q_t < \tfrac12 q_{b} - m\,\sigma_q, \qquad p_t \ge p_{b} - m\,\sigma_p

    Args:
      history: Of every epoch, from the first: accuracy under the training's own one-step attack,
        and accuracy under multi-step PGD on validation images, both in [0, 1].
      images: How many images the accuracies were measured on; the smaller number of the two.
      margin: :math:`m`, in standard errors; 2 is about 95 % confidence.

    Returns:
      The number of the first such epoch, from 1, or None.  A pure function of the history, so a
      resumed training gets the same answer.

    Raises:
      ValueError: If an accuracy is not in [0, 1], or `images` or `margin` makes no sense.

    Example:
      >>> overfitting_epoch([(0.50, 0.30), (0.60, 0.40), (0.90, 0.02)], images=500)
      3
      >>> overfitting_epoch([(0.50, 0.30), (0.60, 0.40), (0.62, 0.35)], images=500) is None
      True

    References:
      Wong, Rice & Kolter, "Fast is better than free: Revisiting adversarial training", ICLR 2020
      (what it is); Andriushchenko & Flammarion, "Understanding and Improving Fast Adversarial
      Training", NeurIPS 2020 (why).  The half is this project's choice: both papers see PGD
      accuracy fall to about zero within an epoch.
    """
    _check(history, images, margin)
    # The first epoch has nothing to fall from.
    for epoch in range(2, len(history) + 1):
        one_step, pgd = history[epoch - 1]
        best_one_step, best_pgd = history[_best_epoch(history[: epoch - 1]) - 1]
        # Of a difference: variances add, and half of an accuracy has a quarter of its variance.
        room = margin * math.sqrt(_variance(pgd, images) + _variance(best_pgd, images) / 4)
        slack = margin * math.sqrt(_variance(one_step, images) + _variance(best_one_step, images))
        if pgd < best_pgd / 2 - room and one_step >= best_one_step - slack:
            return epoch
    return None


def overfitting_warning(history: History, epoch: int) -> str:
    """Says what happened at the epoch that `overfitting_epoch` found, and what to do.

    Args:
      history: As in `overfitting_epoch`.
      epoch: Its answer, from 2.

    Returns:
      Two sentences for a log or a report.

    Raises:
      ValueError: If the history has no such epoch, or none before it.

    Example:
      >>> print(overfitting_warning([(0.60, 0.40), (0.90, 0.02)], 2))
      catastrophic overfitting at epoch 2: accuracy under PGD fell from 40.0% (epoch 1) to 2.0%,
      while accuracy under the training's own one-step attack went from 60.0% to 90.0%. Take the
      weights of epoch 1, ...

    References:
      The advice: Wong, Rice & Kolter, ICLR 2020 (random start, step size, stopping early);
      Madry et al., ICLR 2018 (several steps).
    """
    if not 2 <= epoch <= len(history):
        raise ValueError(f"epoch must be in [2, {len(history)}], got {epoch}")
    best = _best_epoch(history[: epoch - 1])
    (one_before, pgd_before), (one_step, pgd) = history[best - 1], history[epoch - 1]
    return (
        f"catastrophic overfitting at epoch {epoch}: accuracy under PGD fell from "
        f"{pgd_before:.1%} (epoch {best}) to {pgd:.1%}, while accuracy under the training's own "
        f"one-step attack went from {one_before:.1%} to {one_step:.1%}. Take the weights of epoch "
        f"{best}, or train again with a random start, a smaller step size or epsilon, fewer "
        f"epochs, or an attack of several steps"
    )


def _best_epoch(history: History) -> int:
    """The first epoch, from 1, with the best accuracy under PGD."""
    accuracies = [pgd for _, pgd in history]
    return accuracies.index(max(accuracies)) + 1


def _variance(share: float, images: int) -> float:
    return share * (1 - share) / images


def _check(history: History, images: int, margin: float) -> None:
    if images < 1 or not 0 <= margin < math.inf:
        raise ValueError(
            f"images must be at least 1 and margin at least 0 and finite, got {images} and {margin}"
        )
    for epoch, pair in enumerate(history, start=1):
        if not all(0 <= share <= 1 for share in pair):
            raise ValueError(f"epoch {epoch}: accuracies must be in [0, 1], got {pair}")

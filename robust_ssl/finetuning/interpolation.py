"""The way back from the second stage's weights to the first's, as far as robustness needs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from robust_ssl.types import Variables

_SLACK = 1e-9  # 0.1 - 0.01 is a little more than 0.09


class CurvePoint(NamedTuple):
    """What validation says of one mixture."""

    alpha: float
    clean_accuracy: float
    robust_accuracy: float


class Guarded(NamedTuple):
    """The chosen mixture, and what it was chosen from."""

    alpha: float
    variables: Variables
    curve: list[CurvePoint]


def interpolate(a: Variables, b: Variables, alpha: jax.Array | float) -> Variables:
    r"""Mixes two trees of weights, batch statistics included.

    .. math:: (1 - \alpha)\, a + \alpha\, b

    `alpha` 0 is `a` and 1 is `b`, exactly; what is equal in both stays bit-equal for every `alpha`.

    Args:
      a: Variables.
      b: Variables of the same structure and shapes.
      alpha: Scalar.

    Returns:
      Variables of the same structure.

    Raises:
      ValueError: If the two trees differ in structure or shapes.

    Example:
      >>> interpolate({"params": jnp.zeros(2)}, {"params": jnp.ones(2)}, 0.25)["params"].tolist()
      [0.25, 0.25]
    """
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (a, b)]
    if shapes[0] != shapes[1]:
        raise ValueError("cannot interpolate: the two trees differ in structure or shapes")

    return _mixed(a, b, alpha)


@jax.jit  # one program, where leaf by leaf there would be four for each shape
def _mixed(a: Variables, b: Variables, alpha: jax.Array | float) -> Variables:
    def mix(x, y):
        # (1 - alpha) x + alpha x is not x in floats: frozen layers would drift.
        return jnp.where(x == y, x, ((1 - alpha) * x + alpha * y).astype(x.dtype))

    return jax.tree.map(mix, a, b)


def guard(
    stage1: Variables,
    stage2: Variables,
    evaluate: Callable[[Variables], tuple[float, float]],
    *,
    tolerance: float = 0.01,
    alphas: Sequence[float] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0),
) -> Guarded:
    """Goes back from stage 2 to stage 1 until the robust accuracy is near enough to stage 1's.

    Args:
      stage1: Weights whose robustness is to be kept.
      stage2: Weights that were fine-tuned from them on clean images.
      evaluate: Variables to (clean accuracy, robust accuracy) on **validation** data, shares.
      tolerance: Robust accuracy that may be lost against stage 1, a share.
      alphas: Mixtures to try, the largest first; 1 is stage 2, 0 stage 1, which is always tried.

    Returns:
      The largest alpha within the tolerance, its variables, and what was measured in descending
      alpha: all above it, itself, and 0, which always qualifies.

    Raises:
      ValueError: If the tolerance is negative or an alpha is outside [0, 1].

    Example:
      >>> here, there = {"params": jnp.zeros(())}, {"params": jnp.ones(())}
      >>> def evaluate(v): return 0.5 + v["params"] / 4, 0.5 - v["params"] / 10
      >>> guard(here, there, evaluate, tolerance=0.055).alpha
      0.5

    References:
      Zhu et al., "Improving Generalization of Adversarial Training via Robust Critical
      Fine-Tuning", ICCV 2023, the interpolation after fine-tuning.
    """
    if tolerance < 0 or not all(0 <= alpha <= 1 for alpha in alphas):
        raise ValueError(
            f"tolerance must be at least 0 and alphas in [0, 1], got {tolerance} and {alphas}"
        )

    def measured(alpha: float) -> CurvePoint:
        return CurvePoint(alpha, *map(float, evaluate(interpolate(stage1, stage2, alpha))))

    last = measured(0.0)  # stage 1 itself, which always qualifies
    lowest, curve = last.robust_accuracy - tolerance - _SLACK, []
    for alpha in sorted({float(alpha) for alpha in alphas} - {0.0}, reverse=True):
        curve.append(measured(alpha))
        if curve[-1].robust_accuracy >= lowest:
            chosen = curve[-1].alpha
            break
    else:
        chosen = last.alpha
    return Guarded(chosen, interpolate(stage1, stage2, chosen), [*curve, last])

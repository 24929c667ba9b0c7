"""Is the model one that gradient attacks can speak to at all?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
import numpy as np

from robust_ssl.evaluation.checks.result import Check, at_most
from robust_ssl.types import Model


@runtime_checkable
class Randomized(Protocol):
    """A model whose answer depends on a key: what a defence that draws noise looks like in JAX."""

    def with_key(self, key: jax.Array) -> Model:
        """Returns the same model with another key."""


def finite_logits(logits: np.ndarray, limit: float = 0.0) -> Check:
    """Measures the share of images with a logit that is no finite number.

    Example:
      >>> finite_logits(np.array([[0.0, np.inf], [0.0, 1.0]])).value
      0.5
    """
    share = float(np.mean(~np.isfinite(logits).all(axis=-1)))
    return at_most(
        "finite_logits",
        share,
        limit,
        meaning="NaN or infinite logits turn every loss and gradient into nothing.",
        advice="Look for overflow, a division by zero or broken weights. No figure of this model "
        "counts.",
    )


def deterministic(
    logits: np.ndarray,
    repeats: Sequence[np.ndarray],
    nearby: np.ndarray,
    limit: float = 1e-4,  # prototype; float32 in another order differs by about 1e-6
    nearby_limit: float = 1e-2,  # a change of 1e-6 in the pixels moved honest victims by 1e-5
) -> Check:
    """Measures the largest relative change of the logits where there should be none.

    Args:
      logits: Float ``[n, classes]``.
      repeats: The same images again: called twice, in another order, with another key.
      nearby: The images moved by 1e-6, which catches noise that is seeded by the image.
      limit: Largest change of a repeat, relative to the mean largest logit of an image.
      nearby_limit: The same for `nearby`; wider, since short floats round 1e-6 to a step.

    Example:
      >>> logits = np.array([[1.0, -1.0]])
      >>> deterministic(logits, [logits + 0.1], logits).status
      'failed'
    """
    scale = max(float(np.mean(np.max(np.abs(logits), axis=-1))), 1e-12)
    again = float(np.max([np.max(np.abs(other - logits)) for other in repeats])) / scale
    moved = float(np.max(np.abs(nearby - logits))) / scale
    # NaN is at most nothing: written this way round, a broken answer nearby is a jump.
    jumps = again <= limit and not moved <= nearby_limit
    value, held = (moved, nearby_limit) if jumps else (again, limit)
    return at_most(
        "deterministic",
        value,
        held,
        meaning="The same image gets different logits, so an attack chases noise and looks weak.",
        advice="Attack in expectation over the noise (attacks.autoattack.rand), and average the "
        "logits when scoring. In evaluation mode dropout and batch statistics must stand still.",
    )


def gives_logits(logits: np.ndarray, limit: float = 0.0, stabilizer: float = 1e-4) -> Check:
    """Measures the share of images whose outputs are probabilities.

    Args:
      logits: Float ``[n, classes]``.
      limit: Largest share; an honest image's logits sum to one by accident only.
      stabilizer: How near to one the sum of probabilities must be.

    Example:
      >>> gives_logits(np.array([[0.25, 0.75], [0.5, 0.5]])).status
      'failed'
    """
    logits = np.asarray(logits, np.float64)
    alike = (logits >= 0).all(axis=-1) & (np.abs(logits.sum(axis=-1) - 1) < stabilizer)
    # A softmax is in all outputs or in none: a few that sum to one do so by accident.
    share = float(np.mean(alike)) if alike.mean() > 0.5 else 0.0
    return at_most(
        "gives_logits",
        share,
        limit,
        meaning="The outputs are probabilities. A second softmax on them flattens every gradient.",
        advice="Return what goes into the softmax, and evaluate again.",
    )

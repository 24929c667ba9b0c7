"""What a perturbation crafted on one encoder does to classifiers built on others."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from robust_ssl.attacks.perturbation import UniversalPerturbation
from robust_ssl.evaluation.analysis.layers import as_value
from robust_ssl.evaluation.counts import Counts
from robust_ssl.evaluation.metrics import score
from robust_ssl.types import Model

RESIZING = ("refuse", "bilinear")


def transfer_matrix(
    perturbations: Mapping[str, UniversalPerturbation],
    classifiers: Mapping[str, Model],
    batches: Callable[[str], Iterable[Mapping[str, np.ndarray]]],
    *,
    key: jax.Array,
    parallel: Any,
    resize: str = "refuse",
) -> dict[str, dict[str, Counts]]:
    """Applies every perturbation to every classifier and counts what happens.

    Args:
      perturbations: By the name of the encoder each was crafted on.
      classifiers: By the name of their encoder, or any other.
      batches: Called with a classifier's name; yields its labelled images as
        `robust_ssl.evaluation.score` takes them.
      key: Random key of the scoring.
      parallel: A `robust_ssl.parallel.Parallel`.
      resize: What to do with a perturbation of another size than a classifier's images:
        ``"refuse"`` raises, ``"bilinear"`` resizes it inside its budget.

    Returns:
      ``{crafted on: {applied to: Counts}}``; a drop in accuracy is ``clean_accuracy -
      robust_accuracy`` of the counts.

    Raises:
      ValueError: If `resize` is not known, a perturbation has another size than the images and
        `resize` is ``"refuse"``, or there is nothing to score.

    References:
      Zhou et al., "Downstream-agnostic Adversarial Examples", ICCV 2023, Section 4 (transfer over
      pre-trained encoders).
    """
    if resize not in RESIZING:
        raise ValueError(f"resize must be one of {RESIZING}, got {resize!r}")
    found: dict[str, dict[str, Counts]] = {name: {} for name in perturbations}
    for applied_to, classifier in classifiers.items():
        iterator = iter(batches(applied_to))
        first = next(iterator, None)
        if first is None:
            raise ValueError(f"there are no images for the classifier {applied_to!r}")
        size = np.shape(first["images"])[1:3]
        fitting = {
            name: _at_size(perturbation, size, name, applied_to, resize)
            for name, perturbation in perturbations.items()
        }
        images = itertools.chain([first], iterator)
        results = score(as_value(classifier), images, fitting, key=key, parallel=parallel)
        for name in perturbations:
            found[name][applied_to] = results[name].counts
    return found


def _at_size(
    perturbation: UniversalPerturbation,
    size: tuple[int, int],
    name: str,
    applied_to: str,
    resize: str,
) -> UniversalPerturbation:
    # The name is static: left in, every perturbation would be compiled for itself.
    perturbation = perturbation.replace(name="transferred")
    own = perturbation.delta.shape[:2]
    if own == tuple(size):
        return perturbation
    if resize == "refuse":
        raise ValueError(
            f"the perturbation crafted on {name!r} has size {own}, the images of {applied_to!r} "
            f'have size {tuple(size)}; resize="bilinear" resizes perturbations'
        )
    return perturbation.resized(tuple(size))

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

    Perturbations are by the name of the encoder each was crafted on.  `batches` is called with a
    classifier's name and yields its labelled images, as for `robust_ssl.evaluation.score`.  Where
    they have another size, ``resize="bilinear"`` resizes the perturbation inside its budget.

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
    counts: dict[str, dict[str, Counts]] = {name: {} for name in perturbations}
    for applied_to, classifier in classifiers.items():
        iterator = iter(batches(applied_to))
        # The first batch is looked at for its size and put back: batches may be read only once.
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
            counts[name][applied_to] = results[name].counts
    return counts


def _at_size(perturbation: UniversalPerturbation, size, name: str, applied_to: str, resize: str):
    # The name is static: left in, every perturbation would be compiled for itself.
    perturbation = perturbation.replace(name="transferred")
    fitted_size = perturbation.delta.shape[:2]
    if fitted_size == tuple(size):
        return perturbation
    if resize == "refuse":
        raise ValueError(
            f"the perturbation crafted on {name!r} has size {fitted_size}, the images of "
            f'{applied_to!r} have size {tuple(size)}; resize="bilinear" resizes perturbations'
        )
    return perturbation.resized(tuple(size))

"""Which frequencies of a perturbation do the work: its effect when some are taken away."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import frequencies
from robust_ssl.attacks.perturbation import UniversalPerturbation
from robust_ssl.evaluation.analysis.layers import as_value
from robust_ssl.evaluation.counts import Counts
from robust_ssl.evaluation.metrics import score
from robust_ssl.types import Model

FILTERS = {"low_pass": frequencies.low_pass, "high_pass": frequencies.high_pass}


def filtered(
    perturbation: UniversalPerturbation,
    name: str,
    cutoff: float,
    *,
    rescale: bool = False,
) -> UniversalPerturbation:
    """Returns what a filter leaves of a perturbation.

    Args:
      perturbation: Under a threat with a norm: `threats.Linf`, `threats.L2`, a `threats.Band`.
      name: ``"low_pass"`` keeps the frequencies below `cutoff`, ``"high_pass"`` the others.
      cutoff: Cycles per pixel.
      rescale: Brings what is left to the size the whole had, in the norm of its threat, so that
        frequencies are compared at equal size; False leaves it as it is, so that one sees what
        removing the others takes away.

    Returns:
      The perturbation under the same threat; where nothing is left, zero.

    Raises:
      ValueError: If the filter is not known or the perturbation is not one of a whole image.

    Example:
      >>> from robust_ssl import threats
      >>> attack = UniversalPerturbation(jnp.full((8, 8, 3), 0.1), threats.Linf(0.1))
      >>> float(jnp.abs(filtered(attack, "high_pass", 0.1).delta).max()) < 1e-6
      True
    """
    if name not in FILTERS:
        raise ValueError(f"filter must be one of {sorted(FILTERS)}, got {name!r}")
    threat = perturbation.threat
    if not hasattr(threat, "norm"):
        raise ValueError(
            "only a perturbation that is added to the whole image can be filtered, one under a "
            f"threat with a norm such as Linf; got {type(threat).__name__}"
        )
    rest = FILTERS[name](perturbation.delta, cutoff=cutoff)
    if rescale:
        whole, left = threat.norm(perturbation.delta), threat.norm(rest)
        # What rounding leaves of nothing is not blown up to the budget.
        rest = rest * jnp.where(left > 1e-4 * whole, whole / jnp.maximum(left, 1e-30), 0.0)
    return perturbation.replace(delta=rest)


def _inside_budget(perturbation: UniversalPerturbation) -> UniversalPerturbation:
    """Shrinks what a filter has made larger: cut off at the budget, frequencies would come back."""
    threat = perturbation.threat
    size = threat.norm(perturbation.delta)
    share = jnp.minimum(1.0, threat.epsilon / jnp.maximum(size, 1e-30))
    return perturbation.replace(delta=share * perturbation.delta)


def filtering_curves(
    classifier: Model,
    batches: Iterable[Mapping[str, np.ndarray]],
    perturbation: UniversalPerturbation,
    cutoffs: Sequence[float],
    *,
    key: jax.Array,
    parallel: Any,
    rescale: bool = False,
) -> dict[str, dict[float, Counts]]:
    """Counts what low-pass and high-pass filtered versions of a perturbation do to a classifier.

    The batches are those of `robust_ssl.evaluation.score`, the cutoffs cycles per pixel.  What a
    filter leaves larger than the budget, as a high-pass does at edges, is made smaller as a whole.

    Returns:
      ``{"low_pass": {cutoff: Counts}, "high_pass": {cutoff: Counts}, "whole": {0.0: Counts}}``,
      the last for the unfiltered perturbation.

    Raises:
      ValueError: As `filtered` and `robust_ssl.evaluation.score`, or without cutoffs.
    """
    if not cutoffs:
        raise ValueError("name at least one cutoff, in cycles per pixel")
    places = [("whole", 0.0), *((name, float(cutoff)) for name in FILTERS for cutoff in cutoffs)]
    attacks = {}
    for name, cutoff in places:
        rest = perturbation
        if name != "whole":
            rest = _inside_budget(filtered(perturbation, name, cutoff, rescale=rescale))
        attacks[f"{name} {cutoff}"] = rest
    # In one call: they have one structure, so one compiled function serves all cutoffs.
    results = score(as_value(classifier), batches, attacks, key=key, parallel=parallel)
    curves: dict[str, dict[float, Counts]] = {}
    for name, cutoff in places:
        curves.setdefault(name, {})[cutoff] = results[f"{name} {cutoff}"].counts
    return curves

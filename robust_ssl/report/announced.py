"""Claims that were announced before the runs: tested together, on images that nobody looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from robust_ssl.evaluation.repeated import advantage, holm

Right = Mapping[int, np.ndarray]  # by seed, bool [n]
LEVEL = 0.05


def sentences(
    claims: Sequence[Mapping[str, Any]],
    right: Mapping[tuple[str, str], Right],
    unseen: Mapping[tuple[str, int], np.ndarray],
    places: Mapping[str, str],
) -> list[str]:
    """Judges claims ``{"more": a, "than": b, "by": share}`` together, one sentence each.

    Args:
      claims: With ``margin``, what `a` may be behind (0), and ``seen``, how many test images were
        looked at before (0).
      right: Which images were right, by recipe and share, then by seed.
      unseen: Which of a share's images count, bool ``[n]``, by share and ``seen``.
      places: How the sentence names a share.

    Returns:
      In the order of the claims; p-values are Holm's over all of them that can be judged.
    """
    measured = [_measure(claim, right, unseen) for claim in claims]
    judged = [one for one in measured if one is not None]
    adjusted = iter(holm([one[0].p for one in judged]))
    return [
        _sentence(claim, one, places, next(adjusted) if one else 1.0, len(judged))
        for claim, one in zip(claims, measured, strict=True)
    ]


def _measure(claim: Mapping[str, Any], right: Any, unseen: Any) -> Any:
    """Returns the advantage with its numbers of seeds and images; None where it has none."""
    first, second = (right.get((claim[e], claim["by"]), {}) for e in ("more", "than"))
    seeds = [seed for seed in first if seed in second]
    if not seeds:
        return None
    keep = unseen[claim["by"], claim.get("seen", 0)]
    if keep.sum() < 2:
        return None
    pair = (np.stack([of[seed][keep] for seed in seeds]) for of in (first, second))
    return advantage(*pair, margin=claim.get("margin", 0.0)), len(seeds), int(keep.sum())


def _sentence(claim, measured, places: Mapping[str, str], p: float, together: int) -> str:
    margin = claim.get("margin", 0.0)
    words = f"at most {100 * margin:g} points less" if margin else "more"
    subject = f"{claim['more']} has {words} than {claim['than']} {places[claim['by']]}"
    if measured is None:
        return f"{subject}: cannot be judged, it was not measured."
    found, seeds, images = measured
    mean, low, high = (f"{100 * share:+.1f}" for share in found[:3])
    # Of one seed nothing is known of how far another one would be from it.
    holds = "holds" if seeds > 1 else "holds for this one seed, which says nothing of others"
    verdict = holds if p <= LEVEL else "is not shown"
    return (
        f"{subject}: {verdict}. Measured: {mean} points ({low} to {high}), "
        f"one-sided p = {p:.2g} after Holm over {together}; seeds: {seeds}, images: {images}."
    )

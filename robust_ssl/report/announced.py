"""Claims that were announced before the runs: tested together, on images that nobody looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from robust_ssl.evaluation.repeated import advantage, holm

Right = Mapping[int, np.ndarray]  # by seed, bool [n]
LEVEL = 0.05


class Judged(NamedTuple):
    """What became of a claim.

    Attributes:
      sentence: For people.
      measured: ``difference``, ``low``, ``high`` (95 %, shares), the one-sided ``p`` and ``p_holm``
        over the claims of this comparison, ``seeds`` and ``images``; None where it has none.
    """

    sentence: str
    measured: dict[str, Any] | None


def judge(
    claims: Sequence[Mapping[str, Any]],
    right: Mapping[tuple[str, str], Right],
    unseen: Mapping[tuple[str, int], np.ndarray],
    places: Mapping[str, str],
) -> list[Judged]:
    """Judges claims ``{"more": a, "than": b, "by": share}`` together.

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
    judged = [one for one in measured if not isinstance(one, str)]
    adjusted = iter(holm([one[0].p for one in judged]))
    found = []
    for claim, one in zip(claims, measured, strict=True):
        p, numbers = 1.0, None
        if not isinstance(one, str):
            p = next(adjusted)
            (mean, low, high, alone), seeds, images = one
            numbers = {"difference": mean, "low": low, "high": high, "p": alone, "p_holm": p}
            numbers |= {"seeds": seeds, "images": images}
        found.append(Judged(_sentence(claim, one, places, p, len(judged)), numbers))
    return found


def on_every_set(comparisons: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], float]]:
    r"""Returns the claims that several sets have judged, each with its p-value over all of them.

    A claim that is made of every set is shown where it is shown on the worst one: its p-value is
    the largest.  Holm's procedure is then over the claims:

    .. math:: p_i = \mathrm{Holm}\bigl(\max_s p_{i,s}\bigr)

    Holm on each set, and the largest of that, is smaller and keeps no level over the claims.

    Args:
      comparisons: The ``comparison`` of each set's ``results.json``.

    Raises:
      ValueError: If the sets have judged different claims, or one was not measured on a set.

    Example:
      >>> def judged(*p):
      ...     shares = zip(("clean", "robust_public"), p)
      ...     claims = [{"more": "a", "than": "b", "by": by} for by, _ in shares]
      ...     return {"claims": [{"claim": c, "measured": {"p": q}} for c, q in zip(claims, p)]}
      >>> [round(p, 3) for _, p in on_every_set([judged(0.01, 0.001), judged(0.002, 0.02)])]
      [0.02, 0.02]

    References:
      Berger, "Multiparameter Hypothesis Testing and Acceptance Sampling", Technometrics 1982 (the
      largest p-value, the intersection-union test); Holm 1979.
    """
    by_set = [
        [one for one in comparison["claims"] if "more" in one["claim"]]
        for comparison in comparisons
    ]
    names = [[_alike(one["claim"]) for one in judged] for judged in by_set]
    if not names or not names[0] or any(some != names[0] for some in names):
        raise ValueError("every set needs the same claims, in the same order, and one at least")
    if any("measured" not in one for judged in by_set for one in judged):
        raise ValueError(
            "a claim was not measured on every set; where its comparison is older than "
            "`measured`, run the stage compare again"
        )
    largest = [max(one["measured"]["p"] for one in of) for of in zip(*by_set, strict=True)]
    return list(zip(names[0], holm(largest), strict=True))


def _alike(claim: Mapping[str, Any]) -> dict[str, Any]:
    """The claim, without what differs by set: how many images were seen."""
    return {entry: value for entry, value in claim.items() if entry != "seen"}


def _measure(claim: Mapping[str, Any], right: Any, unseen: Any) -> Any:
    """Returns the advantage with its numbers of seeds and images, or why there is none."""
    first, second = (right.get((claim[e], claim["by"]), {}) for e in ("more", "than"))
    if not first or not second:
        return "it was not measured"
    seeds = [seed for seed in first if seed in second]
    if not seeds:
        return "the two share no seed"
    keep = unseen[claim["by"], claim.get("seen", 0)]
    if keep.sum() < 2:
        return f"it takes two test images, and {keep.sum()} counts"
    pair = (np.stack([of[seed][keep] for seed in seeds]) for of in (first, second))
    return advantage(*pair, margin=claim.get("margin", 0.0)), len(seeds), int(keep.sum())


def _sentence(claim, measured, places: Mapping[str, str], p: float, together: int) -> str:
    margin = claim.get("margin", 0.0)
    words = f"at most {100 * margin:g} points less" if margin else "more"
    subject = f"{claim['more']} has {words} than {claim['than']} {places[claim['by']]}"
    if isinstance(measured, str):
        return f"{subject}: cannot be judged, {measured}."
    found, seeds, images = measured
    mean, low, high = (f"{100 * share:+.1f}" for share in found[:3])
    # Of one seed nothing is known of how far another one would be from it.
    holds = "holds" if seeds > 1 else "holds for this one seed, which says nothing of others"
    verdict = holds if p <= LEVEL else "is not shown"
    return (
        f"{subject}: {verdict}. Measured: {mean} points ({low} to {high}), "
        f"one-sided p = {p:.2g} after Holm over {together}; seeds: {seeds}, images: {images}."
    )

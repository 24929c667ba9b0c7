"""Does a detector still help where the attacker knows it?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from robust_ssl.screening.statistics import share

DEFEATED, WITHSTANDS, UNDECIDED = "defeated", "withstands", "not decidable"
NOT_TRIED = "not tried"
LEFT = 0.5  # share of the plain attack's success above which a detector is defeated
FEWEST = 10  # successes of the plain attack, below which there is nothing to detect


def judge(
    right: np.ndarray, plain_wrong: np.ndarray, adaptive_wrong: np.ndarray, passed: np.ndarray
) -> dict[str, Any]:
    """Judges a detector by what an adaptive attack still reaches past it.

    Args:
      right: Images that are classified correctly when nobody attacks, bool ``[n]``.
      plain_wrong: Wrong under the attack that does not know the detector, bool ``[n]``.
      adaptive_wrong: Wrong under the one that does, bool ``[n]``.
      passed: No alarm at 5 % false alarms under the adaptive attack, bool ``[n]``.

    Returns:
      ``plain_success``, ``undetected_success`` (wrong and no alarm), shares of the right images,
      and ``verdict``: defeated if the second is at least half of the first, withstands if the upper
      end of its interval is below that half, else not decidable.

    Example:
      >>> yes, no = np.ones(100, bool), np.zeros(100, bool)
      >>> [judge(yes, yes, yes, passed)["verdict"] for passed in (yes, no)]
      ['defeated', 'withstands']
    """
    plain = share(plain_wrong[right])
    undetected = share((adaptive_wrong & passed)[right])
    limit = LEFT * plain["share"]
    if plain["share"] * plain["n"] < FEWEST:
        verdict = UNDECIDED
    elif undetected["share"] >= limit:
        verdict = DEFEATED
    else:
        verdict = WITHSTANDS if undetected["ci95"][1] < limit else UNDECIDED
    return {"plain_success": plain, "undetected_success": undetected, "verdict": verdict}


def overall(adaptive: list[Mapping[str, Any]]) -> str:
    """Returns one verdict of several attacks: the worst; "not tried" of none."""
    verdicts = {entry["verdict"] for entry in adaptive}
    order = (DEFEATED, UNDECIDED, WITHSTANDS)
    return next((verdict for verdict in order if verdict in verdicts), NOT_TRIED)

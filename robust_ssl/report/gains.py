"""Which share of one recipe's gain others have: a ratio of two gains, with Fieller's interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from robust_ssl.evaluation.checks.result import NOT_BELIEVABLE
from robust_ssl.evaluation.repeated import Advantage, advantage, gain_ratio
from robust_ssl.report.comparison import Summary
from robust_ssl.report.tables import MARK, label

Right = Mapping[int, np.ndarray]  # by seed, bool [n]


class GainShare(NamedTuple):
    """Which share of a gain a recipe has.

    Attributes:
      ratio: The share; 1 is the whole gain, and a recipe may have more.
      low: Lower end of the 95 % interval.
      high: Its upper end.
      seeds: How many seeds all three recipes have.
    """

    ratio: float
    low: float
    high: float
    seeds: int


class Gains(NamedTuple):
    """What others have of a gain.

    Attributes:
      whole: The gain itself, over seeds and images; None where it was not measured.
      images: How many test images count.
      shares: By recipe; none at all where the gain is not beyond chance.
      beyond_chance: Whether the gain is.
    """

    whole: Advantage | None
    images: int
    shares: Mapping[str, GainShare]
    beyond_chance: bool = False


def gain_shares(
    claim: Mapping[str, Any],
    right: Mapping[tuple[str, str], Right],
    unseen: Mapping[tuple[str, int], np.ndarray],
) -> Gains:
    r"""Measures which share of a gain each recipe has, for ``{"reach": ..., "of": l, "over": b}``.

    .. math:: \frac{\bar a - \bar b}{\bar l - \bar b}

    Seeds and images are those that the recipes share, so a ratio may rest on fewer seeds than the
    tables' means.

    Args:
      claim: ``by`` is the share that counts, both suites if not given; ``seen`` is how many test
        images were looked at before.
      right: Which images were right, by recipe and share, then by seed.
      unseen: Which of a share's images count, bool ``[n]``, by share and ``seen``.

    Example:
      >>> base, half, whole = np.zeros(8, bool), np.arange(8) % 2 == 0, np.ones(8, bool)
      >>> right = {("b", "clean"): {0: base}, ("a", "clean"): {0: half}, ("l", "clean"): {0: whole}}
      >>> found = gain_shares({"of": "l", "over": "b", "by": "clean"}, right, {("clean", 0): whole})
      >>> round(found.shares["a"].ratio, 3)
      0.5

    References:
      Fieller, "Some Problems in Interval Estimation", J. R. Statist. Soc. B 16, 1954.
    """
    by = claim.get("by", "robust_worst")
    keep = unseen[by, claim.get("seen", 0)]
    leader, base = (right.get((claim[entry], by), {}) for entry in ("of", "over"))
    images = int(keep.sum())
    _, both = _shared(keep, leader, base)
    if both is None:
        return Gains(None, images, {})
    whole, beyond_chance = advantage(*both), gain_ratio(both[0], both[1], both[0])
    if beyond_chance is None:  # any share would do, even where fewer seeds would name one
        return Gains(whole, images, {})
    shares = {}
    for recipe, share in right:
        if share != by or recipe in (claim["of"], claim["over"]):
            continue
        seeds, three = _shared(keep, right[recipe, by], base, leader)
        measured = None if three is None else gain_ratio(*three)
        if measured is not None:
            shares[recipe] = GainShare(*measured, seeds)
    return Gains(whole, images, shares, beyond_chance=True)


def _shared(keep: np.ndarray, *recipes: Right) -> tuple[int, list[np.ndarray] | None]:
    """The outcomes that recipes share, bool ``[seeds, images]`` each, and of how many seeds."""
    seeds = [seed for seed in recipes[0] if all(seed in other for other in recipes)]
    if not seeds or keep.sum() < 2:
        return 0, None
    return len(seeds), [np.stack([each[seed][keep] for seed in seeds]) for each in recipes]


def share_rows(gains: Gains, summary: Summary) -> list[dict[str, Any]]:
    """Returns shares of a gain as the results document has them, the largest first."""
    rows = []
    for recipe, share in sorted(gains.shares.items(), key=lambda item: -item[1].ratio):
        part = summary[recipe]
        row = {"recipe": recipe, "share": share.ratio, "low": share.low, "high": share.high}
        row |= {"seeds": share.seeds, "images": gains.images}
        rows.append({**row, "cost": part["cost_factor"].mean, "verdict": part["verdict"]})
    return rows


def share_table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Returns the same for people: heading to text, in per cent.

    Example:
      >>> share_table([{"recipe": "a", "share": 0.95, "low": 0.8, "high": 1.1, "seeds": 3,
      ...               "images": 990, "cost": None, "verdict": "believable"}])
      [{'recipe': 'a', 'share': '95 %', '95 % interval': '80 to 110', 'cost': 'n/a', 'seeds': '3'}]
    """
    table = []
    for row in rows:
        mark = f" {MARK}" if row["verdict"] == NOT_BELIEVABLE else ""
        shown = {"recipe": label(row["recipe"]), "share": f"{100 * row['share']:.0f} %{mark}"}
        shown["95 % interval"] = f"{100 * row['low']:.0f} to {100 * row['high']:.0f}"
        shown["cost"] = f"{row['cost']:.2f}x" if row["cost"] else "n/a"
        table.append({**shown, "seeds": str(row["seeds"])})
    return table

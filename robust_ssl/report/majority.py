"""The largest class of an imbalanced test split: what one answer for all images is right about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

# Below a fifth nobody takes one answer for a good model; even classes differ by some images.
LEAST, OVER_EVEN = 0.2, 1.2


class Largest(NamedTuple):
    """A class, how many test images are of it, and how many there are."""

    name: str
    images: int
    n: int


def largest_class(document: Mapping[str, Any]) -> Largest | None:
    """Returns the largest class of the test split of ``results.json``; None if it is balanced.

    Example:
      >>> counts = {"largest_class": {"name": "good", "images": 190}, "classes": 2, "test": 200}
      >>> largest_class({"run": {"downstream": counts}})
      Largest(name='good', images=190, n=200)
    """
    downstream = document["run"]["downstream"]
    if "largest_class" not in downstream:  # of an older version
        return None
    largest = Largest(
        *(downstream["largest_class"][k] for k in ("name", "images")), downstream["test"]
    )
    least = max(LEAST, OVER_EVEN / downstream["classes"])
    return largest if largest.images >= least * largest.n else None


def sentences(document: Mapping[str, Any], shown: Mapping[str, str]) -> str:
    """Returns what the line of the largest class means, and each model's accuracy without its help.

    Nothing is said of a balanced set.

    Args:
      document: ``results.json``.
      shown: What each model is called.
    """
    if (largest := largest_class(document)) is None:
        return ""
    said = f"Always {largest.name!r}, the majority class: one answer for all images."
    balanced = document["run"].get("balanced_accuracy") or {}
    parts = [f"{shown[model]} {100 * share:.1f} %" for model, share in balanced.items()]
    if not parts:
        return said
    even = 100 / document["run"]["downstream"]["classes"]
    return (
        f"{said} Balanced clean accuracy, the mean over classes, where one answer has "
        f"{even:.1f} %: {', '.join(parts)}."
    )

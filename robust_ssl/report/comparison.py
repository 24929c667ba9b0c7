"""What a comparison knows of each recipe: its means over seeds, and which differences are real."""

from __future__ import annotations

import math
import numbers
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from robust_ssl.evaluation import difference, wilson_interval
from robust_ssl.evaluation.checks import result
from robust_ssl.evaluation.checks.result import NOT_BELIEVABLE
from robust_ssl.evaluation.repeated import half_width_over_seeds

# From best to worst.
VERDICTS = (result.BELIEVABLE, result.WITH_NOTES, result.NOT_EXAMINED, NOT_BELIEVABLE)

Row = Mapping[str, Any]
Summary = Mapping[str, Mapping[str, Any]]  # by recipe: see `summarize`
Outcomes = Mapping[str, Mapping[str, np.ndarray]]  # by recipe and share: see `summarize`


class Column(NamedTuple):
    """How a share or a cost is shown: a value times `scale`, and the unit behind it."""

    heading: str
    meaning: str
    scale: float = 100
    decimals: int = 1
    unit: str = " %"


SHARES = {
    "clean": Column("clean", "accuracy without an attack"),
    "robust_public": Column("public suite", "accuracy under attacks crafted on the public encoder"),
    "robust_hardened": Column(
        "hardened suite", "accuracy under the attacks crafted again on the model itself"
    ),
    "robust_worst": Column("both suites", "accuracy under the attacks of both suites"),
    "robust_twin": Column(
        "twin", "accuracy under the attacks crafted on the same recipe's encoder of another seed"
    ),
    "robust_half": Column(
        "half twin", "the same, where the attacker's encoder had half of the training images"
    ),
    "robust_labelled": Column(
        "with labels", "accuracy under one perturbation that was fitted with head and labels"
    ),
    "autoattack": Column("AutoAttack", "accuracy under AutoAttack"),
}
_REFERENCE = "relative to the reference"
_GRADIENTS = "gradient evaluations per training image"
_TRAINING = "seconds from start to end, with compiling and validation"
_COST = f"training time with all that a recipe starts from, {_REFERENCE}"
COSTS = {
    "cost_factor": Column("cost", _COST, 1, 2, "x"),
    "gradients": Column("gradients", f"{_GRADIENTS}, {_REFERENCE}'s epochs", 1, 1, ""),
    "gradients_per_epoch": Column("gradients/epoch", f"{_GRADIENTS} in one epoch", 1, 1, ""),
    "seconds_per_image": Column("ms/image", "milliseconds per training image", 1000, 2, ""),
    "training_seconds": Column("training", _TRAINING, 1, 1, " s"),
    "peak_bytes": Column("memory", "what the compiled step plans on one device", 2**-20, 0, " MiB"),
}
COLUMNS = SHARES | COSTS
FIELDS = ("recipe", "seed", "verdict", *SHARES, "images", "autoattack_images", *COSTS)
LATER = dict.fromkeys(("robust_twin", "robust_half", "robust_labelled"))  # not in rows of before
OPTIONAL = {"autoattack", "autoattack_images", "cost_factor", *LATER}
OPTIONAL |= {"gradients_per_epoch", "seconds_per_image", "peak_bytes"}


class Estimate(NamedTuple):
    """A share or a cost over the n seeds for which it was measured.

    The mean is None for no seed, the sample standard deviation for fewer than two.
    """

    mean: float | None
    deviation: float | None
    n: int


def summarize(rows: Sequence[Row], right: Outcomes | None = None) -> dict[str, dict[str, Any]]:
    """Gathers the rows of each recipe over its seeds.

    Args:
      rows: One for each recipe and seed, with the entries `FIELDS`: shares in [0, 1], the number
        of test images and of AutoAttack's, costs, and the verdict; what was not measured is None.
      right: By recipe and share (a name in `SHARES`), in what part of the seeds each test image
        was right, float ``[n]``; then recipes are compared image by image.

    Returns:
      By recipe, in order of first appearance: an `Estimate` for each share and cost, ``seeds``,
      how many there are, ``images`` and ``autoattack_images``, the fewest over the seeds,
      ``verdict``, the worst over the seeds, and ``right``, its part of `right`.

    Raises:
      ValueError: As `check_rows`, or if the images say another share than the rows.

    Example:
      >>> row = {"recipe": "baseline", "seed": 0, "verdict": "believable", "clean": 0.5,
      ...        "images": 100, "robust_public": 0.25, "robust_hardened": 0.0,
      ...        "robust_worst": 0.0, "autoattack": None, "autoattack_images": None,
      ...        "training_seconds": 8.0, "cost_factor": 1.0, "gradients": 1.0,
      ...        "gradients_per_epoch": 1.0, "seconds_per_image": 0.001, "peak_bytes": None}
      >>> summary = summarize([row, {**row, "seed": 1, "clean": 1.0, "verdict": "not believable"}])
      >>> baseline = summary["baseline"]
      >>> baseline["clean"].mean, baseline["clean"].n, baseline["verdict"]
      (0.75, 2, 'not believable')
    """
    rows = [{**LATER, **row} for row in rows]
    check_rows(rows)
    by_recipe: dict[str, list[Row]] = {}
    for row in rows:
        by_recipe.setdefault(row["recipe"], []).append(row)
    summary = {}
    for recipe, seeds in by_recipe.items():
        part: dict[str, Any] = {name: _over_seeds([row[name] for row in seeds]) for name in COLUMNS}
        for name in ("images", "autoattack_images"):
            part[name] = min((row[name] for row in seeds if row[name]), default=None)
        part["seeds"], part["right"] = len(seeds), (right or {}).get(recipe, {})
        part["verdict"] = max((row["verdict"] for row in seeds), key=VERDICTS.index)
        for by, outcomes in part["right"].items():
            mean, share = part[by].mean, float(np.mean(outcomes))
            if abs(share - (mean or 0)) > 1e-6:
                raise ValueError(f"{recipe}: {by} is {mean} by the rows and {share} by image")
        summary[recipe] = part
    return summary


def _over_seeds(values: Sequence[float | None]) -> Estimate:
    known = [float(value) for value in values if value is not None]
    mean = statistics.fmean(known) if known else None
    return Estimate(mean, statistics.stdev(known) if len(known) > 1 else None, len(known))


def check_rows(rows: Sequence[Row]) -> None:
    """Raises ValueError, naming the row, unless the rows are as `summarize` takes them."""
    if not rows:
        raise ValueError("there is nothing to compare: no recipe has a row")
    places = set()
    for row in rows:
        where = f"the row of {row.get('recipe')!r}, seed {row.get('seed')}"
        missing, unknown = sorted({*FIELDS} - {*row} - {*LATER}), sorted({*row} - {*FIELDS})
        if missing or unknown:
            raise ValueError(f"{where}: missing fields {missing}, unknown fields {unknown}")
        if not isinstance(row["recipe"], str) or not isinstance(row["seed"], int):
            raise ValueError(f"{where}: recipe is a name and seed a whole number")
        if (row["recipe"], row["seed"]) in places:
            raise ValueError(f"{where} is there twice; a recipe has one row for each seed")
        places.add((row["recipe"], row["seed"]))
        if row["verdict"] not in VERDICTS:
            raise ValueError(f"{where}: {row['verdict']!r} is no verdict; known: {VERDICTS}")
        for name in (*COLUMNS, "images", "autoattack_images"):
            _check_number(where, name, row.get(name))
        if (row["autoattack"] is None) != (row["autoattack_images"] is None):
            raise ValueError(f"{where}: autoattack and autoattack_images go together")


def _check_number(where: str, name: str, value: float | None) -> None:
    if value is None:
        if name not in OPTIONAL:
            raise ValueError(f"{where}: {name} was not measured; it must be")
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{where}: {name} is {value!r}, which is no number")
    low = 1 if name in ("images", "autoattack_images") else 0
    high = 1 if name in SHARES else math.inf
    if not (math.isfinite(value) and low <= value <= high):
        limits = f"in [{low}, {high}]" if high == 1 else f"finite and at least {low}"
        raise ValueError(f"{where}: {name} is {value}; it must be {limits}")


def decided(part: Mapping[str, Any], other: Mapping[str, Any], by: str) -> bool:
    """Whether two recipes' parts of a summary differ in a share by more than chance.

    Where the outcome on each image is known, the difference must be more than what `differ` says
    chance may do.  Else their two intervals must not overlap, which asks for more.
    """
    known = differ(part, other, by)
    if known is not None:
        return abs(known[0]) > known[1]
    a, b = interval(part, by), interval(other, by)
    return a[1] < b[0] or b[1] < a[0]


def differ(
    part: Mapping[str, Any], other: Mapping[str, Any], by: str
) -> tuple[float, float] | None:
    """Returns by how much a recipe exceeds another, and what chance may do; None where not known.

    That is the larger of two 95 % half-widths: over the images, which are the same for both, and
    over the seeds.
    """
    first, second = (each["right"].get(by) for each in (part, other))
    if first is None or second is None or len(first) != len(second):
        return None
    # The same images: McNemar's test sees a difference of 3 points in 1,000 images where the two
    # intervals, each of one recipe alone, still overlap.
    value, half = difference(first, second)
    return value, max(half, half_width_over_seeds(*(each[by][1:] for each in (part, other))))


def interval(part: Mapping[str, Any], by: str) -> tuple[float, float]:
    """Returns what is known of a share: its 95 % interval over images, and its deviation."""
    mean, deviation, _ = part[by]
    # Of one mean over the seeds: they share their images, so more seeds do not narrow it.
    images = part["autoattack_images" if by == "autoattack" else "images"]
    low, high = wilson_interval(round(mean * images), images)
    return min(low, mean - (deviation or 0)), max(high, mean + (deviation or 0))


def differences(summary: Summary, leader: str) -> list[dict[str, str]]:
    """Returns how every recipe differs from one of them, where it is known image by image.

    A line for each recipe and share; ``decided`` says whether that is more than chance.
    """
    lines = []
    for recipe, part in summary.items():
        marked = NOT_BELIEVABLE in (part["verdict"], summary[leader]["verdict"])
        for by in SHARES:
            known = differ(part, summary[leader], by) if recipe != leader else None
            if known is None:
                continue
            value, half = known
            line = {"recipe": recipe, "share": by}
            line |= {"difference": f"{value:.6f}", "half_width": f"{half:.6f}"}
            line["decided"] = "yes" if abs(value) > half else "no"
            line["verdict"] = NOT_BELIEVABLE if marked and by != "clean" else ""
            lines.append(line)
    return lines

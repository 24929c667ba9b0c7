"""Claims on recipes, plain data of a config, held against what a comparison has measured.

``{"order": ("a", "b"), "of": "Someone"}``: each is more robust than the one before.
``{"reach": 0.9, "of": "a", "over": "b", "within": 1.5}``: which recipes have that part of a's gain
over b at no more than that cost.  ``{"better_than": "a"}``: which are better in every share.
``{"more": "a", "than": "b", "by": "clean"}``: a test, with those of all such claims (Holm).
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from robust_ssl.evaluation.checks.result import NOT_BELIEVABLE
from robust_ssl.report.comparison import SHARES, Summary, decided
from robust_ssl.report.gains import Gains, GainShare
from robust_ssl.report.tables import MARK, percent

Claim = Mapping[str, Any]

ENTRIES = {  # by the entry that names the kind: the entries it needs, and those it may have
    "order": (("order",), ("of", "by")),
    "reach": (("reach", "of", "over", "within"), ("by", "seen")),
    "better_than": (("better_than",), ()),
    "more": (("more", "than", "by"), ("margin", "seen")),  # judged together: `report.announced`
}
PLACES = {
    "clean": "without an attack",
    "robust_public": "under the public suite",
    "robust_hardened": "under the hardened suite",
    "robust_worst": "under both suites",
    "robust_twin": "under attacks crafted on a twin",
    "robust_half": "under attacks crafted on a twin of half of the images",
    "robust_labelled": "under a universal attack that knows head and labels",
    "autoattack": "under AutoAttack",
}
NUMBERS = {  # entries that are numbers: what each must be, and whether a number is
    "reach": ("above 0 and at most 1", lambda number: 0 < number <= 1),
    "within": ("finite and above 0", lambda number: 0 < number < math.inf),
    "margin": ("a share, at least 0 and below 1", lambda number: 0 <= number < 1),
    "seen": (
        "a whole number of at least 0",
        lambda number: isinstance(number, int) and number >= 0,
    ),
}
SLACK = 1e-9  # 0.6 - 0.1 is a little less than 0.5


def check_claim(claim: Claim, recipes: Iterable[str]) -> None:
    """Raises unless a claim can be judged on the recipes that are compared.

    ``"by"`` is the share that counts, both suites if not given.

    Raises:
      ValueError: If an entry is unknown (with near names), missing or out of range, or a recipe
        is not compared.

    Example:
      >>> check_claim({"better_than": "gen_af"}, ["baseline", "gen_af"])
    """
    kind = _kind(claim)
    needed, optional = ENTRIES[kind]
    for entry in claim:
        if entry not in (*needed, *optional):
            raise ValueError(f"unknown entry {entry!r} in {claim}{_near(entry, needed + optional)}")
    missing = [entry for entry in needed if entry not in claim]
    if missing:
        raise ValueError(f"{claim} has no {', '.join(map(repr, missing))}")
    if claim.get("by", "clean") not in SHARES:
        raise ValueError(f"by={claim['by']!r} in {claim} is no share; known: {', '.join(SHARES)}")
    for entry, (limits, fits) in NUMBERS.items():
        if entry in claim and not (_is_number(claim[entry]) and fits(claim[entry])):
            raise ValueError(f"{entry}={claim[entry]!r} in {claim} must be {limits}")
    named = [*claim.get("order", ())]
    if kind != "order":
        entries = ("better_than", "of", "over", "more", "than")
        named = [claim[entry] for entry in entries if entry in claim]
    known = list(recipes)
    if kind == "order" and (len(named) < 2 or len({*named}) < len(named)):
        raise ValueError(f"{claim} must order two or more different recipes")
    if claim.get("more") is not None and claim["more"] == claim["than"]:
        raise ValueError(f"{claim} must compare two recipes")
    for name in named:
        if name not in known:
            raise ValueError(f"{name!r} in {claim} is not compared{_near(name, known)}")


def _kind(claim: Claim) -> str:
    # "of" is in two kinds: only the first entry of each tells them apart.
    kinds = [kind for kind in ENTRIES if kind in claim]
    if len(kinds) != 1:
        raise ValueError(f"a claim has one of the entries {', '.join(ENTRIES)}, got {claim}")
    return kinds[0]


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)  # True is an int
    return number and math.isfinite(value)


def _near(name: Any, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=3)
    return f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(known)}"


def leader_of(claims: Iterable[Claim], default: str | None) -> str | None:
    """Returns the recipe that the first claim measures others by; `default` where none does."""
    for claim in claims:
        if "better_than" in claim or "reach" in claim:
            return claim.get("better_than", claim.get("of"))
    return default


def judge(claim: Claim, summary: Summary, gains: Gains | None = None) -> str:
    """Says whether a claim holds, or which recipes meet it, with the numbers.

    What is not believable does not count, and where a claim rests on it that is said.  One to
    three sentences, such as ``"The order a < b holds under both suites. Measured: a 20.0 %, b
    40.0 %."``

    Args:
      claim: As `check_claim` takes it.
      summary: Of the recipes.
      gains: For ``"reach"``, what `report.gain_shares` measured; without it no intervals.
    """
    if _kind(claim) == "reach":
        return _reach(claim, summary, gains)
    judges = {"order": _order, "better_than": _better}
    return judges[_kind(claim)](claim, summary)


def _order(claim: Claim, summary: Summary) -> str:
    by = claim.get("by", "robust_worst")
    names = list(claim["order"])
    known = [name for name in names if name in summary and summary[name][by].n]
    absent = [name for name in names if name not in known]
    missing = f" Not measured: {', '.join(absent)}." if absent else ""
    source = f" of {claim['of']}" if claim.get("of") else ""
    subject = f"The order {' < '.join(names)}{source}"
    if len(known) < 2:
        return f"{subject} cannot be judged {PLACES[by]}.{missing}"
    broken, undecided = [], []
    for first, second in itertools.pairwise(known):
        low, high = (percent(summary[name][by].mean) for name in (first, second))
        more = f"{high - low:+.1f} points"
        if not decided(summary[second], summary[first], by):
            undecided.append(f"Between {first} and {second} chance may decide ({more})")
        elif high < low:
            broken.append(f"{first} and {second} stand the other way round ({more})")
    word = "does not hold" if broken else "is undecided" if undecided else "holds"
    numbers = ", ".join(f"{name} {percent(summary[name][by].mean)} %" for name in known)
    reasons = "".join(f" {reason}." for reason in broken + undecided)
    # Clean accuracy needs no mark: no attack was needed to measure it.
    marked = _not_believable(summary, known) if by != "clean" else ""
    mark = f" {MARK}: {marked}." if marked else ""
    return f"{subject} {word} {PLACES[by]}. Measured: {numbers}.{reasons}{missing}{mark}"


def _reach(claim: Claim, summary: Summary, gains: Gains | None) -> str:
    by, leader, base = claim.get("by", "robust_worst"), claim["of"], claim["over"]
    goal = (
        f"At least {claim['reach']:.0%} of {leader}'s gain over {base} {PLACES[by]}, "
        f"at a cost of at most {claim['within']:g}x"
    )
    if reason := doubt(claim, summary):
        return f"{goal}: {reason}"
    if gains is None:
        low, high = (summary[name][by].mean for name in (base, leader))
        gain = f"{percent(high) - percent(low):+.1f} points"
        if high <= low:
            return f"{goal}: {leader} gains nothing ({gain})."
        means = {name: part[by].mean for name, part in summary.items() if part[by].n}
        shares = {name: (mean - low) / (high - low) for name, mean in means.items()}
        reached = _reached(claim, summary, shares, {})
        return f"{goal}: {reached}. The whole gain is {gain}."
    if gains.whole is None:
        return f"{goal}: cannot be judged. {base} and {leader} share no seed or no image."
    gain = _points(gains)
    if not gains.beyond_chance:
        return f"{goal}: {leader}'s gain is not beyond chance, so no share is given. It is {gain}."
    shares = {name: share.ratio for name, share in gains.shares.items()}
    reached = _reached(claim, summary, shares, gains.shares)
    return f"{goal}: {reached}. The whole gain is {gain}; images: {gains.images}."


def _points(gains: Gains) -> str:
    mean, low, high = (100 * share for share in gains.whole[:3])
    return f"{mean:+.1f} points ({low:+.1f} to {high:+.1f})"


def _reached(
    claim: Claim,
    summary: Summary,
    shares: Mapping[str, float],
    intervals: Mapping[str, GainShare],
) -> str:
    """The recipes that have the share at the cost, with what is known of it."""
    reached = []
    for name, part in _others(summary, (claim["over"], claim["of"])).items():
        cost = part["cost_factor"].mean
        if name not in shares or not cost:
            continue  # without a cost it cannot be within one
        if shares[name] >= claim["reach"] - SLACK and cost <= claim["within"] + SLACK:
            within = f"{interval(intervals[name])}, " if name in intervals else ""
            reached.append(f"{name} ({shares[name]:.0%}, {within}{cost:.2f}x)")
    return ", ".join(reached) or "no recipe"


def interval(share: GainShare) -> str:
    """Returns an interval of shares as it is shown, in per cent.

    Example:
      >>> interval(GainShare(0.95, 0.801, 1.1, 3))
      '80 to 110%'
    """
    return f"{100 * share.low:.0f} to {100 * share.high:.0f}%"


def _better(claim: Claim, summary: Summary) -> str:
    leader = claim["better_than"]
    goal = f"Better than {leader} in every measured share"
    doubt = _doubt(summary, (leader,), "clean")
    if doubt:
        return f"{goal}: {doubt}"
    better = []
    for name, part in _others(summary, (leader,)).items():
        measured = [by for by in SHARES if part[by].n and summary[leader][by].n]
        more = {by: part[by].mean - summary[leader][by].mean for by in measured}
        if min(more.values()) <= 0:
            continue
        # The others stand in the table of differences; thirty recipes would fill a page.
        numbers = f"clean {100 * more['clean']:+.1f}, both suites {100 * more['robust_worst']:+.1f}"
        unsure = not all(decided(part, summary[leader], by) for by in measured)
        better.append(f"{name} ({numbers} points{', not all beyond chance' if unsure else ''})")
    return f"{goal}: {', '.join(better) or 'no recipe'}."


def _others(summary: Summary, names: Sequence[str]) -> Summary:
    believed = {n: part for n, part in summary.items() if part["verdict"] != NOT_BELIEVABLE}
    return {name: part for name, part in believed.items() if name not in names}


def mark(claim: Claim, summary: Summary) -> str:
    """Returns what a tested claim's sentence ends with where a verdict forbids its figures.

    The test itself is as announced: it asks no verdict.
    """
    names = [claim[entry] for entry in ("more", "than") if claim[entry] in summary]
    marked = "" if claim["by"] == "clean" else _not_believable(summary, names)
    return f" {MARK}: {marked}." if marked else ""


def doubt(claim: Claim, summary: Summary) -> str:
    """Returns why a claim on a share of a gain cannot be judged; empty if it can."""
    return _doubt(summary, (claim["over"], claim["of"]), claim.get("by", "robust_worst"))


def _doubt(summary: Summary, names: Sequence[str], by: str) -> str:
    # A recipe that failed in training has no row, and its claim must not stop the report.
    absent = [name for name in names if name not in summary or not summary[name][by].n]
    if absent:
        return f"cannot be judged. Not measured: {', '.join(absent)}."
    marked = _not_believable(summary, names)
    return f"cannot be judged. {MARK}: {marked}." if marked else ""


def _not_believable(summary: Summary, names: Sequence[str]) -> str:
    return ", ".join(name for name in names if summary[name]["verdict"] == NOT_BELIEVABLE)

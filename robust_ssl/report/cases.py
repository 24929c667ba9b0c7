"""Worst cases of a result by group of attacks: what one figure is made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from robust_ssl.evaluation import WORST

SOURCES = {
    "public": "crafted on the public encoder",
    "hardened": "crafted again on the model itself",
    "twin": "crafted on the same recipe with another seed",
    "half": "crafted on the same recipe with another seed and half of the training images",
    "labelled": "fitted on the model itself, its head and its labelled training images",
}

Entry = Mapping[str, Any]  # of ``results``
Document = Mapping[str, Any]  # ``results.json``


class Group(NamedTuple):
    """Attacks whose worst case per image is one figure."""

    crafted_against: str
    family: str
    threat: str
    epsilon: float


def group_of(entry: Entry) -> Group:
    """Returns the group of attacks that an entry is of."""
    return Group(*(entry[field] for field in Group._fields))


def worst_cases(results: Sequence[Entry]) -> dict[Group, dict[str, Entry]]:
    """Returns the worst case by group of attacks, the public encoder first, and by model.

    It is the entry called ``"worst"`` where there is one, else that of the lowest robust accuracy.
    """
    groups: dict[Group, dict[str, list[Entry]]] = {}
    for entry in results:
        groups.setdefault(group_of(entry), {}).setdefault(entry["model"], []).append(entry)

    # One called "worst" is so image by image, which is below the lowest single attack.
    def severity(entry: Entry) -> tuple[bool, float]:
        return entry["attack"] != WORST, entry["robust_accuracy"]

    cases = {}
    for group in sorted(groups, key=lambda group: list(SOURCES).index(group.crafted_against)):
        cases[group] = {m: min(entries, key=severity) for m, entries in groups[group].items()}
    return cases


def suite_cases(document: Document) -> dict[Group, dict[str, Entry]]:
    """Returns the worst cases that are compared: the suite at its main budget, by source."""
    cases = worst_cases(document["results"])
    suites = ("public", "hardened")  # the others are not there for every model
    both = {group: models for group, models in cases.items() if group.crafted_against in suites}
    main = ("universal", "Linf", document["run"]["suite"]["epsilon"])
    # A suite of patches, or of budgets of its own, has none there: the first group stands for it.
    if both and not any(group[1:] == main for group in both):
        main = next(iter(both))[1:]
    return {group: models for group, models in both.items() if group[1:] == main}


def strongest_cases(document: Document) -> dict[Group, dict[str, Entry]]:
    """Returns the worst cases under AutoAttack, else per image, at the first of its budgets.

    The first at which an attack sees labels, where one does: without them it is no white box.
    """
    cases = worst_cases(document["results"])
    for family in ("autoattack", "per_image"):  # the first is an ensemble of the second
        of_family = [group for group in cases if group.family == family]
        if of_family:
            seeing = [group for group in of_family if _sees_labels(document["results"], group)]
            first = (seeing or of_family)[0]
            return {group: cases[group] for group in of_family if group[1:] == first[1:]}
    return {}


def _sees_labels(results: Iterable[Entry], group: Group) -> bool:
    """Whether an attack is scored on the models alone: the public encoder has no labels."""
    by: dict[str, set[str]] = {"public": set(), "hardened": set()}
    for entry in results:
        budget = (entry["family"], entry["threat"], entry["epsilon"])
        if entry["attack"] != WORST and budget == group[1:]:
            by[entry["crafted_against"]].add(entry["attack"])
    return bool(by["hardened"] - by["public"])

"""Which of a model's figures an examination looks at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from robust_ssl import evaluation, threats
from robust_ssl.evaluation import Counts, PerImage
from robust_ssl.experiment.context import Context
from robust_ssl.experiment.groups import Scored


class Subject(NamedTuple):
    """What the checks of a model and its per-image figure look at.

    Attributes:
      groups: The per-image attacks that saw the model itself, of one threat and budget.
      threat: Their threat.
      rows: The images on which all of them were scored.
      figure: The worst case over them; None without groups.
      spent: Input gradients that they took.
      words: What is examined, in words.
    """

    groups: list[Scored]
    threat: Any
    rows: np.ndarray
    figure: PerImage | None
    spent: float
    words: str


def subject_of(context: Context, scored: Sequence[Scored]) -> Subject | None:
    """Returns what can be examined, None where nothing can.

    The per-image attacks of the largest Linf budget at which one of them sees labels; where there
    are none, the examination's own PGD at the budget of the universal attacks.
    """
    families = ("per_image", "autoattack")
    groups = [s for s in scored if s.group.family in families and sees_model(s)]
    groups = [s for s in groups if s.group.epsilon > 0]
    with_labels = [s.group for s in groups if sees_labels(s)]
    if with_labels:
        group = max(with_labels, key=lambda g: (g.threat == "Linf", g.epsilon))
        groups = [s for s in groups if budget_of(s) == (group.threat, group.epsilon)]
        rows, figure = figure_of(groups, len(context.test))
        spent = sum(member.gradient_evaluations for s in groups for member in s.members)
        words = f"{group.threat} {group.epsilon:.4g}"
        return Subject(groups, groups[0].members[0].value.threat, rows, figure, spent, words)
    epsilon = max((s.group.epsilon for s in scored if s.group.threat == "Linf"), default=0)
    if not epsilon:
        return None
    words = f"Linf {epsilon:.4g}, no per-image attack was scored"
    return Subject([], threats.Linf(epsilon), np.arange(len(context.test)), None, 0, words)


def counts_of(figure: PerImage | None, scored: Sequence[Scored]) -> Counts | None:
    """Returns the counts of the figure that a verdict is of.

    Without attacks on single images that is the worst case over the perturbations of the largest
    Linf budget, on the whole split: the examination's own sample is printed nowhere.
    """
    if figure is not None:
        return figure.counts
    whole = [s for s in scored if s.group.threat == "Linf" and s.rows is None]
    epsilon = max((s.group.epsilon for s in whole), default=0)
    if not epsilon:
        return None
    return evaluation.worst_case(s.worst for s in whole if s.group.epsilon == epsilon).counts


def sees_model(scored: Scored) -> bool:
    """Returns whether a group was crafted on the model itself."""
    return scored.group.crafted_against == "hardened"


def sees_labels(scored: Scored) -> bool:
    """Returns whether one attack of a group raises the loss of labels.

    What only moves features or outputs is no figure of white-box robustness.
    """
    attacks = [getattr(member.value, "attack", member.value) for member in scored.members]
    return any(map(needs_labels, attacks))


def needs_labels(attack: Any) -> bool:
    """Returns whether an attack raises the loss of labels, and does not move outputs alone."""
    return not getattr(attack, "label_free", False)


def budget_of(scored: Scored) -> tuple[str, float]:
    """Returns a group's threat, by its name, and budget."""
    return scored.group.threat, scored.group.epsilon


def figure_of(groups: Sequence[Scored], size: int) -> tuple[np.ndarray, PerImage]:
    """Returns the images that all groups were scored on, and the worst case for them."""
    rows = np.arange(size)
    for s in groups:
        rows = rows if s.rows is None else np.intersect1d(rows, s.rows)

    def of_rows(s: Scored) -> PerImage:
        places = rows if s.rows is None else np.searchsorted(s.rows, rows)
        fields = (s.worst.clean_correct, s.worst.robust_correct, s.worst.flipped)
        # Of AutoAttack no excess is known.
        return PerImage(*(field[places] for field in fields), s.worst.seconds, s.worst.excess)

    return rows, evaluation.worst_case(of_rows(s) for s in groups)

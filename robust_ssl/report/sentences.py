"""What the numbers allow to be said, in plain sentences: the answer, the verdicts, the advice."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from robust_ssl.evaluation import wilson_interval
from robust_ssl.evaluation.checks.result import NOT_BELIEVABLE, NOT_EXAMINED, reasons
from robust_ssl.report.cases import SOURCES, Document, Entry, suite_cases
from robust_ssl.report.comparison import VERDICTS, Summary, decided, differ
from robust_ssl.report.pareto import Point, checked_points
from robust_ssl.report.tables import MARK, Line, budget, headline, names, percent


def answer(document: Document, summary: Summary | None = None) -> list[str]:
    """Says what the attack does, who keeps how much at which price, and whether to believe it.

    With outcomes by image in the summary, chance is judged on the same images, else by whether two
    intervals overlap.  Nothing is said that the first table does not show.
    """
    lines = headline(document)
    # A run without a comparison still has the frozen encoder, under the name that recipes use.
    name = (document["comparison"] or {}).get("baseline") or "baseline"
    base = next((line for line in lines if line.name == name), None)
    # A figure that is not believable is often the highest: it must not be called the best.
    others = [line for line in lines if line != base and line.verdict != NOT_BELIEVABLE]
    sentences = [_effect(document, line.name) for line in ([base] if base else lines[:2])]
    if others:
        # Image by image over both only a comparison knows; it is below either of them.
        both = "both suites" if document["comparison"] else "the stronger suite"
        suites = both if len(suite_cases(document)) > 1 else "the suite"
        sentences.append(_most_robust(others, base, suites, summary or {}))
        if base:
            sentences.append(_price(others[0], base, document, summary or {}))
    return [*sentences, _belief(lines)]


def _effect(document: Document, name: str) -> str:
    """Says what the attack does to one recipe, from the public encoder where that was scored."""
    group, cases = next(iter(suite_cases(document).items()))
    models = document["models"]
    entries = [e for model, e in cases.items() if (models[model]["recipe"] or model) == name]
    if not entries:
        return f"{name} was not scored under the suite."
    attack = f"Attacks {SOURCES[group.crafted_against]} ({budget(group.epsilon, group.threat)})"
    worst = max((entry["verdict"] for entry in entries), key=VERDICTS.index)
    return f"{attack} {change(entries, name)}{_mark(worst)}."


def change(entries: Sequence[Entry], name: str) -> str:
    """Says by how much attacks of one group change a model's accuracy, unless it may be chance."""
    clean, robust = (
        statistics.fmean(entry[metric] for entry in entries)
        for metric in ("clean_accuracy", "robust_accuracy")
    )
    numbers = f"{percent(clean)} % to {percent(robust)} %"
    # McNemar's test from the shares: images turned wrong, and wrong ones that turned right.
    harmed = statistics.fmean(e["attack_success_rate"] * e["clean_accuracy"] for e in entries)
    helped = max(robust - clean + harmed, 0.0)
    if abs(robust - clean) <= 1.96 * math.sqrt((harmed + helped) / entries[0]["n"]):
        return f"change nothing measurable in the accuracy of {name} ({numbers})"
    if robust > clean:
        return f"do not lower the accuracy of {name} ({numbers})"
    return f"cut the accuracy of {name} from {numbers}"


def _most_robust(others: Sequence[Line], base: Line | None, suites: str, summary: Summary) -> str:
    best, *rest = others
    keeps = f"keeps {percent(best.attacked.mean)} % under the attacks of {suites}"
    if base is None:
        return f"The most robust, {best.name}, {keeps}."
    held = f"{base.name} keeps {percent(base.attacked.mean)} %{_mark(base.verdict)}"
    if base.verdict != NOT_BELIEVABLE and best.attacked.mean <= base.attacked.mean:
        return f"Nothing is more robust than {base.name}: {best.name} {keeps}, where {held}."
    chance = {"paired": " The difference may be chance."}
    chance |= {"overlap": " The two 95 % intervals overlap.", "": ""}
    chance = chance[_chance(best, base, "attacked", summary)]
    # Whose difference from the next one is within chance is named beside it.
    near = [line.name for line in rest if _chance(best, line, "attacked", summary) == "paired"]
    beside = f" Between it and {' or '.join(near)} chance may decide." if near else ""
    return f"The most robust, {best.name}, {keeps}, where {held}.{chance}{beside}"


def _price(best: Line, base: Line, document: Document, summary: Summary) -> str:
    before, after = percent(base.clean.mean), percent(best.clean.mean)
    word = "loses" if after < before else "gains"
    clean = {
        "paired": "does not measurably change the clean accuracy",
        "overlap": "keeps the clean accuracy within overlapping 95 % intervals",
        "": f"{word} {abs(after - before):.1f} points of clean accuracy",
    }[_chance(best, base, "clean", summary)]
    clean = f"{clean} ({before} % to {after} %)"
    reference = (document["comparison"] or {}).get("reference") or "the reference"
    if best.cost is None or best.name == reference:  # whose training time is 1 of its own
        return f"{best.name} {clean}."
    return f"{best.name} takes {best.cost:.1f}x the training time of {reference} and {clean}."


def _chance(line: Line, base: Line, which: str, summary: Summary) -> str:
    """Says how chance may explain a difference: ``"paired"``, ``"overlap"`` or, if not, ``""``."""
    by = "clean" if which == "clean" else "robust_worst"
    if line.name in summary and base.name in summary:
        part, other = summary[line.name], summary[base.name]
        if differ(part, other, by) is not None:
            return "" if decided(part, other, by) else "paired"
    # Intervals of each alone may overlap where the same images decide: less may be said.
    a, b = getattr(line, which), getattr(base, which)
    return "overlap" if a.low <= b.high and b.low <= a.high else ""


def _mark(verdict: str) -> str:
    return f" ({MARK})" if verdict == NOT_BELIEVABLE else ""


def _belief(lines: Sequence[Line]) -> str:
    by_word = {word: [line.name for line in lines if line.verdict == word] for word in VERDICTS}
    # Said of figures: a model that falls from 79 % to 5 % has a believable figure.
    counted = {word: members for word, members in by_word.items() if members}
    if [*counted] == [NOT_EXAMINED]:
        return "No figure under attack was examined."
    if len(counted) == 1:
        subject = f"The figures of {lines[0].name}" if len(lines) == 1 else "All figures"
        word = MARK if NOT_BELIEVABLE in counted else next(iter(counted))
        return f"{subject} under attack are {word}."
    parts = [f"{len(members)} {word}" for word, members in counted.items()]
    if NOT_BELIEVABLE in counted:
        parts[-1] = f"{MARK} are those of {', '.join(counted[NOT_BELIEVABLE])}"
    return f"Of {len(lines)} figures under attack: {'; '.join(parts)}."


def verdict_lines(document: Document) -> list[str]:
    """Returns the verdict on each model's figures in one line, then what did not pass, indented."""
    lines = []
    for model, name in names(document["models"]).items():
        verdict = document["verdicts"].get(model, {"verdict": NOT_EXAMINED, "checks": []})
        word = MARK if verdict["verdict"] == NOT_BELIEVABLE else verdict["verdict"]
        lines.append(f"The figures of {name} under attack are {word}{_passed(verdict)}.")
        for status in ("failed", "note"):  # the grave first
            checks = [check for check in verdict["checks"] if check["status"] == status]
            lines += [f"  {_check_sentence(check)}" for check in checks]
        lines += [f"  not run: {reason}" for reason in reasons(verdict)]
    return lines


def _passed(verdict: Mapping[str, Any]) -> str:
    run = [check for check in verdict["checks"] if check["status"] != "not run"]
    if not run:
        return ""
    passed = sum(check["status"] == "passed" for check in run)
    examined = f"; examined: {verdict['examined']}" if verdict.get("examined") else ""
    return f" ({passed} of {len(run)} checks passed{examined})"


def _check_sentence(check: Mapping[str, Any]) -> str:
    value, limit = (
        number if isinstance(number, str | None) else f"{number:.4g}"
        for number in (check["value"], check["limit"])
    )
    measured = "" if value is None else f": {value}"
    held = "" if limit is None else f" (limit {limit})"
    head = f"{check['status']}: {check['number']} {check['title']}{measured}{held}."
    return " ".join(part for part in (head, check["meaning"], check["advice"]) if part)


def advice(
    points: Iterable[Point], *, baseline: str, max_clean_loss: float = 0.02, max_cost: float = 2.0
) -> str:
    """Says what to take if little clean accuracy and little time may be given.

    That is the most robust point within both limits.  Loss and gain are counted from `baseline`,
    one of the points.  What is not believable is not taken, and a gain that may be chance is
    called so.

    Raises:
      ValueError: As `front`, or if there is no point `baseline`.

    Example:
      >>> points = [Point("plain", 0.9, 0.1, 1.0), Point("secure", 0.89, 0.5, 1.5)]
      >>> print(advice(points, baseline="plain"))
      Within 2 points of clean accuracy and 2x the reference's training time, take secure.
      It keeps 50.0 % under attack (+40.0 points over plain) and 89.0 % clean (-1.0), cost 1.5x.
    """
    points = checked_points(points)
    base = next((point for point in points if point.name == baseline), None)
    if base is None:
        known = ", ".join(point.name for point in points)
        raise ValueError(f"no point is called {baseline!r}, which gains are counted from: {known}")
    limits = (
        f"Within {100 * max_clean_loss:g} points of clean accuracy and {max_cost:g}x the "
        "reference's training time, "
    )
    mark, none = "", f"nothing is more robust than {base.name} ({percent(base.robust)} %)"
    if not base.believable:
        none = "no recipe with a believable figure fits"
        mark = f" The figures of {base.name} under attack are {MARK}: only its clean one is used."
    least = base.robust if base.believable else -1.0  # else each is a candidate
    better = [point for point in points if point.believable and point.robust > least]
    if not better:
        return f"{limits}{none}.{mark}"
    slack = 1e-9  # 0.9 - 0.88 is a little more than 0.02
    cheap = [point for point in better if point.cost <= max_cost + slack]
    within = [point for point in cheap if base.clean - point.clean <= max_clean_loss + slack]
    # Of equals the more accurate, then the cheaper.
    chosen = max(within or better, key=lambda p: (p.robust, p.clean, -p.cost))
    chance = " On so few images that gain may be chance." * _may_be_chance(chosen, base)
    take = f"take {chosen.name}."
    if not within:
        take = f"{none}. The most robust at any price is {chosen.name}."
    return f"{limits}{take} {_numbers(chosen, base)}{chance}{mark}"


def _numbers(point: Point, base: Point) -> str:
    gain = percent(point.robust) - percent(base.robust)
    more = f" ({gain:+.1f} points over {base.name})" if base.believable else ""
    clean = percent(point.clean) - percent(base.clean)
    return (
        f"It keeps {percent(point.robust)} % under attack{more} and {percent(point.clean)} % clean "
        f"({clean:+.1f}), cost {point.cost:.1f}x."
    )


def _may_be_chance(point: Point, base: Point) -> bool:
    """Whether what is known of both robust accuracies overlaps, where it is counted from one."""
    if not (point.images and base.images and base.believable):
        return False
    low, _ = wilson_interval(round(point.robust * point.images), point.images)
    _, high = wilson_interval(round(base.robust * base.images), base.images)
    return low <= high

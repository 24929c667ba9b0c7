"""The leaderboard: many classifiers, one line each, the most robust first; Markdown and CSV."""

from __future__ import annotations

import csv
import io
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from robust_ssl import manifests
from robust_ssl.evaluation import WORST, wilson_interval
from robust_ssl.report.results import METRICS, NOT_TRUSTED
from robust_ssl.report.tables import (
    Entry,
    Group,
    budget,
    group_of,
    headline,
    model_name,
    models_of,
)
from robust_ssl.report.verdicts import verdict_section

FAMILIES = {"universal": "universal", "per_image": "per image", "autoattack": "AutoAttack"}
_UNRANKED = ("not examined", NOT_TRUSTED)
SAW = {"public": "public encoder", "hardened": "the model itself"}


def ranking(results: Sequence[Entry]) -> list[tuple[int | None, str]]:
    """Returns (rank, classifier) by falling robust accuracy, worst case over every group.

    Those whose figures are not trusted, or were not examined, come last and have no rank.

    Example:
      >>> low = {"model": "a", "robust_accuracy": 0.2, "verdict": "trusted"}
      >>> ranking([low, {**low, "model": "b", "robust_accuracy": 0.5},
      ...          {**low, "model": "c", "robust_accuracy": 0.9, "verdict": "not trusted"}])
      [(1, 'b'), (2, 'a'), (None, 'c')]
    """
    keys = {}
    for model in models_of(results):
        mine = [entry for entry in results if entry["model"] == model]
        verdict = mine[0]["verdict"]
        unranked = verdict in _UNRANKED
        place = _UNRANKED.index(verdict) + 1 if unranked else 0
        keys[model] = (place, -min(entry["robust_accuracy"] for entry in mine))
    order = sorted(keys, key=keys.__getitem__)
    return [(None if keys[m][0] else place, m) for place, m in enumerate(order, 1)]


def over_seeds(entries: Sequence[Entry]) -> dict[str, Any]:
    """Summarizes one attack over its seeds.

    Args:
      entries: Of ``results.json``: one model, one attack, one budget, one entry for each seed.

    Returns:
      ``mean`` and ``deviation`` (sample standard deviation; None for one seed) of the robust
      accuracy, ``low`` and ``high``, the 95 % Wilson interval of the mean over the images (which
      the seeds share, so more seeds do not narrow it), means of the other rates, and
      ``seconds``, the sum.
    """
    robust = [entry["robust_accuracy"] for entry in entries]
    mean, n = statistics.fmean(robust), entries[0]["n"]
    low, high = wilson_interval(round(mean * n), n)
    return {
        "seeds": len(entries),
        "n": n,
        "mean": mean,
        "deviation": statistics.stdev(robust) if len(robust) > 1 else None,
        "low": low,
        "high": high,
        "attack_success_rate": statistics.fmean(e["attack_success_rate"] for e in entries),
        "fooling_rate": statistics.fmean(e["fooling_rate"] for e in entries),
        "seconds": sum(entry["seconds"] for entry in entries),
    }


def write_leaderboard(
    directory: str | os.PathLike,
    results: Sequence[Entry],
    verdicts: Mapping[str, Mapping[str, Any]],
    about: Sequence[str] = (),
) -> list[pathlib.Path]:
    """Writes ``leaderboard.md``, ``leaderboard.csv`` (worst cases) and ``attacks.csv`` (all).

    A figure that is not trusted carries its mark in the first, and every line of the others has
    its verdict.

    Args:
      directory: Where to write.
      results: Entries of ``results.json``.
      verdicts: By model, as in ``results.json``.
      about: Sentences on what was scored, put above the tables.

    Returns:
      The paths.
    """
    directory = pathlib.Path(directory)
    board, attacks = _board(results), _attacks(results)
    page = [
        "# Leaderboard",
        *about,
        markdown_table(board),
        "Robust accuracy in per cent, worst case per image over the attacks of a column and their "
        "seeds, with its 95 % interval. The most robust first, by the lowest of its columns.",
        verdict_section(verdicts),
        "## Every attack",
        markdown_table(attacks),
        "Mean and standard deviation over seeds; the interval is that of the mean over the images, "
        "which the seeds share.",
    ]
    written = {
        "leaderboard.md": "\n\n".join(filter(None, page)) + "\n",
        "leaderboard.csv": csv_text(_numbers(headline_entries(results))),
        "attacks.csv": csv_text(_numbers(results)),
    }
    for name, text in written.items():
        manifests.write_atomically(directory / name, text)
    return [directory / name for name in written]


Rows = list[dict[str, str]]


def _board(results: Sequence[Entry]) -> Rows:
    groups = headline(results)
    rows = []
    whole = max(entry["n"] for entry in results)
    for place, model in ranking(results):
        mine = {group: models[model] for group, models in groups.items() if model in models}
        first = next(iter(mine.values()))
        row = {"rank": "-" if place is None else str(place), "classifier": model_name(model)}
        row["clean"] = _with_interval(first, "clean_accuracy")
        for group, models in groups.items():
            entry = mine.get(group)
            cell = "n/a" if entry is None else _with_interval(entry, "robust_accuracy")
            images = next(iter(models.values()))["n"]
            heading = _heading(group) + (f", {images} images" if images < whole else "")
            row[heading] = cell + _mark(entry)
        row["verdict"] = first["verdict"]
        rows.append(row)
    return rows


def _heading(group: Group) -> str:
    at = budget(group.epsilon, group.threat)
    return f"{FAMILIES[group.family]}, saw {SAW[group.crafted_against]}, {at}"


def _attacks(results: Sequence[Entry]) -> Rows:
    gathered: dict[tuple, list[Entry]] = {}
    for entry in results:
        if entry["attack"] != WORST:
            key = (entry["model"], group_of(entry), entry["attack"])
            gathered.setdefault(key, []).append(entry)
    rows = []
    for (model, group, attack), entries in gathered.items():
        found = over_seeds(entries)
        spread = "" if found["deviation"] is None else f" ± {100 * found['deviation']:.1f}"
        rows.append(
            {
                "classifier": model_name(model),
                "attack": attack,
                "saw": SAW[group.crafted_against],
                "budget": budget(group.epsilon, group.threat),
                "seeds": str(found["seeds"]),
                "robust": f"{100 * found['mean']:.1f}{spread} "
                f"({100 * found['low']:.1f}-{100 * found['high']:.1f})" + _mark(entries[0]),
                "attack success": f"{100 * found['attack_success_rate']:.1f}" + _mark(entries[0]),
                "fooling": f"{100 * found['fooling_rate']:.1f}" + _mark(entries[0]),
                "images": str(found["n"]),
                "seconds": f"{found['seconds']:.1f}",
            }
        )
    return rows


def headline_entries(results: Sequence[Entry]) -> list[Entry]:
    """Returns the worst case of each classifier in each group of attacks."""
    return [entry for models in headline(results).values() for entry in models.values()]


def _numbers(results: Sequence[Entry]) -> Rows:
    """Returns entries as rows that a program can sort and plot: shares, not per cent."""
    rows = []
    for entry in results:
        low, high = entry["ci95"]["robust_accuracy"]
        plain = {
            name: entry[name]
            for name in (
                *("model", "verdict", "family", "crafted_against", "threat", "epsilon", "attack"),
                *("seed", "n", *METRICS),
            )
        }
        cost = {name: entry[name] for name in ("seconds", "gradient_evaluations")}
        row = {**plain, "robust_low": low, "robust_high": high, **cost}
        rows.append({name: "" if value is None else str(value) for name, value in row.items()})
    return rows


def _with_interval(entry: Entry, metric: str) -> str:
    low, high = entry["ci95"][metric]
    return f"{100 * entry[metric]:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def _mark(entry: Entry | None) -> str:
    return " NOT TRUSTED" if entry is not None and entry["verdict"] == NOT_TRUSTED else ""


def markdown_table(rows: Rows) -> str:
    """Returns rows, heading to text, as a Markdown table."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(row[c].replace("|", "\\|") for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def csv_text(rows: Rows) -> str:
    """Returns rows, heading to value, as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

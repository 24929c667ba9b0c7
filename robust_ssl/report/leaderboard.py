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
from robust_ssl.report.results import NOT_TRUSTED
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
SAW = {"public": "public encoder", "hardened": "the model itself"}


def ranking(results: Sequence[Entry]) -> list[str]:
    """Returns the classifiers by falling robust accuracy, worst case over every group.

    Example:
      >>> low = {"model": "a", "robust_accuracy": 0.2}
      >>> ranking([low, {**low, "model": "b", "robust_accuracy": 0.5}])
      ['b', 'a']
    """
    lowest = {
        model: min(e["robust_accuracy"] for e in results if e["model"] == model)
        for model in models_of(results)
    }
    return sorted(lowest, key=lambda model: -lowest[model])


def over_seeds(entries: Sequence[Entry]) -> dict[str, Any]:
    """Summarises one attack over its seeds.

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
    """Writes ``leaderboard.md``, ``leaderboard.csv`` (classifiers) and ``attacks.csv``.

    A figure that is not trusted carries its mark in all three.

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
        _markdown(board),
        "Robust accuracy in per cent, worst case per image over the attacks of a column and their "
        "seeds, with its 95 % interval. The most robust first, by the lowest of its columns.",
        verdict_section(verdicts),
        "## Every attack",
        _markdown(attacks),
        "Mean and standard deviation over seeds; the interval is that of the mean over the images, "
        "which the seeds share.",
    ]
    written = {
        "leaderboard.md": "\n\n".join(filter(None, page)) + "\n",
        "leaderboard.csv": _csv(board),
        "attacks.csv": _csv(attacks),
    }
    for name, text in written.items():
        manifests.write_atomically(directory / name, text)
    return [directory / name for name in written]


Rows = list[dict[str, str]]


def _board(results: Sequence[Entry]) -> Rows:
    groups = headline(results)
    rows = []
    for place, model in enumerate(ranking(results), 1):
        mine = {group: models[model] for group, models in groups.items() if model in models}
        first = next(iter(mine.values()))
        row = {"rank": str(place), "classifier": model_name(model)}
        row["clean"] = _with_interval(first, "clean_accuracy")
        for group in groups:
            entry = mine.get(group)
            cell = "n/a" if entry is None else _with_interval(entry, "robust_accuracy")
            row[_heading(group)] = cell + _mark(entry)
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
                "attack success": f"{100 * found['attack_success_rate']:.1f}",
                "fooling": f"{100 * found['fooling_rate']:.1f}",
                "images": str(found["n"]),
                "seconds": f"{found['seconds']:.1f}",
            }
        )
    return rows


def _with_interval(entry: Entry, metric: str) -> str:
    low, high = entry["ci95"][metric]
    return f"{100 * entry[metric]:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def _mark(entry: Entry | None) -> str:
    return " NOT TRUSTED" if entry is not None and entry["verdict"] == NOT_TRUSTED else ""


def _markdown(rows: Rows) -> str:
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(row[c].replace("|", "\\|") for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def _csv(rows: Rows) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

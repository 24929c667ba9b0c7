"""Many methods side by side, each over its seeds: one table, its numbers, and what it allows."""

from __future__ import annotations

import itertools
import math
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from robust_ssl import manifests
from robust_ssl.evaluation import wilson_interval
from robust_ssl.evaluation.checks.result import NOT_EXAMINED, NOT_TRUSTED, TRUSTED, WITH_NOTES
from robust_ssl.report.columns import COLUMNS, FIELDS, OPTIONAL, SHARES, Column
from robust_ssl.report.differences import decided, differences, differences_table
from robust_ssl.report.leaderboard import csv_text, markdown_table
from robust_ssl.report.tables import method_name

VERDICTS = (TRUSTED, WITH_NOTES, NOT_EXAMINED, NOT_TRUSTED)  # from best to worst

Row = Mapping[str, Any]
Right = Mapping[str, Mapping[str, np.ndarray]]  # by method and share, float [n]: see `summarize`


class Figure(NamedTuple):
    """One figure of one method over its seeds.

    Attributes:
      mean: None where no seed was measured.
      deviation: Sample standard deviation; None for fewer than two seeds.
      n: Seeds that were measured.
    """

    mean: float | None
    deviation: float | None
    n: int


def summarize(rows: Sequence[Row], right: Right | None = None) -> dict[str, dict[str, Any]]:
    """Gathers the rows of each method over its seeds.

    Args:
      rows: One for each method and seed, with the entries `FIELDS`: shares in [0, 1], the number
        of test images and of AutoAttack's, costs, and the verdict; what was not measured is None.
      right: By method and share (a name in `SHARES`), how often each test image was right: in what
        part of the seeds, float ``[n]``.  With it, methods are compared image by image.

    Returns:
      By method, in order of first appearance: a `Figure` for each share and cost, ``seeds``, how
      many there are, ``images`` and ``autoattack_images``, the fewest over the seeds, ``verdict``,
      the worst over the seeds, and ``right``, its part of `right`.

    Raises:
      ValueError: If there is no row, a field is missing, unknown or impossible, a method has the
        same seed twice, or the images say another share than the rows.

    Example:
      >>> row = {"method": "usual", "seed": 0, "verdict": "trusted", "clean": 0.5, "images": 100,
      ...        "robust_public": 0.25, "robust_hardened": 0.0, "robust_worst": 0.0,
      ...        "autoattack": None, "autoattack_images": None, "training_seconds": 8.0,
      ...        "cost_factor": 1.0, "gradients": 1.0, "gradients_per_epoch": 1.0,
      ...        "seconds_per_image": 0.001, "peak_bytes": None}
      >>> found = summarize([row, {**row, "seed": 1, "clean": 1.0, "verdict": "not trusted"}])
      >>> found["usual"]["clean"].mean, found["usual"]["clean"].n, found["usual"]["verdict"]
      (0.75, 2, 'not trusted')
    """
    _check(rows)
    by_method: dict[str, list[Row]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    found = {
        method: {
            **{name: _over_seeds([row[name] for row in mine]) for name in COLUMNS},
            "seeds": len(mine),
            "images": min(row["images"] for row in mine),
            "autoattack_images": min(
                (row["autoattack_images"] for row in mine if row["autoattack_images"] is not None),
                default=None,
            ),
            "verdict": max((row["verdict"] for row in mine), key=VERDICTS.index),
            "right": (right or {}).get(method, {}),
        }
        for method, mine in by_method.items()
    }
    for method, mine in found.items():
        for by, each in mine["right"].items():
            if abs(float(np.mean(each)) - (mine[by].mean or 0)) > 1e-6:
                raise ValueError(
                    f"{method}: {by} is {mine[by].mean} by the rows and {np.mean(each)} by image"
                )
    return found


def _over_seeds(values: Sequence[float | None]) -> Figure:
    known = [float(value) for value in values if value is not None]
    mean = statistics.fmean(known) if known else None
    return Figure(mean, statistics.stdev(known) if len(known) > 1 else None, len(known))


def _check(rows: Sequence[Row]) -> None:
    if not rows:
        raise ValueError("there is nothing to compare: no method has a row")
    seen = set()
    for row in rows:
        where = f"the row of {row.get('method')!r}, seed {row.get('seed')}"
        missing, unknown = sorted({*FIELDS} - {*row}), sorted({*row} - {*FIELDS})
        if missing or unknown:
            raise ValueError(f"{where}: missing fields {missing}, unknown fields {unknown}")
        if (row["method"], row["seed"]) in seen:
            raise ValueError(f"{where} is there twice; a method has one row for each seed")
        seen.add((row["method"], row["seed"]))
        if row["verdict"] not in VERDICTS:
            raise ValueError(f"{where}: {row['verdict']!r} is no verdict; known: {VERDICTS}")
        for name in (*COLUMNS, "images", "autoattack_images"):
            _check_number(where, name, row[name])
        if (row["autoattack"] is None) != (row["autoattack_images"] is None):
            raise ValueError(f"{where}: autoattack and autoattack_images go together")


def _check_number(where: str, name: str, value: float | None) -> None:
    if value is None:
        if name not in OPTIONAL:
            raise ValueError(f"{where}: {name} was not measured; it must be")
        return
    low = 1 if name in ("images", "autoattack_images") else 0
    high = 1 if name in SHARES else math.inf
    if not (math.isfinite(value) and low <= value <= high):
        limits = f"in [{low}, {high}]" if high == 1 else f"finite and at least {low}"
        raise ValueError(f"{where}: {name} is {value}; it must be {limits}")


def write_comparison(
    workdir: str | os.PathLike,
    rows: Sequence[Row],
    said: Sequence[str] = (),
    right: Right | None = None,
    leader: str = "",
) -> list[pathlib.Path]:
    """Writes ``comparison.csv``, every row, and ``comparison.md``, one line for each method.

    A figure under attack that is not trusted carries its mark.  Where it is known what happened to
    each image, how every method differs from the leader is a second table, and
    ``differences.csv``.

    Args:
      workdir: Where to write; made where it is missing.
      rows: As for `summarize`.
      said: Sentences above the table, such as those of `ordering`.
      right: As for `summarize`.
      leader: The method that the others are held against.

    Returns:
      The paths.

    Raises:
      ValueError: As `summarize`; nothing is written.
    """
    summary = summarize(rows, right)
    page = ["# Comparison", *said, comparison_table(summary), _legend(summary)]
    numbers = [
        {name: "" if row[name] is None else str(row[name]) for name in FIELDS} for row in rows
    ]
    directory = manifests.make_directory(workdir)
    against = differences(summary, leader) if leader in summary else []
    written = {"comparison.csv": csv_text(numbers)}
    if against:
        page.append(differences_table(against, leader))
        written["differences.csv"] = csv_text(against)
    written["comparison.md"] = "\n\n".join(page) + "\n"
    for name, text in written.items():
        manifests.write_atomically(directory / name, text)
    return [directory / name for name in written]


def comparison_table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the summary as a Markdown table; a column that nothing was measured for is left out.

    Args:
      summary: What `summarize` returned.
    """
    columns = _measured(summary)
    lines = []
    for method, found in summary.items():
        mark = " NOT TRUSTED" if found["verdict"] == NOT_TRUSTED else ""
        line = {"method": method_name(method), "seeds": str(found["seeds"])}
        for name, column in columns.items():
            attacked = name in SHARES and name != "clean" and found[name].n
            line[column.heading] = _cell(found, name) + (mark if attacked else "")
        lines.append({**line, "verdict": found["verdict"]})
    return markdown_table(lines)


def _measured(summary: Mapping[str, Mapping[str, Any]]) -> dict[str, Column]:
    return {
        name: column
        for name, column in COLUMNS.items()
        if any(found[name].n for found in summary.values())
    }


def _cell(found: Mapping[str, Any], name: str) -> str:
    column, figure = COLUMNS[name], found[name]
    if figure.mean is None:
        return "n/a"
    values = [value for value in (figure.mean, figure.deviation) if value is not None]
    text = " ± ".join(f"{column.scale * value:,.{column.decimals}f}" for value in values)
    part = f" ({figure.n} of {found['seeds']} seeds)" if figure.n < found["seeds"] else ""
    return f"{text}{column.unit}{part}"


def _legend(summary: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"- {column.heading}: {column.meaning}." for column in _measured(summary).values()]
    lines.append(f"- {_images(summary, 'images')}")
    if any(found["autoattack"].n for found in summary.values()):
        lines.append(f"- AutoAttack: {_images(summary, 'autoattack_images')}")
    if any(found["seeds"] > 1 for found in summary.values()):
        lines.append("- Where there are several seeds: mean ± sample standard deviation over them.")
    lines.append(
        f"- verdict: whether the figures under attack can be believed, the worst over the seeds; "
        f"one that is {NOT_TRUSTED} must not be used."
    )
    return "\n".join(lines)


def _images(summary: Mapping[str, Mapping[str, Any]], name: str) -> str:
    counts = sorted({found[name] for found in summary.values()} - {None})
    low, high = wilson_interval(counts[0] // 2, counts[0])
    return (
        f"{' or '.join(f'{count:,}' for count in counts)} test images, so that a share is known to "
        f"± {50 * (high - low):.1f} points or better (95 % interval)."
    )


def ordering(
    summary: Mapping[str, Mapping[str, Any]],
    names: Sequence[str],
    by: str = "robust_hardened",
    of: str = "",
) -> str:
    """Says whether a claimed order of methods, the worst first, is what was found.

    Two neighbours are undecided where chance may be the reason; see
    `robust_ssl.report.differences.decided`.

    Args:
      summary: What `summarize` returned.
      names: Methods, in the order claimed: each less than the next.
      by: The share that is compared, a name in `SHARES`.
      of: Who claims the order.

    Returns:
      One sentence with the numbers, and the mark of those that are not trusted.

    Raises:
      ValueError: If a method or the share is unknown, or there are fewer than two methods.
    """
    if by not in SHARES:
        raise ValueError(f"by={by!r} is no share; known: {', '.join(SHARES)}")
    unknown = [name for name in names if name not in summary]
    if unknown or len({*names}) != len(names) or len(names) < 2:
        raise ValueError(
            f"names must be two or more different methods, got {list(names)}; not compared: "
            f"{unknown}; known: {', '.join(summary)}"
        )
    known = [name for name in names if summary[name][by].n]
    absent = [method_name(name) for name in names if name not in known]
    missing = f" Not measured: {', '.join(absent)}." if absent else ""
    claim = f"The order {' < '.join(map(method_name, names))}{of and f', which {of} report,'}"
    if len(known) < 2:
        return f"{claim} cannot be judged by {SHARES[by].meaning}.{missing}"
    broken, undecided = _neighbours(summary, known, by)
    word = "does not hold" if broken else "is undecided" if undecided else "holds"
    shown = ", ".join(f"{method_name(name)} {_percent(summary, name, by)} %" for name in known)
    reasons = "; ".join(broken + undecided)
    text = f"{claim} {word} by {SHARES[by].meaning} ({shown}){': ' if reasons else ''}{reasons}."
    marked = [n for n in known if by != "clean" and summary[n]["verdict"] == NOT_TRUSTED]
    mark = f" NOT TRUSTED: {', '.join(map(method_name, marked))}." if marked else ""
    return text + missing + mark


def _neighbours(
    summary: Mapping[str, Mapping[str, Any]], names: Sequence[str], by: str
) -> tuple[list[str], list[str]]:
    """Returns the pairs that break the order, and those of which nothing can be said, in words."""
    broken, undecided = [], []
    for first, second in itertools.pairwise(names):
        more = round(_percent(summary, second, by) - _percent(summary, first, by), 1)
        pair = f"{method_name(first)} and {method_name(second)}"
        if not decided(summary[second], summary[first], by):
            undecided.append(
                f"{pair} are undecided ({more:+.1f} points, inside the deviation over seeds or the "
                "95 % interval over images)"
            )
        elif more < 0:
            broken.append(f"{pair} stand the other way round ({more:+.1f} points)")
    return broken, undecided


def _percent(summary: Mapping[str, Mapping[str, Any]], name: str, by: str) -> float:
    # Rounded as it is shown, so that differences in the text agree with the numbers beside them.
    return round(100 * summary[name][by].mean, 1)

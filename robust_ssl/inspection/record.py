"""What an inspection leaves: ``inspection.json``, a line of history, a trend picture, JUnit XML."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any
from xml.etree import ElementTree

from robust_ssl import disk, report, schemas, words
from robust_ssl.inspection.inspecting import Inspection
from robust_ssl.workdir import metrics, write_atomically

JSON, HISTORY, JUNIT = "inspection.json", "history.jsonl", "junit.xml"
_SHOWN = {
    "accuracy": "clean",
    "replay": "under the stored perturbations",
    "new_fit": "under one fitted anew",
}


def record(inspection: Inspection, folder: str | os.PathLike) -> list[pathlib.Path]:
    """Writes an inspection beside those before; the history is added to and never rewritten.

    Args:
      inspection: What `inspect` returned.
      folder: Made if it is not there.

    Returns:
      The files; that of the trend is missing where it could not be drawn.

    Raises:
      OSError: If something cannot be written.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    document = dict(inspection.record)
    check(document)
    text = json.dumps(document, indent=2, allow_nan=False)
    write_atomically(folder / JSON, text + "\n")
    write_atomically(folder / JUNIT, as_junit(inspection))
    _append(folder / HISTORY, document)
    drawn = report.figures.attempt(figure_trend, folder, read_history(folder))
    return [folder / JSON, folder / HISTORY, folder / JUNIT, *drawn]


def check(document: Any) -> None:
    """Raises ValueError unless a document is what ``inspection.schema.json`` asks for."""
    problem = schemas.problem("inspection", document)
    if problem is not None:
        raise ValueError(f"inspection.json, {schemas.place(problem)}: {problem.message[:200]}")


def _append(file: pathlib.Path, document: Mapping[str, Any]) -> None:
    entry = {name: document[name] for name in ("when", "model", "baseline", "verdict", "seed")}
    entry |= {"figures": document["figures"]}
    entry["outcomes"] = {check["name"]: check["outcome"] for check in document["checks"]}
    line = json.dumps(entry, allow_nan=False)
    # A line that a sudden end has cut is ended first, or it would take this one with it.
    is_cut = file.exists() and file.stat().st_size and file.read_bytes()[-1:] != b"\n"
    metrics.append(file, f"\n{line}" if is_cut else line)


def read_history(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the lines of the history that can be read, oldest first."""
    file = pathlib.Path(folder) / HISTORY
    entries = []
    for line in disk.read_bytes(file).splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError):  # damage costs its own line
            entries.append(disk.parse_json(line, file, finite=True))
    return [entry for entry in entries if _is_entry(entry)]


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, Mapping) and isinstance(entry.get("figures"), Mapping)


def as_junit(inspection: Inspection) -> bytes:
    """Returns the checks as JUnit XML, for what shows tests: absent ones are skipped there."""
    checks = inspection.checks
    counts = {outcome: sum(c.outcome == outcome for c in checks) for outcome in ("fail", "absent")}
    suite = ElementTree.Element(
        "testsuite",
        name="robust-ssl inspect",
        tests=str(len(checks)),
        failures=str(counts["fail"]),
        skipped=str(counts["absent"]),
        errors="0",
        timestamp=str(inspection.record["when"])[:19],
        time=str(inspection.record["seconds"]),
    )
    for one in checks:
        case = ElementTree.SubElement(
            suite, "testcase", classname=words.line(inspection.record["model"]), name=one.name
        )
        said = words.line(one.said)
        if one.outcome == "fail":
            ElementTree.SubElement(case, "failure", message=said).text = said
        elif one.outcome == "absent":
            ElementTree.SubElement(case, "skipped", message=said)
        else:
            ElementTree.SubElement(case, "system-out").text = said
    return ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)


@report.style.styled
def figure_trend(
    directory: str | os.PathLike, entries: Iterable[Mapping[str, Any]], *, name: str = "trend"
) -> pathlib.Path:
    """Draws accuracies over inspections; one that did not pass is marked."""
    entries = list(entries)
    figure = report.figures.new_figure(8.0, 3.6)
    axis = figure.add_subplot()
    places = range(1, len(entries) + 1)
    for look, (key, label) in zip(
        report.figures.styles(_SHOWN).values(), _SHOWN.items(), strict=True
    ):
        points = [(x, e["figures"].get(key)) for x, e in zip(places, entries, strict=True)]
        points = [(x, y) for x, y in points if isinstance(y, int | float)]
        axis.plot([x for x, _ in points], [y for _, y in points], label=label, **look)
    for place, entry in zip(places, entries, strict=True):
        if entry.get("verdict") != "pass":
            axis.axvline(place, color="#D55E00", linewidth=1, linestyle=":")
    axis.set(ylim=(0, 1.02), xlabel="inspection (dotted: it did not pass)", ylabel="accuracy")
    step = max(1, -(-len(entries) // 8))
    shown = list(places)[::step]
    axis.set_xticks(shown, [str(entries[x - 1].get("when", ""))[:10] for x in shown])
    axis.legend(loc="best")
    header = ("when", "verdict", *_SHOWN)
    rows = [
        (e.get("when", ""), e.get("verdict", ""), *(e["figures"].get(key) for key in _SHOWN))
        for e in entries
    ]
    return report.figures.save_figure(figure, directory, name, header, rows)

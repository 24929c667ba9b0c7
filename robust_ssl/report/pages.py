"""`report.md`: the answer first, then what it rests on, then how it was run."""

from __future__ import annotations

import json
import math
import os
import pathlib
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from robust_ssl import words
from robust_ssl.evaluation import WORST
from robust_ssl.report import claims, sentences, tables
from robust_ssl.report.cases import Document, Entry, worst_cases
from robust_ssl.report.comparison import FIELDS, SHARES, Outcomes, Summary, differences, summarize
from robust_ssl.report.figures import Folder, attempt, figure_epsilon, files_of
from robust_ssl.report.gains import share_table
from robust_ssl.report.pareto import figure_pareto, points_of
from robust_ssl.report.tables import budget, names
from robust_ssl.report.text import csv_text, markdown_table
from robust_ssl.workdir import json_ready, write_atomically

# How to read a figure, by the word its file name begins with.
CAPTIONS = {
    "examples": (
        "Images without and under attack, and the change, amplified; what the model says is bold "
        "where the attack changed it."
    ),
    "epsilon": (
        "Accuracy against the attacker's budget, with 95 % intervals as bands; a robust model "
        "stays level to the right."
    ),
    "pareto": (
        "Clean against robust accuracy; the area of a mark is the cost, and no believable recipe "
        "lies above or right of the blue steps."
    ),
    "sensitivity": (
        "How much the robust loss rises when one layer's weights are perturbed; the short bars, "
        "robust-redundant layers, are fine-tuned."
    ),
    "stability": (
        "How far the attack moves each layer's output, relative to its size; the lower, the less "
        "of the attack gets through."
    ),
    "layers": (
        "Each layer's output under one attack against the clean output: 1 is unchanged for cosine "
        "and CKA, 0 for relative drift. Bottom, where measured: how much robustness hangs on the "
        "layer's weights."
    ),
    "energy": (
        "Where each perturbation has its energy, by band of spatial frequency; white noise has the "
        "more the wider the ring."
    ),
    "fourier": (
        "Harm done by noise of each single frequency at one L2 norm, low ones in the middle; "
        "dashed: the most harmful band."
    ),
    "filtering": (
        "Accuracy when only frequencies below (low-pass) or above (high-pass) a cutoff are left. "
        "The frequencies that harm are where a curve leaves the dotted line for the gray one."
    ),
    "transfer": (
        "A perturbation crafted on each row's encoder, applied to a classifier on each column's. A "
        "bright column resists; a row dark off the diagonal transfers."
    ),
}
DIFFERENCES = (
    "Points more than {leader} has on the same images, ± the 95 % half-width. With several seeds, "
    "at least both deviations over them. **Bold**: more than chance, each pair by itself. Of "
    "twenty comparisons without a difference, one is bold too."
)


def write_report(
    workdir: Folder,
    document: Document,
    *,
    curves=None,
    outcomes: Outcomes | None = None,
    figures=(),
) -> list[pathlib.Path]:
    """Writes ``report.md`` and its tables as CSV; each is replaced whole.

    ``results.csv`` has the worst cases, ``attacks.csv`` every attack.  Where recipes were
    compared, ``comparison.csv`` has the rows, and ``differences.csv`` how the recipes differ on
    the same images.

    Args:
      workdir: Where to write.
      document: ``results.json``.
      curves: By model as for `figure_epsilon`, which is then drawn.
      outcomes: By recipe and share, in what part of the seeds each image was right.
      figures: Paths of PNG files, absolute or from the current directory.  A comparison's
        ``pareto.png`` is drawn if it is not among them.

    Returns:
      The paths of page and tables, and of each figure with what lies beside it.

    Raises:
      UnwritableError: If one of them cannot be written.
    """
    workdir = pathlib.Path(workdir)
    comparison = document["comparison"]
    summary = summarize(comparison["rows"], outcomes) if comparison else {}
    lines, leader = _differences(document, summary)
    # Drawn before the page is written: its links must not point to what is not there.
    figures = [pathlib.Path(figure) for figure in figures]
    if "pareto" not in [figure.stem for figure in figures]:
        points = points_of(summary)
        texts = {"label_clean": "clean accuracy", "label_robust": "accuracy under both suites"}
        if len(points) > 1:  # one point has no trade-off
            figures[:0] = attempt(figure_pareto, workdir / "figures", points, **texts)
    if curves:
        figures += attempt(_epsilon, workdir / "figures", document, curves, name="epsilon")
    names_of = (document["run"][part]["name"] for part in ("encoder", "downstream"))
    sections = [
        "# Robustness of {} on {}".format(*map(words.markdown, names_of)),
        _bullets(sentences.answer(document, summary)),
        _claims(comparison),
        _markdown_headline(document),
        words.markdown(tables.headline_caption(document)),
        _notes(comparison) or _skipped(document["run"]),
        *_section("Plots", [figure_section(figure, workdir) for figure in figures]),
        *_section("Can the figures under attack be believed?", [_verdicts(document)]),
        *_section("All tables", _tables(document, summary, lines, leader)),
        # Last and partly folded: it is longest, and who only reads the answer needs none of it.
        *_section("How it was run", _run(document["run"])),
    ]
    texts = {
        "results.csv": csv_text(tables.entry_rows(_worst(document))),
        "attacks.csv": csv_text(tables.entry_rows(document["results"])),
    }
    if comparison:
        texts["comparison.csv"] = csv_text(comparison["rows"], FIELDS)
    if lines:
        texts["differences.csv"] = csv_text(lines)
    texts["report.md"] = "\n\n".join(filter(None, sections)) + "\n"
    for name, text in texts.items():
        write_atomically(workdir / name, text)
    drawn = [file for figure in figures for file in files_of(figure) if file.is_file()]
    return [*(workdir / name for name in texts), *drawn]


def print_summary(
    document: Document, console: Any = None, *, outcomes: Outcomes | None = None
) -> None:
    """Prints the first table, 80 columns wide, the answer and the claims.

    The console is a ``rich.console.Console``, None standard output.
    """
    import rich.console

    console = console or rich.console.Console()
    tables.print_headline(document, console)
    comparison = document["comparison"]
    summary = summarize(comparison["rows"], outcomes) if comparison else {}
    for sentence in [*sentences.answer(document, summary), *_claim_sentences(comparison)]:
        text = words.encodable(words.line(sentence), console.encoding)
        console.print(text, markup=False, highlight=False, emoji=False)


def _differences(document: Document, summary: Summary) -> tuple[list[dict[str, str]], str]:
    comparison = document["comparison"]
    if not comparison:
        return [], ""
    claimed = [claim["claim"] for claim in comparison["claims"]]
    leader = claims.leader_of(claimed, comparison["baseline"])
    return (differences(summary, leader), leader) if leader in summary else ([], "")


def _epsilon(directory: pathlib.Path, document: Document, curves, *, name: str) -> pathlib.Path:
    shown = names(document["models"])
    verdicts = {shown[model]: verdict for model, verdict in document["verdicts"].items()}
    named = {shown.get(model, model): curve for model, curve in curves.items()}
    return figure_epsilon(directory, named, verdicts=verdicts, name=name)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {words.markdown(line)}" for line in lines)


def _section(title: str, parts: Sequence[str]) -> list[str]:
    return [f"## {title}", *parts] if any(parts) else []


def _markdown_headline(document: Document) -> str:
    rows = []
    for cells in tables.headline_cells(document):
        row = {}
        for heading, (value, *rest) in cells.items():
            intervals = [f"({interval})" for interval in rest[:1]]
            row[heading] = " ".join([value, *intervals, *rest[1:]])
        rows.append(row)
    return markdown_table(rows)


def _claim_sentences(comparison: Mapping[str, Any] | None) -> list[str]:
    return [claim["sentence"] for claim in comparison["claims"]] if comparison else []


def _claims(comparison: Mapping[str, Any] | None) -> str:
    lines = _claim_sentences(comparison)
    # The line between keeps Markdown from making one list of the answer and the claims.
    return f"Claims, held against these measurements:\n\n{_bullets(lines)}" if lines else ""


def _notes(comparison: Mapping[str, Any] | None) -> str:
    if not comparison:
        return ""
    failed = [f"{name} failed: {why}" for name, why in comparison["failed"].items()]
    return _bullets([*comparison["sentences"], *failed])


def _skipped(run: Mapping[str, Any]) -> str:
    return _bullets(
        f"{model}: {how_many} updates were not finite and were skipped."
        for model, how_many in run.get("skipped_updates", {}).items()
    )


def _verdicts(document: Document) -> str:
    lines = sentences.verdict_lines(document)
    return "\n".join(
        f"{'  ' * line.startswith('  ')}- {words.markdown(line.strip())}" for line in lines
    )


def _tables(document: Document, summary: Summary, lines, leader: str) -> list[str]:
    shown = names(document["models"])
    parts = []
    if summary:
        parts += ["### Recipes", *_narrow(tables.summary_rows(summary, SHARES))]
        parts.append(markdown_table(tables.summary_rows(summary, tables.COST_COLUMNS)))
        parts.append(tables.legend(summary))
    if lines:
        leader = words.markdown(leader)
        parts += [f"### Against {leader}", *_narrow(tables.difference_rows(lines))]
        parts.append(DIFFERENCES.format(leader=leader))
    parts += _shares(document["comparison"])
    rows = tables.attack_rows(_worst(document), shown)
    parts += ["### Worst cases per image", markdown_table(rows)]
    parts.append("Attack success: turned wrong, of the images that were right.")
    # Folded: thirty recipes under ten attacks are hundreds of lines, which attacks.csv has too.
    single = [entry for entry in document["results"] if entry["attack"] != WORST]
    rows = tables.attack_rows(single, shown)
    parts.append(_folded("Every attack", markdown_table(rows)) if rows else "")
    return parts


def _narrow(rows: tables.Rows, most: int = 6) -> list[str]:
    """Returns rows as tables of at most so many columns, the first column in each of them."""
    first, *others = rows[0]
    count = max(1, math.ceil(len(others) / (most - 1)))
    width = math.ceil(len(others) / count)
    parts = [others[start : start + width] for start in range(0, len(others), width)] or [[]]
    return [markdown_table([{n: row[n] for n in (first, *part)} for row in rows]) for part in parts]


def _shares(comparison: Mapping[str, Any] | None) -> list[str]:
    """A table for each claim on a share of a gain."""
    parts = []
    for judged in comparison["claims"] if comparison else ():
        if not judged.get("shares"):
            continue
        claim = judged["claim"]
        place = claims.PLACES[claim.get("by", "robust_worst")]
        title = words.markdown(f"Shares of {claim['of']}'s gain over {claim['over']}, {place}")
        parts += [f"### {title}", markdown_table(share_table(judged["shares"]))]
        parts.append("By Fieller, over the seeds and the images that the three recipes share.")
    return parts


def _worst(document: Document) -> list[Entry]:
    cases = worst_cases(document["results"]).values()
    return [entry for by_model in cases for entry in by_model.values()]


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def _run(run: Mapping[str, Any]) -> list[str]:
    surrogate = run.get("surrogate")
    suite = run["suite"]
    attacks, seeds = _cell(suite["attacks"]), _cell(suite["seeds"])
    lines = [
        f"Encoder: {_cell(run['encoder'])}.",
        f"Downstream set: {_cell(_basics(run['downstream']))}.",
        *_data_notes(run["downstream"]),
        f"Surrogate set, the attacker's: {_cell(surrogate)}." if surrogate else "",
        f"Suite, at {budget(suite['epsilon'])}: {attacks}; seeds {seeds}.",
        f"Seeds of training: {_cell(run['seeds'])}." if run["seeds"] else "",
    ]
    known = ("encoder", "downstream", "surrogate", "suite", "seeds", "config", "balanced_accuracy")
    rest = {name: entry for name, entry in run.items() if name not in known}
    text = _bullets(f"{name}: {_cell(entry)}" for name, entry in rest.items())
    parts = [_bullets(filter(None, lines)), _folded("Versions and devices", text) if rest else ""]
    if run.get("config"):
        config = json.dumps(json_ready(run["config"]), indent=2)
        parts.append(_folded("Configuration", f"```json\n{config}\n```"))
    return parts


def _data_notes(downstream: Mapping[str, Any]) -> list[str]:
    """What was left out where images were read, and how many are in both splits."""
    lines = [f"Note on {note}." for note in downstream.get("notes", ())]
    if downstream.get("test_among_train") is not None:
        shared, test = downstream["test_among_train"], downstream["test"]
        lines.append(f"Test images among the training images: {shared:,} of {test:,}.")
    distinct = downstream.get("test_distinct")
    if distinct is not None and distinct < downstream["test"]:
        lines.append(f"Different test images: {distinct:,} of {downstream['test']:,}.")
    return lines


def _basics(downstream: Mapping[str, Any]) -> dict[str, Any]:
    """Name and numbers of images; the rest of the entry is said elsewhere."""
    said = ("largest_class", "test_among_train", "test_distinct", "notes")
    return {name: entry for name, entry in downstream.items() if name not in said}


def _cell(entry: Any) -> str:
    if isinstance(entry, Mapping):
        parts = [f"{name} {_cell(value)}" for name, value in entry.items()]
        return ", ".join(part.removeprefix("name ") for part in parts)
    if isinstance(entry, list | tuple):
        return ", ".join(map(_cell, entry))
    return f"{entry:,}" if isinstance(entry, int) and not isinstance(entry, bool) else str(entry)


def figure_section(figure: Folder, folder: Folder) -> str:
    """Returns a PNG with its caption and what lies beside it, as Markdown of a page in a folder."""
    # Of absolute paths: a reader opens the page from its folder, not from where the run was begun.
    path = pathlib.Path(os.path.relpath(os.path.abspath(figure), os.path.abspath(folder)))
    caption = next((text for word, text in CAPTIONS.items() if path.stem.startswith(word)), "")
    stem = urllib.parse.quote(path.with_suffix("").as_posix(), errors="surrogateescape")
    links = f"[SVG]({stem}.svg) [CSV]({stem}.csv)"
    text = f"*{caption}* {links}" if caption else links
    return f"![{words.markdown(path.stem)}]({stem}{path.suffix})\n\n{text}"

"""The tables of a report, for Markdown, CSV and the terminal; the first says what matters most."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from robust_ssl import words
from robust_ssl.evaluation import WORST, wilson_interval
from robust_ssl.evaluation.checks.result import NOT_BELIEVABLE, NOT_EXAMINED
from robust_ssl.report import majority
from robust_ssl.report.cases import (
    SOURCES,
    Document,
    Entry,
    Group,
    group_of,
    strongest_cases,
    suite_cases,
    worst_cases,
)
from robust_ssl.report.comparison import COLUMNS, COSTS, SHARES, VERDICTS, Estimate, Summary
from robust_ssl.report.results import METRICS

LABELS = {  # of recipes whose name alone says too little
    "baseline": "baseline (frozen encoder)",
    "full": "full (all layers fine-tuned)",
}
CRAFTED_ON = {"public": "public encoder", "hardened": "itself", "twin": "twin"}
CRAFTED_ON |= {"half": "half twin", "labelled": "itself, with labels"}
MARK = "NOT BELIEVABLE"


class Share(NamedTuple):
    """A share over seeds, with the 95 % interval over its images."""

    mean: float
    low: float
    high: float
    deviation: float | None
    n: int


class Line(NamedTuple):
    """A recipe, or a classifier that no recipe made, in the first table.

    `attacked` is the worst over both sources of the suite; `strongest` is under AutoAttack, else
    per image; the verdict is the worst over the seeds.  None is not measured.
    """

    name: str
    clean: Share
    attacked: Share
    strongest: Share | None
    cost: float | None
    verdict: str


def label(name: str) -> str:
    """Returns what tables and figures call a recipe: its name, with words where that misleads."""
    return LABELS.get(name, name)


def names(models: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Returns the name by which each model is shown: its recipe's, with the seed if several.

    Example:
      >>> names({"a-seed0": {"recipe": "a", "seed": 0}, "mine": {"recipe": None, "seed": None}})
      {'a-seed0': 'a', 'mine': 'mine'}
    """
    recipes = [origin["recipe"] for origin in models.values()]
    shown = {}
    for model, origin in models.items():
        name = origin["recipe"] or model
        shown[model] = f"{name}, seed {origin['seed']}" if recipes.count(name) > 1 else name
    return shown


def budget(epsilon: float, threat: str = "Linf") -> str:
    """Returns a budget as people write it.

    Example:
      >>> budget(8 / 255), budget(0.5, "L2"), budget(0.03, "Patch")
      ('8/255', '0.5 (L2)', '3 % of the area')
      >>> budget(8 / 255, "Linf, 0-0.125 cycles/pixel"), budget(math.nan, "Mine")
      ('8/255 (0-0.125 cycles/pixel)', 'unknown (Mine)')
    """
    kind, _, band = threat.partition(", ")
    if kind == "Patch":
        return f"{round(100 * epsilon, 2):g} % of the area"
    words = ", ".join(word for word in (kind, band) if word not in ("Linf", "unknown", ""))
    text = f"{epsilon:g}" if kind == "L2" else f"{round(epsilon * 255, 2):g}/255"
    text = "unknown" if math.isnan(epsilon) else text
    return f"{text} ({words})" if words else text


def percent(share: float) -> float:
    """Returns per cent rounded as shown, so that differences in a text agree with the tables."""
    return round(100 * share, 1)


def over_seeds(shares: Sequence[float], n: int) -> Share:
    """Summarizes one share over seeds, which share their images.

    Example:
      >>> share = over_seeds([0.4, 0.6], n=50)
      >>> share.mean, share[1:3] == over_seeds([0.5], n=50)[1:3]  # seeds do not narrow it
      (0.5, True)
    """
    mean = statistics.fmean(shares)
    low, high = wilson_interval(round(mean * n), n)  # of the mean: the images are the same
    return Share(mean, low, high, statistics.stdev(shares) if len(shares) > 1 else None, n)


def headline(document: Document) -> list[Line]:
    """Returns the lines of the first table, the most robust first."""
    members: dict[str, list[str]] = {}
    scored = {entry["model"] for entry in document["results"]}
    for model, origin in document["models"].items():
        if model in scored:
            members.setdefault(origin["recipe"] or model, []).append(model)
    lines = [_line(document, name, models) for name, models in members.items()]
    # What is not examined or not believable stands last: a rank among others would be a claim.
    ranks = {NOT_EXAMINED: 1, NOT_BELIEVABLE: 2}
    return sorted(lines, key=lambda line: (ranks.get(line.verdict, 0), -line.attacked.mean))


def _line(document: Document, name: str, models: Sequence[str]) -> Line:
    suite = _lowest(suite_cases(document), models)
    suite = suite or _lowest(worst_cases(document["results"]), models)
    strongest = _lowest(strongest_cases(document), models)
    comparison = document["comparison"] or {"rows": []}
    rows = [row for row in comparison["rows"] if row["recipe"] == name]
    # A row has the worst case over both suites image by image, which is below either suite's.
    attacked = [row["robust_worst"] for row in rows] or _robust(suite)
    costs = [row["cost_factor"] for row in rows if row["cost_factor"]]
    n = suite[0]["n"]
    return Line(
        name,
        clean=over_seeds([entry["clean_accuracy"] for entry in suite], n),
        attacked=over_seeds(attacked, n),
        strongest=over_seeds(_robust(strongest), strongest[0]["n"]) if strongest else None,
        cost=statistics.fmean(costs) if costs else None,
        verdict=max((entry["verdict"] for entry in suite), key=VERDICTS.index),
    )


def _robust(entries: Iterable[Entry]) -> list[float]:
    return [entry["robust_accuracy"] for entry in entries]


def _lowest(cases: Mapping[Group, Mapping[str, Entry]], models: Iterable[str]) -> list[Entry]:
    """Returns each model's entry of the lowest robust accuracy; of one without an entry, none."""
    lowest = []
    for model in models:
        entries = [by_model[model] for by_model in cases.values() if model in by_model]
        if entries:
            lowest.append(min(entries, key=lambda entry: entry["robust_accuracy"]))
    return lowest


Rows = list[dict[str, str]]  # heading to text

FAMILIES = {"universal": "universal", "per_image": "per image", "autoattack": "AutoAttack"}
COST_COLUMNS = [name for name in COSTS if name != "gradients_per_epoch"]  # six with the recipe


def headline_cells(document: Document) -> list[dict[str, tuple[str, ...]]]:
    """Returns the first table, at most six columns: by heading the pieces of text of a cell."""
    lines = headline(document)
    strongest = next(iter(strongest_cases(document)), None)
    family = FAMILIES[strongest.family] if strongest else ""
    rows = []
    for line in lines:
        # In each cell too: a figure is quoted without its row.
        mark = (MARK,) if line.verdict == NOT_BELIEVABLE else ()
        row = {
            "recipe": (label(line.name),),
            "clean": _share_cell(line.clean),
            "under attack": _share_cell(line.attacked, mark),
        }
        if strongest:
            row[family] = _share_cell(line.strongest, mark) if line.strongest else ("n/a",)
        if any(each.cost for each in lines):
            row["cost"] = (f"{line.cost:.1f}x" if line.cost else "n/a",)
        rows.append({**row, "verdict": (MARK if mark else line.verdict,)})
    return [*rows, *_one_answer_cells(document, rows[0])]


def _one_answer_cells(document: Document, like: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The line of an imbalanced set: what is reached without looking at an image."""
    if (largest := majority.largest_class(document)) is None:
        return []
    name, images, n = largest
    share = over_seeds([images / n], n)
    filled = {"recipe": (f"always {name!r}",), "clean": _share_cell(share)}
    filled |= {"under attack": _share_cell(share), "verdict": ("no model",)}
    return [{heading: filled.get(heading, ("n/a",)) for heading in like}]


def _share_cell(share: Share, mark: Sequence[str] = ()) -> tuple[str, ...]:
    spread = "" if share.deviation is None else f" ± {percent(share.deviation)}"
    interval = f"{100 * share.low:.0f}-{100 * share.high:.0f}"
    return (f"{percent(share.mean)}{spread} %", interval, *mark)


def headline_caption(document: Document) -> str:
    """Returns what the columns of the first table mean, in short sentences."""
    group, *others = suite_cases(document)
    over = "the lower of both suites" if others else SOURCES[group.crafted_against]
    over = "the worst case over both suites" if document["comparison"] else over
    parts = [
        f"Accuracy with its 95 % interval, in per cent. Under attack: {over}, "
        f"{FAMILIES[group.family]} attacks of {budget(group.epsilon, group.threat)}."
    ]
    for group, models in list(strongest_cases(document).items())[:1]:
        limit, images = budget(group.epsilon, group.threat), next(iter(models.values()))["n"]
        members = {e["attack"] for e in document["results"] if e["family"] == "autoattack"}
        of = " and ".join(sorted(members - {WORST})) if group.family == "autoattack" else ""
        # Half of the ensemble is not to be taken for it.
        alone = f", {of} alone" if of and "square" not in members else ""
        parts.append(f"{FAMILIES[group.family]}: {limit} on {images:,} images{alone}.")
    reference = (document["comparison"] or {}).get("reference")
    if reference:
        parts.append(f"Cost: training time relative to {reference}.")
    parts.append("Verdict: whether the figures under attack can be believed.")
    parts.append(majority.sentences(document, names(document["models"])))
    return " ".join(filter(None, parts))


_NARROW = 70  # columns of a terminal that the table does not fit


def print_headline(document: Document, console: Any) -> None:
    """Prints the first table to a ``rich.console.Console``, 80 columns wide.

    On a narrow one each recipe has lines of its own: a figure that is cut is another figure.
    """
    import rich.box
    import rich.table
    import rich.text

    rows = headline_cells(document)
    if console.width < _NARROW:
        for row in rows:
            lines = [f"{heading}: {' '.join(map(words.line, row[heading]))}" for heading in row]
            text = words.encodable("\n  ".join(lines), console.encoding)
            console.print(rich.text.Text(f"{text}\n"))
        return
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in rows[0]:
        is_text = heading in ("recipe", "verdict")
        # Folded: two names that are cut short may look alike.
        table.add_column(heading, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        # In two lines each, so that six columns fit eighty characters.
        cells = ["\n".join(map(words.line, cell)) for cell in row.values()]
        cells = [words.encodable(cell, console.encoding) for cell in cells]
        cells = [cell.replace(MARK, "NOT\nBELIEVABLE") for cell in cells]
        # As text: rich would read a name in brackets as a color or a link.
        table.add_row(*(rich.text.Text(cell.replace(", with", ",\nwith")) for cell in cells))
    console.print(table)


def attack_rows(results: Iterable[Entry], shown: Mapping[str, str]) -> Rows:
    """Returns a table of attacks on models, each over its seeds; `shown` names the models."""
    by_attack: dict[tuple, list[Entry]] = {}
    for entry in results:
        key = (entry["model"], group_of(entry), entry["attack"])
        by_attack.setdefault(key, []).append(entry)
    rows = []
    for (model, group, attack), entries in by_attack.items():
        mark = f" {MARK}" if entries[0]["verdict"] == NOT_BELIEVABLE else ""
        robust = [entry["robust_accuracy"] for entry in entries]
        value, interval = _share_cell(over_seeds(robust, entries[0]["n"]))
        success = statistics.fmean(entry["attack_success_rate"] for entry in entries)
        name = f"{attack} of {FAMILIES[group.family]}" if attack == WORST else attack
        crafted_on = CRAFTED_ON[group.crafted_against]
        row = {"recipe": label(shown[model]), "attack": name, "crafted on": crafted_on}
        row["budget"] = budget(group.epsilon, group.threat)
        row["under attack"] = f"{value} ({interval}){mark}"
        row["attack success"] = f"{percent(success)} %{mark}"
        rows.append(row)
    return rows


def entry_rows(results: Iterable[Entry]) -> list[dict[str, Any]]:
    """Returns entries as rows that a program can sort and plot: shares, not per cent."""
    names = ("model", "verdict", "family", "crafted_against", "threat", "epsilon", "attack", "seed")
    names += ("n", *METRICS, "robust_low", "robust_high", "seconds", "gradient_evaluations")
    rows = []
    for entry in results:
        low, high = entry["ci95"]["robust_accuracy"]
        whole = {**entry, "robust_low": low, "robust_high": high}
        rows.append({name: whole[name] for name in names})
    return rows


def summary_rows(summary: Summary, columns: Iterable[str]) -> Rows:
    """Returns shares or costs, names in `COLUMNS`, of each recipe of a comparison."""
    measured = _measured(summary, columns)
    rows = []
    for recipe, part in summary.items():
        row = {"recipe": label(recipe)}
        for name in measured:
            attacked = name in SHARES and name != "clean" and part[name].n
            mark = f" {MARK}" if attacked and part["verdict"] == NOT_BELIEVABLE else ""
            row[COLUMNS[name].heading] = _estimate(part[name], name, part["seeds"]) + mark
        rows.append(row)
    return rows


def _measured(summary: Summary, columns: Iterable[str]) -> list[str]:
    # A column of "n/a" only says nothing and takes the place of one that does.
    return [name for name in columns if any(part[name].n for part in summary.values())]


def _estimate(estimate: Estimate, name: str, seeds: int) -> str:
    column = COLUMNS[name]
    if estimate.mean is None:
        return "n/a"
    # What a step costs is measured once for a recipe: its deviation of zero would be no finding.
    shown = estimate[:1] if name in COSTS and name != "training_seconds" else estimate[:2]
    values = [value for value in shown if value is not None]
    text = " ± ".join(f"{column.scale * value:,.{column.decimals}f}" for value in values)
    part = f" ({estimate.n} of {seeds} seeds)" if estimate.n < seeds else ""
    return f"{text}{column.unit}{part}"


def legend(summary: Summary) -> str:
    """Returns the meaning of the columns of a comparison, one line each."""
    shown = _measured(summary, (*SHARES, *COST_COLUMNS))
    lines = [f"- {COLUMNS[name].heading}: {COLUMNS[name].meaning}." for name in shown]
    lines.append(f"- {_images(summary, 'images')}")
    if "autoattack" in shown:
        lines.append(f"- AutoAttack: {_images(summary, 'autoattack_images')}")
    if any(part["seeds"] > 1 for part in summary.values()):
        lines.append(
            "- Several seeds: mean ± sample standard deviation over them; costs were measured once."
        )
    return "\n".join(lines)


def _images(summary: Summary, name: str) -> str:
    # Of the fewest images, at a share of one half, where an interval is widest.
    counts = sorted({part[name] for part in summary.values()} - {None})
    low, high = wilson_interval(counts[0] // 2, counts[0])
    return (
        f"{' or '.join(f'{count:,}' for count in counts)} test images: a share is known to "
        f"± {50 * (high - low):.1f} points or better (95 % interval)."
    )


def difference_rows(lines: Sequence[Mapping[str, str]]) -> Rows:
    """Returns what `robust_ssl.report.comparison.differences` found as a table, in points."""
    rows: dict[str, dict[str, str]] = {}
    known = {line["share"] for line in lines}  # a share that no recipe has needs no column
    blank = {column.heading: "n/a" for share, column in SHARES.items() if share in known}
    for line in lines:
        row = rows.setdefault(line["recipe"], {"recipe": label(line["recipe"]), **blank})
        value, half = (100 * float(line[name]) for name in ("difference", "half_width"))
        text = f"{value:+.1f} ± {half:.1f}"
        text = f"**{text}**" if line["decided"] == "yes" else text
        mark = f" {MARK}" if line["verdict"] else ""
        row[SHARES[line["share"]].heading] = words.Markup(text + mark)
    return list(rows.values())

"""The tables of a run and the sentences they allow, for Markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from robust_ssl.evaluation import WORST
from robust_ssl.report.results import METRICS

MODELS = {
    "usual": "usual fine-tuning",
    "stage1": "secure stage 1",
    "stage2": "secure stage 2",
}
SOURCES = {
    "public": "crafted on the public encoder",
    "hardened": "crafted again on the fine-tuned model",
}
HEADINGS = ("clean accuracy", "robust accuracy", "attack success rate", "fooling rate")

Entry = Mapping[str, Any]
Cell = tuple[str, ...]  # its lines: the value, then the count, then the interval


class Table(NamedTuple):
    """A table before it is drawn.

    Attributes:
      title: One line.
      columns: Headings.
      rows: Cells, each a tuple of lines.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]


def budget(epsilon: float) -> str:
    """Returns an epsilon as people write it.

    Example:
      >>> budget(8 / 255)
      '8/255'
    """
    return f"{round(epsilon * 255, 2):g}/255"


def headline(results: Sequence[Entry]) -> dict[tuple[str, float], dict[str, Entry]]:
    """Returns the worst case of each model, by whose weights the attacker saw and by epsilon.

    Args:
      results: Entries of ``results.json``.

    Returns:
      ``{(crafted_against, epsilon): {model: entry}}``, the public encoder first.  The entry is
      the one called ``"worst"`` where there is one, else that of the lowest robust accuracy.
    """
    groups: dict[tuple[str, float], dict[str, list[Entry]]] = {}
    for entry in results:
        models = groups.setdefault((entry["crafted_against"], entry["epsilon"]), {})
        models.setdefault(entry["model"], []).append(entry)

    def worst(entries: list[Entry]) -> Entry:
        named = [entry for entry in entries if entry["attack"] == WORST]
        return named[0] if named else min(entries, key=lambda entry: entry["robust_accuracy"])

    by_source = sorted(groups, key=lambda group: list(SOURCES).index(group[0]))
    return {
        group: {model: worst(groups[group][model]) for model in MODELS if model in groups[group]}
        for group in by_source
    }


def tables(results: Sequence[Entry], costs: Mapping[str, Mapping[str, float]]) -> list[Table]:
    """Lays out the worst case of each model first, then, where there are several, every attack.

    Args:
      results: Entries of ``results.json``.
      costs: What fine-tuning took, ``{model: {"seconds": ..., "gradient_evaluations": per
        training image}}``; a model may be absent.

    Returns:
      One table per source and epsilon of the attacks, and one of all attacks.
    """
    drawn = _worst_cases(results, costs)
    single = [entry for entry in results if entry["attack"] != WORST]
    if len({entry["attack"] for entry in single}) > 1:
        drawn.append(_every_attack(single))
    return drawn


def _worst_cases(results: Sequence[Entry], costs: Mapping[str, Mapping[str, float]]) -> list[Table]:
    drawn = []
    for group, models in headline(results).items():
        rows = []
        for model, entry in models.items():
            cost = costs.get(model, {})
            rows.append(
                (
                    (MODELS[model],),
                    *(_share(entry, metric) for metric in METRICS),
                    (_number(cost.get("seconds")),),
                    (_number(cost.get("gradient_evaluations")),),
                )
            )
        attacks = [e["attack"] for e in results if (e["crafted_against"], e["epsilon"]) == group]
        columns = ("model", *HEADINGS, "seconds", "gradients per image")
        drawn.append(Table(_title(group, models, attacks), columns, rows))
    return drawn


def _title(group: tuple[str, float], models: Mapping[str, Entry], attacks: Sequence[str]) -> str:
    names = list(dict.fromkeys(name for name in attacks if name != WORST))
    over = f" over {', '.join(names)}" if names else ""
    if len(names) == 1:
        what = names[0]
    elif all(entry["attack"] == WORST for entry in models.values()):
        what = f"Worst case per image{over}"
    else:
        what = f"Lowest robust accuracy{over}"
    return f"{what}; {SOURCES[group[0]]}, epsilon {budget(group[1])}"


def _every_attack(results: Sequence[Entry]) -> Table:
    places = list(MODELS)
    rows = [
        (
            (MODELS[entry["model"]],),
            (entry["attack"],),
            (entry["crafted_against"],),
            (budget(entry["epsilon"]),),
            *(_share(entry, metric) for metric in METRICS[1:]),
            (_number(entry["seconds"]),),
            (_number(entry["gradient_evaluations"]),),
        )
        for entry in sorted(results, key=lambda entry: places.index(entry["model"]))
    ]
    columns = ("model", "attack", "crafted on", "epsilon", *HEADINGS[1:])
    return Table("Every attack", (*columns, "seconds", "gradients per image"), rows)


def summary_table(
    results: Sequence[Entry], costs: Mapping[str, Mapping[str, float]] | None = None
) -> str:
    """Returns the tables of a run as Markdown.

    A share reads ``93.1 % (335/360; 90.0-95.2)``: value, count, 95 % interval.

    Args:
      results: Entries of ``results.json``.
      costs: As for `tables`.
    """
    parts = []
    for table in tables(results, costs or {}):
        lines = [f"**{table.title}**", "", _row(table.columns)]
        lines.append("|" + "|".join([" --- "] + [" ---: "] * (len(table.columns) - 1)) + "|")
        lines += [_row([_flat(cell) for cell in row]) for row in table.rows]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def print_table(
    results: Sequence[Entry],
    costs: Mapping[str, Mapping[str, float]] | None = None,
    *,
    console: Any = None,
) -> None:
    """Prints the worst case of each model to the terminal, 80 columns wide.

    Below each share stand its count and its 95 % interval in per cent.

    Args:
      results: Entries of ``results.json``.
      costs: As for `tables`.
      console: A ``rich.console.Console``; None is standard output.
    """
    import rich.box
    import rich.console
    import rich.table

    console = console or rich.console.Console()
    for table in _worst_cases(results, costs or {}):
        drawn = rich.table.Table(
            title=table.title,
            caption="share, count, 95 % interval; seconds and gradients: cost of fine-tuning",
            box=rich.box.SIMPLE_HEAD,
            padding=(0, 1, 1, 0),
        )
        drawn.add_column("model", no_wrap=True)
        for column in table.columns[1:]:
            drawn.add_column(column.replace(" ", "\n"), justify="right", no_wrap=True)
        for row in table.rows:
            name, *shares = row
            drawn.add_row(name[0].replace(" ", "\n", 1), *("\n".join(cell) for cell in shares))
        console.print(drawn)


def conclusions(results: Sequence[Entry]) -> list[str]:
    """Says in plain sentences what the first table shows; nothing that it does not show.

    Args:
      results: Entries of ``results.json``.

    Returns:
      One to four sentences.
    """
    groups = headline(results)
    (source, epsilon), models = next(iter(groups.items()))
    said = [
        f"With {MODELS[model]}, the attack {SOURCES[source]} (epsilon {budget(epsilon)}) "
        f"{_change(entry)}."
        for model, entry in models.items()
        if model != "stage1" or "stage2" not in models
    ]
    if "usual" in models and "stage2" in models:
        said.append(_comparison(models["usual"], models["stage2"]))
    adaptive = [models for (source, _), models in groups.items() if source == "hardened"]
    if source == "public" and adaptive and "stage2" in adaptive[0]:
        entry = adaptive[0]["stage2"]
        said.append(
            f"{SOURCES['hardened'].capitalize()} (secure stage 2, epsilon "
            f"{budget(entry['epsilon'])}), the attack {_change(entry)}."
        )
    return said


def _change(entry: Entry) -> str:
    clean, robust = (_points(entry[name]) for name in ("clean_accuracy", "robust_accuracy"))
    verb = "takes" if clean >= robust else "adds"
    return f"{verb} {abs(clean - robust):.1f} points of accuracy ({clean} % to {robust} %)"


def _comparison(usual: Entry, secure: Entry) -> str:
    gain = _points(secure["robust_accuracy"]) - _points(usual["robust_accuracy"])
    price = _points(usual["clean_accuracy"]) - _points(secure["clean_accuracy"])
    text = (
        f"Secure fine-tuning {'gains' if gain >= 0 else 'loses'} {abs(gain):.1f} points under "
        f"attack and {'costs' if price >= 0 else 'gains'} {abs(price):.1f} points of clean accuracy"
    )
    first, second = (entry["ci95"]["robust_accuracy"] for entry in (usual, secure))
    if first[0] <= second[1] and second[0] <= first[1]:
        text += "; the two intervals of robust accuracy overlap, so the first may be chance"
    return text + "."


def _points(share: float) -> float:
    # Rounded as it is shown, so that differences in the text agree with the table.
    return round(100 * share, 1)


def _share(entry: Entry, metric: str) -> Cell:
    correct = round(entry["clean_accuracy"] * entry["n"])
    whole = correct if metric == "attack_success_rate" else entry["n"]
    low, high = entry["ci95"][metric]
    return (
        f"{_points(entry[metric])} %",
        f"{round(entry[metric] * whole)}/{whole}",
        f"{100 * low:.1f}-{100 * high:.1f}",
    )


def _number(value: float | None) -> str:
    if value is None:
        return "n/a"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def _flat(cell: Cell) -> str:
    return cell[0] if len(cell) == 1 else f"{cell[0]} ({'; '.join(cell[1:])})"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

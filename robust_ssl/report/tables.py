"""The tables of a run and the sentences they allow, for Markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from robust_ssl.evaluation import WORST
from robust_ssl.report.results import METRICS, NOT_TRUSTED

MODELS = {
    "usual": "usual fine-tuning",
    "stage1": "secure stage 1",
    "stage2": "secure stage 2",
}
METHODS = {"usual": "usual (frozen encoder)"}  # the reference of a comparison trains all layers
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


class Group(NamedTuple):
    """Attacks whose worst case per image is one figure."""

    crafted_against: str
    family: str
    threat: str
    epsilon: float


def group_of(entry: Entry) -> Group:
    """Returns the group of an entry of ``results.json``."""
    return Group(*(entry[field] for field in Group._fields))


def budget(epsilon: float, threat: str = "Linf") -> str:
    """Returns a budget as people write it.

    Example:
      >>> budget(8 / 255), budget(0.5, "L2"), budget(0.03, "Patch")
      ('8/255', '0.5 (L2)', '3 % of the area')
      >>> budget(8 / 255, "Linf, 0-0.125 cycles/pixel")
      '8/255 (0-0.125 cycles/pixel)'
    """
    kind, _, band = threat.partition(", ")
    if kind == "Patch":
        return f"{round(100 * epsilon, 2):g} % of the area"
    words = [] if kind == "Linf" else [kind]
    words += [band] if band else []
    text = f"{epsilon:g}" if kind == "L2" else f"{round(epsilon * 255, 2):g}/255"
    return f"{text} ({', '.join(words)})" if words else text


def model_name(name: str) -> str:
    """Returns what a table calls a classifier: its own name, or words for the three of a run."""
    return MODELS.get(name, name)


def method_name(name: str) -> str:
    """Returns what a comparison calls a method: its own name, or words where that misleads."""
    return METHODS.get(name, name)


def models_of(results: Sequence[Entry]) -> list[str]:
    """Returns the classifiers: those of a run in their order, then others as they come."""
    found = list(dict.fromkeys(entry["model"] for entry in results))
    return [name for name in MODELS if name in found] + [n for n in found if n not in MODELS]


def headline(results: Sequence[Entry]) -> dict[Group, dict[str, Entry]]:
    """Returns the worst case of each model in each group of attacks.

    Args:
      results: Entries of ``results.json``.

    Returns:
      ``{group: {model: entry}}``, the public encoder first.  The entry is the one called
      ``"worst"`` where there is one, else that of the lowest robust accuracy.
    """
    groups: dict[Group, dict[str, list[Entry]]] = {}
    for entry in results:
        models = groups.setdefault(group_of(entry), {})
        models.setdefault(entry["model"], []).append(entry)

    def worst(entries: list[Entry]) -> Entry:
        named = [entry for entry in entries if entry["attack"] == WORST]
        return named[0] if named else min(entries, key=lambda entry: entry["robust_accuracy"])

    by_source = sorted(groups, key=lambda group: list(SOURCES).index(group.crafted_against))
    order = models_of(results)
    return {
        group: {model: worst(groups[group][model]) for model in order if model in groups[group]}
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
                    (model_name(model),),
                    *(share(entry, metric) for metric in METRICS),
                    (_number(cost.get("seconds")),),
                    (_number(cost.get("gradient_evaluations")),),
                )
            )
        attacks = [entry["attack"] for entry in results if group_of(entry) == group]
        columns = ("model", *HEADINGS, "seconds", "gradients per image")
        drawn.append(Table(_title(group, models, attacks), columns, rows))
    return drawn


def _title(group: Group, models: Mapping[str, Entry], attacks: Sequence[str]) -> str:
    names = list(dict.fromkeys(name for name in attacks if name != WORST))
    over = f" over {', '.join(names)}" if names else ""
    if len(names) == 1:
        what = names[0]
    elif all(entry["attack"] == WORST for entry in models.values()):
        what = f"Worst case per image{over}"
    else:
        what = f"Lowest robust accuracy{over}"
    return f"{what}; {SOURCES[group.crafted_against]}, {_at(group)}"


def _at(group: Group | Entry) -> str:
    threat, epsilon = (
        (group.threat, group.epsilon)
        if isinstance(group, Group)
        else (group["threat"], group["epsilon"])
    )
    return f"{'patch of' if threat == 'Patch' else 'epsilon'} {budget(epsilon, threat)}"


def _every_attack(results: Sequence[Entry]) -> Table:
    places = models_of(results)
    several = {entry["seed"] for entry in results} - {None, 0}
    rows = [
        (
            (model_name(entry["model"]),),
            (_attack_name(entry, bool(several)),),
            (entry["crafted_against"],),
            (budget(entry["epsilon"], entry["threat"]),),
            *(share(entry, metric) for metric in METRICS[1:]),
            (_number(entry["seconds"]),),
            (_number(entry["gradient_evaluations"]),),
        )
        for entry in sorted(results, key=lambda entry: places.index(entry["model"]))
    ]
    columns = ("model", "attack", "crafted on", "epsilon", *HEADINGS[1:])
    return Table("Every attack", (*columns, "seconds", "gradients per image"), rows)


def _attack_name(entry: Entry, with_seed: bool) -> str:
    seeded = with_seed and entry["seed"] is not None
    return f"{entry['attack']}, seed {entry['seed']}" if seeded else entry["attack"]


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
            cells = ("\n".join(cell).replace("NOT TRUSTED", "NOT\nTRUSTED") for cell in shares)
            drawn.add_row(name[0].replace(" ", "\n", 1), *cells)
        console.print(drawn)


def conclusions(results: Sequence[Entry]) -> list[str]:
    """Says in plain sentences what the first table shows; nothing that it does not show.

    Args:
      results: Entries of ``results.json``.

    Returns:
      One to four sentences.
    """
    groups = headline(results)
    group, models = next(iter(groups.items()))
    said = [
        f"With {model_name(model)}, the attack {SOURCES[group.crafted_against]} ({_at(group)}) "
        f"{_change(entry)}.{_mark(entry)}"
        for model, entry in models.items()
        if model != "stage1" or "stage2" not in models
    ]
    if "usual" in models and "stage2" in models:
        said.append(_comparison(models["usual"], models["stage2"]))
    adaptive = [models for g, models in groups.items() if g.crafted_against == "hardened"]
    if group.crafted_against == "public" and adaptive and "stage2" in adaptive[0]:
        entry = adaptive[0]["stage2"]
        said.append(
            f"{SOURCES['hardened'].capitalize()} (secure stage 2, {_at(entry)}), the attack "
            f"{_change(entry)}.{_mark(entry)}"
        )
    return said


def _mark(*entries: Entry) -> str:
    """Returns the mark without which a figure that is not trusted must not be shown."""
    if any(entry["verdict"] == NOT_TRUSTED for entry in entries):
        return " NOT TRUSTED: see what did not pass."
    return ""


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
    return text + "." + _mark(usual, secure)


def _points(share: float) -> float:
    # Rounded as it is shown, so that differences in the text agree with the table.
    return round(100 * share, 1)


def share(entry: Entry, metric: str) -> Cell:
    """Returns a share as a cell: value with its mark, count, 95 % interval."""
    correct = round(entry["clean_accuracy"] * entry["n"])
    whole = correct if metric == "attack_success_rate" else entry["n"]
    low, high = entry["ci95"][metric]
    attacked = metric != "clean_accuracy"
    mark = ("NOT TRUSTED",) if attacked and entry["verdict"] == NOT_TRUSTED else ()
    return (
        f"{_points(entry[metric])} %",
        *mark,
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

"""The figures and the page of an analysis: layers, frequencies, transfer.

As in `robust_ssl.report.figures`: each figure as PNG and SVG, with the numbers beside it as CSV.
"""

from __future__ import annotations

import itertools
import json
import math
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from robust_ssl import words
from robust_ssl.evaluation.analysis import FourierMap, HarmfulBand
from robust_ssl.report import figures as drawing
from robust_ssl.report.figures import QUIET, STYLES, Folder, Numbers
from robust_ssl.report.pages import figure_section
from robust_ssl.report.results import METRICS
from robust_ssl.report.style import styled
from robust_ssl.report.tables import label
from robust_ssl.workdir import json_ready, write_atomically

PARTS = ("layers", "energy", "fourier", "filtering", "transfer")
LAYERS = {"cosine": "cosine", "cka": "CKA", "relative_drift": "relative\ndrift"}
FILTERS = {
    "low_pass": {**STYLES["gen_af"], "label": "only what is below the cutoff (low-pass)"},
    "high_pass": {**STYLES["baseline"], "label": "only what is above the cutoff (high-pass)"},
}
MEASURES = {"error_rate": "error rate (%)", "feature_drift": "drift of the features (relative)"}
UNFILTERED = (
    {"color": "#404040", "lw": 1.0, "linestyle": ":", "label": "not attacked"},
    {"color": QUIET, "lw": 1.6, "label": "whole perturbation"},
)
SHARES = ("clean_accuracy", "robust_accuracy", "fooling_rate")


@styled
def figure_layers(
    directory: Folder, stability: Numbers, sensitivity=None, *, name: str = "layers"
) -> pathlib.Path:
    """Draws what an attack does to each layer, and below it how much robustness hangs on each.

    `stability` is by model what `robust_ssl.evaluation.analysis.per_layer_stability` returns,
    `sensitivity` what `sensitivity_by_tap` returns; None where it was not measured.
    """
    sensitivity = sensitivity or {}
    # In the order of the first model: others may lack a tap, or have more.
    taps = list(dict.fromkeys(tap for by_tap in stability.values() for tap in by_tap))
    taps += [tap for tap in sensitivity if tap not in taps]
    panels = len(LAYERS) + bool(sensitivity)
    figure = drawing.new_figure(max(6.0, 1.6 + 0.42 * len(taps)), 1.3 + 1.25 * panels)
    axes = figure.subplots(panels, 1, sharex=True)
    for axis, (measure, title) in zip(axes, LAYERS.items(), strict=False):
        for model, style in drawing.styles(stability).items():
            places = [taps.index(tap) for tap in stability[model]]
            values = [numbers[measure] for numbers in stability[model].values()]
            named = label(model) if axis is axes[0] else None
            axis.plot(places, values, label=named, ms=4.5, clip_on=False, **style)
        axis.set_ylabel(title)
        axis.set_ylim(*((0, None) if measure == "relative_drift" else _similarity_range(axis)))
    if sensitivity:
        places = [taps.index(tap) for tap in sensitivity]
        axes[-1].bar(places, list(sensitivity.values()), width=0.62, color="#7A7A7A")
        axes[-1].set_ylabel("robust\nsensitivity")
    figure.align_ylabels(axes)
    axes[-1].set_xticks(range(len(taps)), taps)
    drawing.slant(axes[-1])
    axes[-1].set_xlim(-0.5, len(taps) - 0.5)
    figure.legend(loc="outside upper center", ncols=3)
    rows = []
    for model, by_tap in stability.items():
        for tap, numbers in by_tap.items():
            values = [numbers[measure] for measure in LAYERS]
            rows.append((model, tap, *values, sensitivity.get(tap, "")))
    # The head has a sensitivity and no output that is drawn.
    rows += [("", tap, "", "", "", s) for tap, s in sensitivity.items() if tap == "head"]
    header = ("model", "tap", *LAYERS, "sensitivity")
    return drawing.save_figure(figure, directory, name, header, rows)


def _similarity_range(axis) -> tuple[float, float]:
    """From below the lowest value up to a little over 1; never so narrow that rounding shows."""
    lowest = min(min(line.get_ydata()) for line in axis.lines)
    return min(0.9, lowest - 0.05), 1.02


@styled
def figure_energy(
    directory: Folder, energy: Mapping[str, Any], edges: Sequence[float], *, name: str = "energy"
) -> pathlib.Path:
    """Draws which share of a perturbation's energy lies in which band of frequencies.

    `energy` is by attack what `robust_ssl.evaluation.analysis.energy_by_band` returns.
    """
    values = np.asarray([energy[attack] for attack in energy], float)
    # A zero perturbation has no energy: shares of 0, not NaN.
    shares = 100 * values / np.maximum(values.sum(1, keepdims=True), 1e-30)
    pairs = list(itertools.pairwise(edges))
    # In two lines each, to fit under a column.
    bands = [f"{round(low, 2):g}\nto {round(high, 2):g}" for low, high in pairs]
    figure = drawing.new_figure(2.2 + 0.68 * len(bands), 1.2 + 0.36 * len(energy))
    axis = figure.subplots()
    _table(axis, shares, list(energy), bands, top=max(50.0, shares.max()))
    axis.set_xlabel("spatial frequency (cycles per pixel)")
    figure.suptitle("share of the perturbation's energy (%)", fontsize=10)
    rows = []
    for attack, of_attack, parts in zip(energy, values, shares, strict=True):
        for band, value, share in zip(pairs, of_attack, parts, strict=True):
            rows.append((attack, *band, value, share / 100))
    header = ("attack", "low", "high", "energy", "share")
    return drawing.save_figure(figure, directory, name, header, rows)


@styled
def figure_fourier(
    directory: Folder, maps: Mapping[str, FourierMap], bands=None, *, name: str = "fourier"
) -> pathlib.Path:
    """Draws how much noise of each single frequency hurts each model; all on one scale.

    `maps` are by model what `robust_ssl.evaluation.analysis.fourier_sensitivity` returns, `bands`
    its most harmful band, which is drawn between two circles.

    Raises:
      ValueError: If the maps have different measures.
    """
    measures = {harm_map.measure for harm_map in maps.values()}
    if len(measures) != 1:
        raise ValueError(f"maps on one scale must have one measure, got {sorted(measures)}")
    (measure,) = measures
    gain = 100.0 if measure == "error_rate" else 1.0
    # Errors have an end of their own; a drift is only comparable within the figure.
    top = 100.0 if measure == "error_rate" else max(m.harm.max() for m in maps.values())
    figure = drawing.new_figure(1.2 + 2.5 * len(maps), 3.0)
    figure.set_layout_engine("compressed")  # the panels are square
    axes = figure.subplots(1, len(maps), squeeze=False, sharey=True)[0]
    for axis, (model, harm_map) in zip(axes, maps.items(), strict=True):
        x, y = _borders(harm_map.horizontal), _borders(harm_map.vertical)
        # Rasterized, else the SVG has a path for each frequency.
        style = {"vmin": 0, "vmax": top, "cmap": "viridis", "rasterized": True}
        image = axis.pcolormesh(x, y, gain * harm_map.harm, **style)
        axis.set_title(label(model), fontsize=10)
        axis.set_aspect("equal")
        axis.grid(False)
        ticks = [-0.5, -0.25, 0, 0.25]
        axis.set(xticks=ticks, yticks=ticks, xlim=x[[0, -1]], ylim=y[[0, -1]])
        axis.set_xlabel("horizontal (cycles per pixel)", fontsize=9)
        if bands and model in bands:
            _circles(axis, bands[model])
    axes[0].set_ylabel("vertical (cycles per pixel)", fontsize=9)
    figure.colorbar(image, ax=list(axes), label=MEASURES[measure], aspect=25)
    rows = []
    for model, harm_map in maps.items():
        for (i, j), harm in np.ndenumerate(harm_map.harm):
            rows.append((model, harm_map.vertical[i], harm_map.horizontal[j], harm))
    header = ("model", "vertical", "horizontal", measure)
    return drawing.save_figure(figure, directory, name, header, rows)


def _borders(centers: np.ndarray) -> np.ndarray:
    step = np.diff(centers).mean() if len(centers) > 1 else 1.0
    return np.append(centers, centers[-1] + step) - step / 2


def _circles(axis, band: HarmfulBand) -> None:
    from matplotlib.patches import Circle

    for radius in (band.low, band.high):
        # White dashes on a black line are seen on dark and on bright parts of the map.
        for color, width, dashes in (("black", 2.2, "-"), ("white", 1.2, "--")):
            style = {"fill": False, "edgecolor": color, "lw": width, "linestyle": dashes}
            axis.add_patch(Circle((0, 0), radius, **style))


@styled
def figure_filtering(directory: Folder, curves: Mapping[str, Any], *, name: str = "filtering"):
    """Draws the accuracy of one model under filtered perturbations, one panel for each attack.

    `curves` are by attack what `robust_ssl.evaluation.analysis.filtering_curves` returns.
    """
    figure, axes = drawing.grid(len(curves), 3, max(5.6, 0.8 + 2.5 * min(3, len(curves))), 1.2, 2.0)
    for axis, (attack, by_filter) in zip(axes, curves.items(), strict=False):
        whole = by_filter["whole"][0.0]
        shares = (whole.clean_accuracy, whole.robust_accuracy)
        for share, style in zip(shares, UNFILTERED, strict=True):
            axis.axhline(100 * share, **style)
        for kind, style in FILTERS.items():
            accuracy = [100 * counts.robust_accuracy for counts in by_filter[kind].values()]
            axis.plot(list(by_filter[kind]), accuracy, ms=4, clip_on=False, **style)
        axis.set_title(attack, fontsize=10)
        axis.set_ylim(0, 102)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=9
    )
    figure.supxlabel("cutoff (cycles per pixel)", fontsize=10)
    figure.supylabel("accuracy (%)", fontsize=10)
    rows = []
    for attack, by_filter in curves.items():
        for kind, points in by_filter.items():
            for cutoff, c in points.items():
                numbers = [getattr(c, share) for share in SHARES]
                rows.append((attack, kind, cutoff, c.n, *numbers))
    header = ("attack", "filter", "cutoff", "n", *SHARES)
    return drawing.save_figure(figure, directory, name, header, rows)


@styled
def figure_transfer(directory: Folder, matrix: Mapping[str, Any], *, name: str = "transfer"):
    """Draws what a perturbation crafted on one encoder does to classifiers built on others.

    `matrix` is what `robust_ssl.evaluation.analysis.transfer_matrix` returns.
    """
    rows, columns = list(matrix), list(next(iter(matrix.values())))
    cells = [[matrix[i][j] for j in columns] for i in rows]
    drop = [[100 * (c.clean_accuracy - c.robust_accuracy) for c in line] for line in cells]
    fooled = [[100 * c.fooling_rate for c in line] for line in cells]
    figure = drawing.new_figure(2.6 + 1.5 * len(columns), 2.0 + 0.5 * len(rows))
    axes = figure.subplots(1, 2, sharey=True)
    panels = ((drop, "drop in accuracy (points)"), (fooled, "fooling rate (%)"))
    for axis, (values, title) in zip(axes, panels, strict=True):
        _table(axis, np.asarray(values), rows, columns, top=100.0)
        axis.set_title(title, fontsize=10)
        drawing.slant(axis)
    axes[0].set_ylabel("crafted on")
    figure.supxlabel("attacked: a classifier on", fontsize=10)
    numbers = []
    for i, by_column in matrix.items():
        for j, c in by_column.items():
            numbers.append((i, j, c.n, *(getattr(c, share) for share in METRICS)))
    header = ("crafted_on", "applied_to", "n", *METRICS)
    return drawing.save_figure(figure, directory, name, header, numbers)


def _table(axis, values, rows, columns, *, top: float) -> None:
    """Draws numbers as a table whose cells are the darker the larger."""
    # Up to 1.15: the darkest blue would swallow the numbers.
    axis.imshow(values, cmap="Blues", vmin=0, vmax=1.15 * top, aspect="auto")
    axis.set_xticks(range(len(columns)), columns, fontsize=9)
    axis.set_yticks(range(len(rows)), rows, fontsize=9)
    axis.tick_params(length=0)
    axis.grid(False)
    axis.spines[:].set_visible(False)
    for names, line in ((columns, axis.axvline), (rows, axis.axhline)):
        for border in range(1, len(names)):
            line(border - 0.5, color="white", lw=1.5)
    for (row, column), value in np.ndenumerate(values):
        color = "white" if value > 0.7 * top else "black"
        text = f"{value:.0f}" if abs(value) >= 0.5 else "0"  # not "-0"
        axis.text(column, row, text, ha="center", va="center", color=color, fontsize=9)


def write_numbers(file: Folder, about: Mapping[str, Any], numbers: Mapping[str, Any]) -> None:
    """Writes ``analysis.json``: what was examined, and all numbers by part."""
    # NaN becomes null, where results.json refuses it: no verdict rests on these numbers.
    document = json.dumps(json_ready({"about": about, **numbers}), indent=1)
    write_atomically(pathlib.Path(file), document + "\n")


def analysis_page(document: Mapping[str, Any], drawn: Collection[str]) -> str:
    """Returns ``analysis.md``, Markdown: all figures, and what they show.

    Args:
      document: What ``analysis.json`` holds.  Each entry of its ``about`` is a line of a table.
      drawn: Names of the PNG files beside the page; others are left out.
    """
    settings = "\n".join(
        f"| {words.markdown(name)} | {words.markdown(entry)} |"
        for name, entry in document["about"].items()
    )
    figures = [figure for figure in _figures(document) if figure in drawn]
    sections = [
        "# Analysis: layers, frequencies, transfer",
        f"| | |\n| --- | --- |\n{settings}",
        "\n".join(f"- {words.markdown(sentence)}" for sentence in _sentences(document)),
        *(figure_section(figure, ".") for figure in figures),
        "All numbers are in [analysis.json](analysis.json).",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _figures(document: Mapping[str, Any]) -> Iterator[str]:
    """Yields what the figures of an analysis are called, in the order of its parts."""
    for part in PARTS:
        if part in ("layers", "filtering"):  # one for each attack, and for each model
            yield from (f"{part}-{name}.png" for name in document.get(part, ()))
        else:
            yield f"{part}.png"


def _sentences(numbers: Mapping[str, Any]) -> list[str]:
    """Says what the figures show, and nothing that they do not show."""
    sentences = []
    for model, result in numbers.get("fourier", {}).items():
        band, clean = result["most_harmful_band"], result["clean"]
        band = {name: math.nan if value is None else value for name, value in band.items()}
        text = f"{band['harm']:.3g} (mean relative drift of the features)"
        if result["measure"] == "error_rate":
            text = f"{100 * band['harm']:.1f} % errors, {100 * clean:.1f} % without noise"
        sentences.append(
            f"Against {label(model)}, single frequencies harm most from {band['low']:.3g} to "
            f"{band['high']:.3g} cycles per pixel ({text})."
        )
    return sentences

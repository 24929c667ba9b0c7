"""The figures and the page of an analysis: layers, frequencies, transfer.

As in `robust_ssl.report.figures`: each figure as PNG and SVG, with the numbers beside it as CSV.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from robust_ssl import manifests
from robust_ssl.evaluation import Counts
from robust_ssl.evaluation.analysis import FourierMap, HarmfulBand
from robust_ssl.report.figures import QUIET, STYLES, new_figure, save_figure, styled, styles
from robust_ssl.report.page import figure_section
from robust_ssl.report.tables import MODELS

LAYERS = (
    ("cosine", "cosine"),
    ("cka", "CKA"),
    ("relative_drift", "relative\ndrift"),
)
KEPT = {
    "low_pass": {**STYLES["stage2"], "label": "only what is below the cutoff (low-pass)"},
    "high_pass": {**STYLES["usual"], "label": "only what is above the cutoff (high-pass)"},
}
MEASURES = {"error_rate": "error rate (%)", "feature_drift": "drift of the features (relative)"}
TEXT = {"clean": "not attacked", "whole": "whole perturbation"}


@styled
def figure_layers(
    directory: str | os.PathLike,
    stability: Mapping[str, Mapping[str, Mapping[str, float]]],
    sensitivity: Mapping[str, float] | None = None,
    *,
    name: str = "layers",
) -> pathlib.Path:
    """Draws what an attack does to each layer, and below it how much robustness hangs on each.

    Args:
      directory: Where to write ``name.png``, ``.svg`` and ``.csv``.
      stability: For each model what `robust_ssl.evaluation.analysis.per_layer_stability` returns.
      sensitivity: What `robust_ssl.evaluation.analysis.sensitivity_by_tap` returns; None where it
        was not measured.
      name: File name without suffix.

    Returns:
      Path of the PNG.
    """
    taps = list(dict.fromkeys(tap for found in stability.values() for tap in found))
    taps += [tap for tap in sensitivity or {} if tap not in taps]
    panels = len(LAYERS) + bool(sensitivity)
    figure = new_figure(max(6.0, 1.6 + 0.42 * len(taps)), 1.3 + 1.25 * panels)
    axes = figure.subplots(panels, 1, sharex=True)
    for axis, (measure, label) in zip(axes, LAYERS, strict=False):
        for model, style in styles(stability).items():
            places = [taps.index(tap) for tap in stability[model]]
            values = [numbers[measure] for numbers in stability[model].values()]
            named = MODELS.get(model, model) if axis is axes[0] else None
            axis.plot(places, values, label=named, ms=4.5, clip_on=False, **style)
        axis.set_ylabel(label)
        axis.set_ylim(*((0, None) if measure == "relative_drift" else _similarity_range(axis)))
    if sensitivity:
        places = [taps.index(tap) for tap in sensitivity]
        axes[-1].bar(places, list(sensitivity.values()), width=0.62, color="#7A7A7A")
        axes[-1].set_ylabel("robust\nsensitivity")
    figure.align_ylabels(axes)
    axes[-1].set_xticks(range(len(taps)), taps, rotation=40, ha="right", rotation_mode="anchor")
    axes[-1].set_xlim(-0.5, len(taps) - 0.5)
    figure.legend(loc="outside upper center", ncols=3)
    rows = [
        (model, tap, *(numbers[measure] for measure, _ in LAYERS), (sensitivity or {}).get(tap, ""))
        for model, found in stability.items()
        for tap, numbers in found.items()
    ]
    rows += [("", tap, "", "", "", s) for tap, s in (sensitivity or {}).items() if tap == "head"]
    header = ("model", "tap", "cosine", "cka", "relative_drift", "sensitivity")
    return save_figure(figure, pathlib.Path(directory) / name, header, rows)


def _similarity_range(axis) -> tuple[float, float]:
    """From below the lowest value up to a little over 1; never so narrow that rounding shows."""
    lowest = min(min(line.get_ydata()) for line in axis.lines)
    return min(0.9, lowest - 0.05), 1.02


@styled
def figure_energy(
    directory: str | os.PathLike,
    energy: Mapping[str, Sequence[float]],
    edges: Sequence[float],
    *,
    name: str = "energy",
) -> pathlib.Path:
    """Draws which share of a perturbation's energy lies in which band of frequencies.

    Args:
      directory: Where to write ``name.png``, ``.svg`` and ``.csv``.
      energy: For each attack what `robust_ssl.evaluation.analysis.energy_by_band` returns.
      edges: Of the bands, cycles per pixel.
      name: File name without suffix.

    Returns:
      Path of the PNG.
    """
    found = np.asarray([energy[attack] for attack in energy], float)
    shares = 100 * found / np.maximum(found.sum(1, keepdims=True), 1e-30)
    bands = _bands(edges)
    figure = new_figure(2.2 + 0.68 * len(bands), 1.2 + 0.36 * len(energy))
    axis = figure.subplots()
    _table(axis, shares, list(energy), bands, top=max(50.0, shares.max()))
    axis.set_xlabel("spatial frequency (cycles per pixel)")
    figure.suptitle("share of the perturbation's energy (%)", fontsize=10)
    rows = [
        (attack, low, high, value, share / 100)
        for attack, values, parts in zip(energy, found, shares, strict=True)
        for low, high, value, share in zip(edges[:-1], edges[1:], values, parts, strict=True)
    ]
    header = ("attack", "low", "high", "energy", "share")
    return save_figure(figure, pathlib.Path(directory) / name, header, rows)


def _bands(edges: Sequence[float]) -> list[str]:
    """Names of bands, in two lines to fit under a column."""
    return [f"{round(low, 2):g}\nto {round(high, 2):g}" for low, high in itertools.pairwise(edges)]


@styled
def figure_fourier(
    directory: str | os.PathLike,
    maps: Mapping[str, FourierMap],
    bands: Mapping[str, HarmfulBand] | None = None,
    *,
    name: str = "fourier",
) -> pathlib.Path:
    """Draws how much noise of each single frequency hurts each model; all on one scale.

    Args:
      directory: Where to write ``name.png``, ``.svg`` and ``.csv``.
      maps: For each model what `robust_ssl.evaluation.analysis.fourier_sensitivity` returns.
      bands: For each model its most harmful band, which is drawn between two circles.
      name: File name without suffix.

    Returns:
      Path of the PNG.

    Raises:
      ValueError: If the maps have different measures.
    """
    measures = {found.measure for found in maps.values()}
    if len(measures) != 1:
        raise ValueError(f"maps on one scale must have one measure, got {sorted(measures)}")
    (measure,) = measures
    gain = 100.0 if measure == "error_rate" else 1.0
    top = 100.0 if measure == "error_rate" else max(m.harm.max() for m in maps.values())
    figure = new_figure(1.2 + 2.5 * len(maps), 3.0)
    figure.set_layout_engine("compressed")  # the panels are square
    axes = figure.subplots(1, len(maps), squeeze=False, sharey=True)[0]
    for axis, (model, found) in zip(axes, maps.items(), strict=True):
        drawn = axis.pcolormesh(
            _borders(found.horizontal),
            _borders(found.vertical),
            gain * found.harm,
            vmin=0,
            vmax=top,
            cmap="viridis",
            rasterized=True,
        )
        axis.set_title(MODELS.get(model, model), fontsize=10)
        axis.set_aspect("equal")
        axis.grid(False)
        axis.set_xticks([-0.5, -0.25, 0, 0.25])
        axis.set_yticks([-0.5, -0.25, 0, 0.25])
        axis.set_xlim(*_borders(found.horizontal)[[0, -1]])
        axis.set_ylim(*_borders(found.vertical)[[0, -1]])
        axis.set_xlabel("horizontal (cycles per pixel)", fontsize=9)
        if bands and model in bands:
            _circles(axis, bands[model])
    axes[0].set_ylabel("vertical (cycles per pixel)", fontsize=9)
    figure.colorbar(drawn, ax=list(axes), label=MEASURES[measure], aspect=25)
    rows = [
        (model, vertical, horizontal, harm)
        for model, found in maps.items()
        for vertical, line in zip(found.vertical, found.harm, strict=True)
        for horizontal, harm in zip(found.horizontal, line, strict=True)
    ]
    header = ("model", "vertical", "horizontal", measure)
    return save_figure(figure, pathlib.Path(directory) / name, header, rows)


def _borders(centers: np.ndarray) -> np.ndarray:
    step = np.diff(centers).mean() if len(centers) > 1 else 1.0
    return np.append(centers, centers[-1] + step) - step / 2


def _circles(axis, band: HarmfulBand) -> None:
    from matplotlib.patches import Circle

    for radius in (band.low, band.high):
        for color, width, dashes in (("black", 2.2, "-"), ("white", 1.2, "--")):
            style = {"fill": False, "edgecolor": color, "lw": width, "linestyle": dashes}
            axis.add_patch(Circle((0, 0), radius, **style))


@styled
def figure_filtering(
    directory: str | os.PathLike,
    curves: Mapping[str, Mapping[str, Mapping[float, Counts]]],
    *,
    name: str = "filtering",
) -> pathlib.Path:
    """Draws the accuracy of one model under filtered perturbations, one panel for each attack.

    Args:
      directory: Where to write ``name.png``, ``.svg`` and ``.csv``.
      curves: For each attack what `robust_ssl.evaluation.analysis.filtering_curves` returns.
      name: File name without suffix.

    Returns:
      Path of the PNG.
    """
    columns = min(3, len(curves))
    lines = -(-len(curves) // columns)
    figure = new_figure(max(5.6, 0.8 + 2.5 * columns), 1.2 + 2.0 * lines)
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).reshape(-1)
    for axis, (attack, found) in zip(axes, curves.items(), strict=False):
        whole = found["whole"][0.0]
        axis.axhline(100 * whole.clean_accuracy, color="#404040", lw=1.0, linestyle=":")
        axis.axhline(100 * whole.robust_accuracy, color=QUIET, lw=1.6)
        for kind, style in KEPT.items():
            accuracy = [100 * counts.robust_accuracy for counts in found[kind].values()]
            axis.plot(list(found[kind]), accuracy, ms=4, clip_on=False, **style)
        axis.set_title(attack, fontsize=10)
        axis.set_ylim(0, 102)
        axis.tick_params(labelbottom=True)
    for axis in axes[len(curves) :]:
        axis.set_visible(False)
    _fill_filtering_legend(figure, axes[0])
    figure.supxlabel("cutoff (cycles per pixel)", fontsize=10)
    figure.supylabel("accuracy (%)", fontsize=10)
    rows = [
        (attack, kind, cutoff, c.n, c.clean_accuracy, c.robust_accuracy, c.fooling_rate)
        for attack, found in curves.items()
        for kind, points in found.items()
        for cutoff, c in points.items()
    ]
    shares = ("clean_accuracy", "robust_accuracy", "fooling_rate")
    header = ("attack", "filter", "cutoff", "n", *shares)
    return save_figure(figure, pathlib.Path(directory) / name, header, rows)


def _fill_filtering_legend(figure, axis) -> None:
    from matplotlib.lines import Line2D

    handles, labels = axis.get_legend_handles_labels()
    handles += [Line2D([], [], color="#404040", lw=1.0, linestyle=":")]
    handles += [Line2D([], [], color=QUIET, lw=1.6)]
    figure.legend(
        handles, [*labels, *TEXT.values()], loc="outside upper center", ncols=2, fontsize=9
    )


@styled
def figure_transfer(
    directory: str | os.PathLike,
    matrix: Mapping[str, Mapping[str, Counts]],
    *,
    name: str = "transfer",
) -> pathlib.Path:
    """Draws what a perturbation crafted on one encoder does to classifiers built on others.

    Args:
      directory: Where to write ``name.png``, ``.svg`` and ``.csv``.
      matrix: What `robust_ssl.evaluation.analysis.transfer_matrix` returns.
      name: File name without suffix.

    Returns:
      Path of the PNG.
    """
    rows, columns = list(matrix), list(next(iter(matrix.values())))
    cells = [[matrix[i][j] for j in columns] for i in rows]
    drop = [[100 * (c.clean_accuracy - c.robust_accuracy) for c in line] for line in cells]
    fooled = [[100 * c.fooling_rate for c in line] for line in cells]
    figure = new_figure(2.6 + 1.5 * len(columns), 2.0 + 0.5 * len(rows))
    axes = figure.subplots(1, 2, sharey=True)
    panels = ((drop, "drop in accuracy (points)"), (fooled, "fooling rate (%)"))
    for axis, (values, title) in zip(axes, panels, strict=True):
        _table(axis, np.asarray(values), rows, columns, top=100.0)
        axis.set_title(title, fontsize=10)
        for label in axis.get_xticklabels():
            label.set(rotation=40, ha="right", rotation_mode="anchor")
    axes[0].set_ylabel("crafted on")
    figure.supxlabel("attacked: a classifier on", fontsize=10)
    numbers = [
        (i, j, c.n, c.clean_accuracy, c.robust_accuracy, c.attack_success_rate, c.fooling_rate)
        for i, found in matrix.items()
        for j, c in found.items()
    ]
    shares = ("clean_accuracy", "robust_accuracy", "attack_success_rate", "fooling_rate")
    header = ("crafted_on", "applied_to", "n", *shares)
    return save_figure(figure, pathlib.Path(directory) / name, header, numbers)


def _table(axis, values, rows, columns, *, top: float) -> None:
    """Draws numbers as a table whose cells are the darker the larger."""
    axis.imshow(values, cmap="Blues", vmin=0, vmax=1.15 * top, aspect="auto")
    axis.set_xticks(range(len(columns)), columns, fontsize=9)
    axis.set_yticks(range(len(rows)), rows, fontsize=9)
    axis.tick_params(length=0)
    axis.grid(False)
    axis.spines[:].set_visible(False)
    for border in range(1, len(columns)):
        axis.axvline(border - 0.5, color="white", lw=1.5)
    for border in range(1, len(rows)):
        axis.axhline(border - 0.5, color="white", lw=1.5)
    for (row, column), value in np.ndenumerate(values):
        color = "white" if value > 0.7 * top else "black"
        text = f"{value:.0f}" if abs(value) >= 0.5 else "0"
        axis.text(column, row, text, ha="center", va="center", color=color, fontsize=9)


def write_analysis(
    directory: str | os.PathLike,
    about: Mapping[str, Any],
    numbers: Mapping[str, Any],
    figures: Sequence[str | os.PathLike],
) -> None:
    """Writes ``analysis.json`` with all numbers, and ``analysis.md`` with all figures.

    Args:
      directory: Where, usually the figures' own.
      about: What was looked at, a line of a table for each entry.
      numbers: By part, JSON-able.
      figures: Paths of PNG files, absolute or relative to `directory`.
    """
    directory = pathlib.Path(directory)
    document = json.dumps(manifests.json_ready({"about": about, **numbers}), indent=1)
    manifests.write_atomically(directory / "analysis.json", document + "\n")
    told = "\n".join(f"| {name} | {entry} |" for name, entry in about.items())
    sections = [
        "# Analysis: layers, frequencies, transfer",
        f"| | |\n| --- | --- |\n{told}",
        "\n".join(f"- {sentence}" for sentence in _sentences(numbers)),
        *(figure_section(figure, directory) for figure in figures),
        "All numbers are in [analysis.json](analysis.json).",
    ]
    manifests.write_atomically(
        directory / "analysis.md", "\n\n".join(filter(None, sections)) + "\n"
    )


def _sentences(numbers: Mapping[str, Any]) -> list[str]:
    """Says what the figures show, and nothing that they do not show."""
    said = []
    for model, found in numbers.get("fourier", {}).items():
        band, clean = found["most_harmful_band"], found["clean"]
        text = f"{band['harm']:.3g} (mean relative drift of the features)"
        if found["measure"] == "error_rate":
            text = f"{100 * band['harm']:.1f} % errors, {100 * clean:.1f} % without noise"
        said.append(
            f"{MODELS.get(model, model).capitalize()}: single frequencies hurt most from "
            f"{band['low']:.3g} to {band['high']:.3g} cycles per pixel ({text})."
        )
    return said

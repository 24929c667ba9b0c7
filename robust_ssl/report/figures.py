"""The figures of a run: each as PNG and SVG, with the numbers beside it as CSV.

A `figure_*` writes ``name.png``, ``.svg`` and ``.csv`` into its directory and returns the path of
the PNG.  The same numbers give the same bytes: no date, no random identifier.  Where it takes
numbers by model, the names are those of recipes.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from robust_ssl import words
from robust_ssl.evaluation.checks.result import NOT_BELIEVABLE, NOT_EXAMINED
from robust_ssl.report.style import styled
from robust_ssl.report.tables import MARK, label
from robust_ssl.workdir import UnwritableError, unwritable, write_atomically

Folder = str | os.PathLike
Numbers = Mapping[str, Mapping[str, Mapping[str, float]]]  # by model, tap and measure
# Okabe and Ito's colors, which the color-blind tell apart; line and marker differ too.
STYLES = {
    "baseline": {"color": "#D55E00", "marker": "o", "linestyle": "-"},
    "gen_af_stage1": {"color": "#009E73", "marker": "s", "linestyle": "--"},
    "gen_af": {"color": "#0072B2", "marker": "^", "linestyle": "-"},
}
# Lengths without a common factor: the three together repeat only after sixty models.
COLORS = ("#CC79A7", "#000000", "#56B4E9", "#E69F00", "#7A5195")
MARKERS = ("D", "v", "P", "X")
LINES = ("-.", ":", "--")
MOST_CURVES = 7  # of one panel; with more, nobody follows a curve to its name
QUIET = "#B5B5B5"
_log = logging.getLogger(__name__)


def attempt(draw: Callable[..., pathlib.Path], *args: Any, **kwargs: Any) -> list[pathlib.Path]:
    """Draws a figure and returns its path in a list, which is empty where that fails.

    A run of hours must not end for want of a picture: the failure is logged.

    Raises:
      UnwritableError: If it is drawn and cannot be written.  Counted as left out, it would stay
        away after there is room again.
    """
    try:
        return [draw(*args, **kwargs)]
    except UnwritableError:
        raise
    except Exception as error:  # matplotlib raises whatever happens to go wrong within it
        name = kwargs.get("name", draw.__name__.removeprefix("figure_"))
        _log.warning("the figure %s is left out: %s: %s", name, type(error).__name__, error)
        return []


@styled
def figure_examples(
    directory: Folder,
    clean,
    adversarial,
    *,
    predictions=None,
    name: str = "examples",
    verdict: str = NOT_EXAMINED,
) -> pathlib.Path:
    """Draws images, the same images under attack, and the perturbation made visible.

    The perturbation is amplified until its largest change fills the range around middle gray.
    Images are pixels in [0, 1], ``[n, H, W, 3]``, of which the first eight are drawn.
    `predictions` is what the model says of each, (clean, under attack); a change is bold.
    `verdict` is of the model's figures under attack; where they are not believable that is said.

    Raises:
      ValueError: If the shapes differ or there is no image.
    """
    figure = draw_examples(clean, adversarial, predictions=predictions, verdict=verdict)
    delta = _change(clean, adversarial)
    texts = [("", "")] * len(delta) if predictions is None else list(predictions)
    numbers = [
        (i, *texts[i], np.abs(d).max() * 255, np.abs(d).mean() * 255, verdict)
        for i, d in enumerate(delta)
    ]
    header = ("image", "clean", "under_attack", "largest_change_255", "mean_change_255", "verdict")
    return save_figure(figure, directory, name, header, numbers)


@styled
def draw_examples(clean, adversarial, *, predictions=None, verdict: str = NOT_EXAMINED):
    """Returns the figure that `figure_examples` writes."""
    delta = _change(clean, adversarial)
    clean, adversarial = np.asarray(clean)[:8], np.asarray(adversarial)[:8]
    largest = np.abs(delta).max()
    gain = 0.5 / largest if largest > 0 else 1.0  # no change is plain gray, not NaN
    texts = [("", "")] * len(clean) if predictions is None else list(predictions)[: len(clean)]
    said = [(str(after), after != before) for before, after in texts]
    rows = (
        ("clean", clean, [(str(before), False) for before, _ in texts]),
        (f"under attack{_mark(verdict)}", adversarial, said),
        (f"change\n(x {gain:.0f})", np.clip(0.5 + gain * delta, 0, 1), [("", False)] * len(clean)),
    )
    return _draw_images(rows, len(clean), has_text=predictions is not None)


def _change(clean, adversarial) -> np.ndarray:
    """Returns the perturbations of the first eight images."""
    clean, adversarial = np.asarray(clean)[:8], np.asarray(adversarial)[:8]
    if clean.shape != adversarial.shape or clean.ndim != 4 or len(clean) == 0:
        raise ValueError(
            "clean and adversarial must be the same images [n, H, W, 3], got "
            f"{clean.shape} and {adversarial.shape}"
        )
    return adversarial.astype(np.float64) - clean  # exact, where float32 would round


def _draw_images(rows, columns: int, *, has_text: bool):
    figure = new_figure(1.15 * columns + 1.1, (1.4 if has_text else 1.2) * len(rows))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (title, images, texts) in zip(axes, rows, strict=True):
        row[0].set_ylabel(title, rotation=0, ha="right", va="center", labelpad=8)
        for axis, image, (text, changed) in zip(row, images, texts, strict=True):
            # Smoothing would hide what an attack does to single pixels.
            axis.imshow(np.clip(image, 0, 1), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            emphasis = {"color": STYLES["baseline"]["color"], "weight": "bold"} if changed else {}
            axis.set_xlabel(text, fontsize=9, labelpad=2, **emphasis)
    return figure


@styled
def figure_epsilon(
    directory: Folder, curves: Mapping[str, Any], *, name: str = "epsilon", verdicts=None
) -> pathlib.Path:
    """Draws accuracy against the attacker's budget, with 95 % intervals as bands.

    `curves` are by model ``(epsilon, accuracy, low, high)``, pixel units and shares.  With
    `verdicts`, by model as in ``results.json``, a curve that is not believable says so.
    """
    judged = verdict_words(curves, verdicts)

    def draw(axis, model, style):
        epsilon, accuracy, low, high = np.asarray(curves[model], float).T
        x = 255 * epsilon
        axis.fill_between(x, 100 * low, 100 * high, color=style["color"], alpha=0.15, lw=0)
        # Unclipped: the marks at epsilon 0 and at 0 % would lose half of themselves.
        axis.plot(x, 100 * accuracy, ms=5, clip_on=False, **style)

    figure, axes = _draw_curves(_legend(judged), draw)
    for axis in axes:
        axis.set_ylim(0, 102)  # all of it: a cut axis makes small falls look large
        axis.set_xlim(left=0)
        axis.margins(x=0.02)
    figure.supxlabel("attack budget epsilon (/255)", fontsize=10)
    figure.supylabel("accuracy under attack (%)", fontsize=10)
    numbers = [(model, *p, judged[model]) for model, points in curves.items() for p in points]
    header = ("model", "epsilon", "accuracy", "ci95_low", "ci95_high", "verdict")
    return save_figure(figure, directory, name, header, numbers)


def verdict_words(models: Iterable[str], verdicts: Mapping[str, Any] | None) -> dict[str, str]:
    """Returns by model the verdict on its figures under attack.

    Example:
      >>> verdict_words(["a", "b"], {"a": {"verdict": "believable"}})
      {'a': 'believable', 'b': 'not examined'}
    """
    unknown, verdicts = {"verdict": NOT_EXAMINED}, verdicts or {}
    return {model: verdicts.get(model, unknown)["verdict"] for model in models}


def _legend(judged: Mapping[str, str]) -> dict[str, str]:
    return {model: label(model) + _mark(verdict) for model, verdict in judged.items()}


def _mark(verdict: str) -> str:
    """Returns the line under a name that says that its figures are not believable."""
    return f"\n{MARK}" if verdict == NOT_BELIEVABLE else ""


@styled
def figure_sensitivity(
    directory: Folder, scores: Mapping[str, float], selected, *, name: str = "sensitivity"
) -> pathlib.Path:
    """Draws how much each layer matters for robustness, and which are fine-tuned.

    `scores` are the layer sensitivities: rise of the robust loss when a layer's weights are
    perturbed.  `selected` are the robust-redundant layers, which are fine-tuned.

    Raises:
      ValueError: If a selected layer has no score.
    """
    unknown = sorted(set(selected) - set(scores))
    if unknown:
        raise ValueError(f"selected layers without a score: {unknown}; scored: {sorted(scores)}")
    from matplotlib.patches import Patch

    layers = sorted(scores, key=lambda layer: scores[layer])
    chosen = STYLES["gen_af"]["color"]
    figure = new_figure(6.4, 1.1 + 0.22 * len(layers))
    axis = figure.subplots()
    colors = [chosen if layer in selected else QUIET for layer in layers]
    axis.barh(range(len(layers)), [scores[name] for name in layers], height=0.72, color=colors)
    axis.set_yticks(range(len(layers)), layers, fontsize=8)
    axis.set_ylim(-0.7, len(layers) - 0.3)
    axis.tick_params(axis="y", length=0)
    axis.grid(False, axis="y")
    axis.axvline(0, color="#606060", lw=0.8)
    axis.set_xlabel("rise of the robust loss when the layer is perturbed")
    patches = {"robust-redundant: fine-tuned": chosen, "held fixed": QUIET}
    patches = [Patch(color=color, label=text) for text, color in patches.items()]
    figure.legend(handles=patches, loc="outside upper right", ncols=2)
    numbers = [(layer, scores[layer], int(layer in selected)) for layer in reversed(layers)]
    header = ("layer", "sensitivity", "selected")
    return save_figure(figure, directory, name, header, numbers)


@styled
def figure_stability(
    directory: Folder, drifts: Numbers, *, name: str = "stability", verdicts=None
) -> pathlib.Path:
    """Draws how far the attack moves each layer's output.

    `drifts` are by model what `robust_ssl.evaluation.per_layer_stability` returns.  With
    `verdicts`, by model as in ``results.json``, a curve that is not believable says so.
    """
    judged = verdict_words(drifts, verdicts)

    def draw(axis, model, style):
        drift = [values["relative_drift"] for values in drifts[model].values()]
        axis.plot(list(drifts[model]), drift, ms=5, **style)

    figure, axes = _draw_curves(_legend(judged), draw)
    for axis in axes:
        axis.set_ylim(bottom=0)
        slant(axis)
    figure.supylabel("change of the output (relative)", fontsize=10)
    measures = ("cosine", "relative_drift")
    numbers = [
        (model, tap, *(values[measure] for measure in measures), judged[model])
        for model, taps in drifts.items()
        for tap, values in taps.items()
    ]
    header = ("model", "tap", *measures, "verdict")
    return save_figure(figure, directory, name, header, numbers)


def _draw_curves(shown: Mapping[str, str], draw: Callable[..., None]):
    """Draws one curve for each model, few in a panel; the baseline is in each.

    `shown` is by model its text in the legend; `draw` is called with axis, model and style.
    """
    first = [model for model in shown if model == "baseline"]
    rest = [model for model in shown if model not in first]
    single = len(shown) <= MOST_CURVES
    count = 1 if single else -(-len(rest) // (MOST_CURVES - len(first)))
    size = max(1, -(-len(rest) // count))  # evenly: nine models in five and five, not seven and two
    panels = [first + rest[start : start + size] for start in range(0, max(len(rest), 1), size)]
    size = (6.0, 0.0, 3.7) if single else (10.5, 0.4, 2.7)
    figure, axes = grid(len(panels), 2, *size)
    look = styles(shown)
    for axis, models in zip(axes, panels, strict=False):
        for model in models:
            draw(axis, model, {**look[model], "label": shown[model]})
        if not single:
            # Beside its panel: over the curves it would hide some.
            axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    if single:
        figure.legend(loc="outside upper center", ncols=3)
    return figure, axes


def grid(panels: int, columns: int, width: float, edge: float, height: float):
    """Returns a figure and its panels of one height, which share their axes."""
    columns = min(columns, panels)
    lines = -(-panels // columns)
    figure = new_figure(width, edge + height * lines)
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).reshape(-1)
    for axis in axes:
        axis.tick_params(labelbottom=True)  # a shared axis shows them in the last row only
    for axis in axes[panels:]:
        axis.set_visible(False)
    return figure, axes[:panels]


def slant(axis) -> None:
    """Slants the names under an axis so that each ends at its tick."""
    axis.tick_params(axis="x", rotation=40)
    for text in axis.get_xticklabels():
        text.set(ha="right", rotation_mode="anchor")


def styles(models: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns how each model is drawn, the same in every figure of the same models."""
    cycles = {"color": COLORS, "marker": MARKERS, "linestyle": LINES}
    looks: dict[str, dict[str, Any]] = {}
    place = 0
    for model in models:
        look = {name: values[place % len(values)] for name, values in cycles.items()}
        looks[model] = STYLES.get(model, look)
        place += model not in STYLES
    return looks


def new_figure(width: float, height: float):
    """Returns an empty figure, inches."""
    from matplotlib.figure import Figure  # not pyplot, which keeps global state

    return Figure(figsize=(width, height), dpi=200, layout="constrained")


def save_figure(figure, directory: Folder, name: str, header: Sequence[str], rows: Iterable):
    """Writes a figure as PNG and SVG and its numbers as CSV; returns the PNG's path.

    Raises:
      UnwritableError: If a file cannot be written.
    """
    stem = pathlib.Path(directory) / name
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(stem.parent, error) from error
    numbers = io.StringIO()
    writer = csv.writer(numbers, lineterminator="\n")
    writer.writerows([words.csv_cell(cell) for cell in row] for row in (header, *rows))
    # The numbers first: they need no font and no renderer.
    write_atomically(stem.with_name(f"{stem.name}.csv"), numbers.getvalue())
    # Without the library's version and the date, equal numbers are equal bytes.
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        # In memory first: an error of drawing costs the figure, one of the disk ends the run.
        drawn = io.BytesIO()
        figure.savefig(drawn, format=suffix[1:], metadata=metadata)
        write_atomically(stem.with_name(stem.name + suffix), drawn.getvalue())
    return stem.with_name(f"{stem.name}.png")


def files_of(figure: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files of a figure by the path of its PNG."""
    return [figure.with_suffix(suffix) for suffix in (".png", ".svg", ".csv")]

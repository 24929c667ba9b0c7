"""The figures of a run: each as PNG and SVG, with the numbers beside it as CSV.

The same numbers give the same bytes: no date, no random identifier.
"""

from __future__ import annotations

import csv
import functools
import os
import pathlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from robust_ssl.report.results import NOT_TRUSTED
from robust_ssl.report.tables import MODELS

# Okabe and Ito's colors, which the color-blind tell apart; line and marker differ too.
STYLES = {
    "usual": {"color": "#D55E00", "marker": "o", "linestyle": "-"},
    "stage1": {"color": "#009E73", "marker": "s", "linestyle": "--"},
    "stage2": {"color": "#0072B2", "marker": "^", "linestyle": "-"},
}
OTHERS = (
    {"color": "#CC79A7", "marker": "D", "linestyle": "-."},
    {"color": "#000000", "marker": "v", "linestyle": ":"},
    {"color": "#56B4E9", "marker": "P", "linestyle": "-"},
)
QUIET = "#B5B5B5"
SETTINGS = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "robust_ssl",
}


def styled(draw: Callable[..., pathlib.Path]) -> Callable[..., pathlib.Path]:
    """Draws under `SETTINGS`, which matplotlib reads when axes are made and when they are saved."""

    @functools.wraps(draw)
    def drawn(*args, **kwargs):
        import matplotlib

        with matplotlib.rc_context(SETTINGS):
            return draw(*args, **kwargs)

    return drawn


@styled
def figure_examples(
    directory: str | os.PathLike,
    clean: np.ndarray,
    adversarial: np.ndarray,
    *,
    predictions: Sequence[tuple[Any, Any]] | None = None,
    name: str = "examples",
) -> pathlib.Path:
    """Draws images, the same images under attack, and the perturbation made visible.

    The perturbation is amplified until its largest change fills the range around middle gray.

    Args:
      directory: Where to write ``name.png``, ``.svg`` and ``.csv``.
      clean: Pixels in [0, 1], float ``[n, H, W, 3]``; the first eight are drawn.
      adversarial: The same images under attack, same shape.
      predictions: What the model says of each image, (clean, under attack); a change is bold.
      name: File name without suffix.

    Returns:
      Path of the PNG.

    Raises:
      ValueError: If the shapes differ or there is no image.
    """
    clean, adversarial = np.asarray(clean)[:8], np.asarray(adversarial)[:8]
    if clean.shape != adversarial.shape or clean.ndim != 4 or len(clean) == 0:
        raise ValueError(
            "clean and adversarial must be the same images [n, H, W, 3], got "
            f"{clean.shape} and {adversarial.shape}"
        )
    delta = adversarial.astype(np.float64) - clean
    largest = np.abs(delta).max()
    gain = 0.5 / largest if largest > 0 else 1.0
    texts = [("", "")] * len(clean) if predictions is None else list(predictions)[: len(clean)]
    rows = (
        ("clean", clean, [(str(before), False) for before, _ in texts]),
        ("under attack", adversarial, [(str(after), after != before) for before, after in texts]),
        (f"change\n(x {gain:.0f})", np.clip(0.5 + gain * delta, 0, 1), [("", False)] * len(clean)),
    )
    drawn = _draw_images(rows, len(clean), has_text=predictions is not None)
    numbers = [
        (i, *texts[i], np.abs(d).max() * 255, np.abs(d).mean() * 255) for i, d in enumerate(delta)
    ]
    header = ("image", "clean", "under_attack", "largest_change_255", "mean_change_255")
    return save_figure(drawn, pathlib.Path(directory) / name, header, numbers)


def _draw_images(rows, columns: int, *, has_text: bool):
    figure = new_figure(1.15 * columns + 1.1, (1.4 if has_text else 1.2) * len(rows))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (label, images, texts) in zip(axes, rows, strict=True):
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=8)
        for axis, image, (text, changed) in zip(row, images, texts, strict=True):
            axis.imshow(np.clip(image, 0, 1), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            emphasis = {"color": STYLES["usual"]["color"], "weight": "bold"} if changed else {}
            axis.set_xlabel(text, fontsize=9, labelpad=2, **emphasis)
    return figure


@styled
def figure_epsilon(
    directory: str | os.PathLike,
    curves: Mapping[str, Sequence[tuple[float, float, float, float]]],
    *,
    name: str = "epsilon",
    verdicts: Mapping[str, Mapping[str, Any]] | None = None,
) -> pathlib.Path:
    """Draws accuracy against the attacker's budget, with 95 % intervals as bands.

    Args:
      directory: Where to write ``name.png``, ``.svg`` and ``.csv``.
      curves: For each model, ``(epsilon, accuracy, low, high)``, pixel units and shares, as
        `robust_ssl.evaluation.accuracy_against_epsilon` returns them.
      name: File name without suffix.
      verdicts: By model, as in ``results.json``: a curve that is not trusted says so in the
        legend, and each line of the numbers has its verdict.

    Returns:
      Path of the PNG.
    """
    words = {
        model: (verdicts or {}).get(model, {}).get("verdict", "not examined") for model in curves
    }
    figure = new_figure(6.0, 3.7)
    axis = figure.subplots()
    for model, style in styles(curves).items():
        epsilon, accuracy, low, high = np.asarray(curves[model], float).T
        x, color = 255 * epsilon, style["color"]
        axis.fill_between(x, 100 * low, 100 * high, color=color, alpha=0.15, lw=0)
        label = MODELS.get(model, model)
        label += "\nNOT TRUSTED" if words[model] == NOT_TRUSTED else ""
        axis.plot(x, 100 * accuracy, label=label, ms=5, clip_on=False, **style)
    axis.set_xlabel("attack budget epsilon (/255)")
    axis.set_ylabel("accuracy under attack (%)")
    axis.set_ylim(0, 102)
    axis.set_xlim(left=0)
    axis.margins(x=0.02)
    figure.legend(loc="outside upper center", ncols=3)
    numbers = [
        (model, *point, words[model]) for model, points in curves.items() for point in points
    ]
    header = ("model", "epsilon", "accuracy", "ci95_low", "ci95_high", "verdict")
    return save_figure(figure, pathlib.Path(directory) / name, header, numbers)


@styled
def figure_sensitivity(
    directory: str | os.PathLike,
    scores: Mapping[str, float],
    selected: Collection[str],
    *,
    name: str = "sensitivity",
) -> pathlib.Path:
    """Draws how much each layer matters for robustness, and which ones stage 2 may move.

    Args:
      directory: Where to write ``name.png``, ``.svg`` and ``.csv``.
      scores: Layer sensitivity by layer: rise of the robust loss when its weights are perturbed.
      selected: The robust-redundant layers that stage 2 fine-tunes.
      name: File name without suffix.

    Returns:
      Path of the PNG.

    Raises:
      ValueError: If a selected layer has no score.
    """
    unknown = sorted(set(selected) - set(scores))
    if unknown:
        raise ValueError(f"selected layers without a score: {unknown}; scored: {sorted(scores)}")
    from matplotlib.patches import Patch

    layers = sorted(scores, key=lambda layer: scores[layer])
    chosen = STYLES["stage2"]["color"]
    figure = new_figure(6.4, 1.1 + 0.22 * len(layers))
    axis = figure.subplots()
    axis.barh(
        range(len(layers)),
        [scores[layer] for layer in layers],
        height=0.72,
        color=[chosen if layer in selected else QUIET for layer in layers],
    )
    axis.set_yticks(range(len(layers)), layers, fontsize=8)
    axis.set_ylim(-0.7, len(layers) - 0.3)
    axis.tick_params(axis="y", length=0)
    axis.grid(False, axis="y")
    axis.axvline(0, color="#606060", lw=0.8)
    axis.set_xlabel("rise of the robust loss when the layer is perturbed")
    patches = [Patch(color=chosen), Patch(color=QUIET)]
    figure.legend(patches, ["stage 2 moves it", "held fixed"], loc="outside upper right", ncols=2)
    numbers = [(layer, scores[layer], int(layer in selected)) for layer in reversed(layers)]
    header = ("layer", "sensitivity", "selected")
    return save_figure(figure, pathlib.Path(directory) / name, header, numbers)


@styled
def figure_stability(
    directory: str | os.PathLike,
    drifts: Mapping[str, Mapping[str, Mapping[str, float]]],
    *,
    name: str = "stability",
) -> pathlib.Path:
    """Draws how far the attack moves each layer's output.

    Args:
      directory: Where to write ``name.png``, ``.svg`` and ``.csv``.
      drifts: For each model what `robust_ssl.evaluation.per_layer_stability` returns.
      name: File name without suffix.

    Returns:
      Path of the PNG.
    """
    figure = new_figure(6.0, 3.7)
    axis = figure.subplots()
    for model, style in styles(drifts).items():
        taps = list(drifts[model])
        drift = [drifts[model][tap]["relative_drift"] for tap in taps]
        axis.plot(taps, drift, label=MODELS.get(model, model), ms=5, **style)
    axis.set_ylabel("change of the output (relative)")
    axis.set_ylim(bottom=0)
    axis.tick_params(axis="x", rotation=40)
    for label in axis.get_xticklabels():
        label.set(ha="right", rotation_mode="anchor")
    figure.legend(loc="outside upper center", ncols=3)
    numbers = [
        (model, tap, values["cosine"], values["relative_drift"])
        for model, taps in drifts.items()
        for tap, values in taps.items()
    ]
    header = ("model", "tap", "cosine", "relative_drift")
    return save_figure(figure, pathlib.Path(directory) / name, header, numbers)


def styles(models: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns how each model is drawn, the same in every figure."""
    models = list(models)
    strangers = [model for model in models if model not in STYLES]
    spare = {model: OTHERS[index % len(OTHERS)] for index, model in enumerate(strangers)}
    return {model: STYLES.get(model) or spare[model] for model in models}


def new_figure(width: float, height: float):
    """Returns an empty figure, inches."""
    from matplotlib.figure import Figure  # not pyplot, which keeps global state

    return Figure(figsize=(width, height), dpi=200, layout="constrained")


def save_figure(figure, stem: pathlib.Path, header: Sequence[str], rows: Iterable[Sequence[Any]]):
    """Writes a figure as PNG and SVG and its numbers as CSV; returns the PNG's path."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(stem.with_suffix(".png"), metadata={"Software": None})
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
    with open(stem.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    return stem.with_suffix(".png")

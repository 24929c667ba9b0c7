"""`report.md`: what was run, what came out, how to read it."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from robust_ssl import manifests
from robust_ssl.report.tables import Entry, conclusions, summary_table
from robust_ssl.report.verdicts import verdict_section

# How to read a figure, by the word its file name begins with.
CAPTIONS = {
    "examples": (
        "Images as they are, the same images under attack, and the change amplified around middle "
        "gray. Below each image: what the model says, bold where the attack changed it. One "
        "universal perturbation looks alike in every column, except where a pixel is already black "
        "or white."
    ),
    "epsilon": (
        "Accuracy under attack against the attacker's budget; bands are 95 % intervals. The left "
        "end is clean accuracy; a model that is secure stays level to the right."
    ),
    "sensitivity": (
        "How much the robust loss rises when the weights of one layer are perturbed. Short bars "
        "are robust-redundant layers; stage 2 fine-tunes the colored ones and holds the others "
        "fixed."
    ),
    "stability": (
        "How far the attack moves the output of each layer, relative to its size, from the first "
        "layer to the features. The lower, the less of the attack gets through."
    ),
    "layers": (
        "What one attack does to each layer's output: cosine and CKA against the clean output (1 "
        "is unchanged; CKA does not see a shift common to all images) and its relative drift. "
        "Bottom, where measured: how much robustness hangs on the layer's weights (its worst "
        "kernel)."
    ),
    "energy": (
        "Where each perturbation has its energy, by band of spatial frequency. White noise has the "
        "more the wider the ring; what exceeds that is the attack's own."
    ),
    "fourier": (
        "Harm done by noise of each single frequency at one L2 norm; low frequencies in the "
        "middle. Between the dashed circles: the most harmful band on average."
    ),
    "filtering": (
        "Accuracy when only the frequencies below (low-pass) or above (high-pass) a cutoff are "
        "left of a perturbation. The frequencies that do the work are where a curve leaves the "
        "dotted line (not attacked) for the gray one (whole perturbation)."
    ),
    "transfer": (
        "A perturbation crafted on the encoder of each row, applied to a linear classifier on the "
        "encoder of each column. A bright column resists; a row dark off the diagonal transfers."
    ),
}


def write_report(
    path: str | os.PathLike,
    run: Mapping[str, Any],
    results: Sequence[Entry],
    costs: Mapping[str, Mapping[str, float]] | None = None,
    figures: Sequence[str | os.PathLike] = (),
    notes: Sequence[str] = (),
    verdicts: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Writes a run's report as Markdown.

    Args:
      path: Where to write, usually ``report.md`` beside ``results.json``.
      run: What was run.  ``"config"`` (a mapping) is folded away, ``"checkpoints"`` (name to
        path) gets a section of its own, every other entry a line in the first table.
      results: Entries of ``results.json``.
      costs: What fine-tuning took, as for `summary_table`.
      figures: Paths of PNG files, absolute or relative to the report.
      notes: Sentences to add, for example what fell short.
      verdicts: Whether each model's figures can be believed, as in ``results.json``.
    """
    path = pathlib.Path(path)
    run = manifests.json_ready(run)
    special = ("config", "checkpoints")
    sections = [
        "# Attack and secure fine-tuning: report",
        _what_was_run({name: entry for name, entry in run.items() if name not in special}),
        _config(run.get("config")),
        "## Results",
        "\n".join(f"- {sentence}" for sentence in [*conclusions(results), *notes]),
        verdict_section(verdicts or {}),
        summary_table(results, costs).rstrip(),
        "Each share is followed by its count and its 95 % Wilson interval, in per cent. Robust "
        "accuracy: correct under the attack. Attack success rate: turned wrong, of the images "
        "that were correct. Fooling rate: predictions that changed. Seconds and gradient "
        "evaluations per image: the cost of fine-tuning; in the table of every attack, of the "
        "attack, over all images.",
        *(figure_section(figure, path.parent) for figure in figures),
        _checkpoints(run.get("checkpoints")),
    ]
    manifests.write_atomically(path, "\n\n".join(filter(None, sections)) + "\n")


def _what_was_run(run: Mapping[str, Any]) -> str:
    if not run:
        return ""
    rows = [f"| {name} | {_cell(entry)} |" for name, entry in run.items()]
    return "\n".join(["## What was run", "", "| | |", "| --- | --- |", *rows])


def _cell(entry: Any) -> str:
    if isinstance(entry, Mapping):
        text = ", ".join(f"{name}: {_cell(value)}" for name, value in entry.items())
    elif isinstance(entry, list):
        text = ", ".join(map(_cell, entry))
    else:
        text = str(entry)
    return text.replace("|", "\\|").replace("\n", " ")


def _config(config: Any) -> str:
    if not config:
        return ""
    text = json.dumps(config, indent=2)
    return f"<details><summary>Configuration</summary>\n\n```json\n{text}\n```\n\n</details>"


def figure_section(figure: str | os.PathLike, beside: pathlib.Path) -> str:
    """Returns a figure with its caption and what lies beside it, as Markdown."""
    figure = pathlib.Path(figure)
    if figure.is_absolute():
        figure = pathlib.Path(os.path.relpath(figure, beside.resolve()))
    caption = next((text for word, text in CAPTIONS.items() if figure.stem.startswith(word)), "")
    link = figure.as_posix()
    beside_it = " ".join(
        f"[{suffix}]({figure.with_suffix('.' + suffix.lower()).as_posix()})"
        for suffix in ("SVG", "CSV")
    )
    return f"![{figure.stem}]({link})\n\n*{caption}* {beside_it}".replace("** ", "")


def _checkpoints(checkpoints: Mapping[str, str] | None) -> str:
    if not checkpoints:
        return ""
    rows = [f"- {name}: `{place}`" for name, place in checkpoints.items()]
    return "\n".join(["## Checkpoints", "", *rows])

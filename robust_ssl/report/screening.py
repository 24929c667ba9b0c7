"""The page of a screening: ``screening.json`` in tables for readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from robust_ssl import words
from robust_ssl.report.tables import budget
from robust_ssl.report.text import markdown_table


def screening_page(document: Mapping[str, Any]) -> str:
    """Returns ``screening.md``, Markdown.

    Args:
      document: What ``screening.json`` holds.
    """
    entries, images = document["detectors"], document["images"]
    shifted = images["shifted"]
    second = document["public"] or "none"
    parts = [
        "# Screening",
        f"Screened is {words.markdown(document['model'])}; the second classifier is "
        f"{words.markdown(second)}. Detectors are fitted on {images['fit']} images, thresholds "
        f"chosen on {images['calibration']}, figures measured on {images['test']} others.",
        "## Do detectors hold where the attacker knows them?",
        "Per cent of the right images. *Plain* does not know the detector, *unseen* does: wrong "
        "and no alarm, at the threshold of 5 % false alarms, which the saved screen has too.",
        _table(_adaptive_rows(entries)) or "Not tried: no figure below is a protection.",
        "## False alarms and time",
        "Thresholds allow 1 % and 5 % of false alarms. *Shifted* are clean images of "
        f"{words.markdown(shifted['name'])}.{_too_few(images['calibration'])}",
        _table(_clean_rows(entries)),
        "## Attacks that do not know the detector",
        "Per cent of attacked images that raise an alarm, with the 95 % interval. A detector that "
        "knew the attack was scored without.",
        _table(_attack_rows(entries)),
        *(f"{entry['detector']} is absent: {entry['reason']}." for entry in document["absent"]),
    ]
    return "\n\n".join(parts) + "\n"


def _too_few(calibration: int) -> str:
    """Says which thresholds so few images cannot give: they are then the largest of the scores."""
    rates = [rate for rate in (1, 5) if calibration * rate < 100]
    if not rates:
        return ""
    shares = " and ".join(f"{rate} %" for rate in rates)
    return (
        f" {shares} of {calibration} calibration images are less than one image: that threshold is "
        "their largest score, and allows more."
    )


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    return markdown_table(rows) if rows else ""


def _percent(share: Mapping[str, Any]) -> str:
    low, high = share["ci95"]
    return f"{100 * share['share']:.0f} ({100 * low:.0f} to {100 * high:.0f})"


def _area(entry: Mapping[str, Any]) -> str:
    low, high = entry["auc_ci95"]
    return f"{entry['auc']:.2f} ({low:.2f} to {high:.2f})"


def _adaptive_rows(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    rows = []
    for entry in entries:
        for tried in entry["adaptive"]:
            kind = "single images" if tried["family"] == "per_image" else "one for all"
            rows.append(
                {
                    "detector": entry["detector"],
                    "attack": f"{kind}, {budget(tried['epsilon'], tried['threat'])}",
                    "AUC": _area(tried),
                    "plain": _percent(tried["plain_success"]),
                    "unseen": _percent(tried["undetected_success"]),
                    "verdict": tried["verdict"],
                }
            )
    return rows


def _clean_rows(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [
        {
            "detector": entry["detector"],
            "clean, at 1 %": _percent(entry["clean"]["at_1_percent"]),
            "clean, at 5 %": _percent(entry["clean"]["at_5_percent"]),
            "shifted, at 5 %": _percent(entry["shifted"]["at_5_percent"]),
            "ms an image": f"{entry['milliseconds']:.1f}",
        }
        for entry in entries
    ]


def _attack_rows(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    rows = []
    for entry in entries:
        for attack in entry["attacks"]:
            seed = "" if attack["seed"] is None else f", seed {attack['seed']}"
            rows.append(
                {
                    "attack": attack["attack"] + seed,
                    "budget": budget(attack["epsilon"], attack["threat"]),
                    "detector": entry["detector"],
                    "AUC": _area(attack),
                    "at 1 %": _percent(attack["at_1_percent"]),
                    "at 5 %": _percent(attack["at_5_percent"]),
                }
            )
    # By attack: a reader asks what finds this one.
    return sorted(rows, key=lambda row: (row["attack"], row["budget"]))

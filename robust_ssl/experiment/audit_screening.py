"""What a screening says, as the rows of an audit's page."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from robust_ssl.experiment.context import Context
from robust_ssl.experiment.screen import finished

_log = logging.getLogger(__name__)


def read_screening(context: Context) -> dict[str, Any] | None:
    """Returns what the stage `screen` left for the page; None where it was not run to its end."""
    results = finished(context)
    if results is None:
        return None
    screened, audited = results["model"], context.plan.audit.secured
    if screened != audited:
        _log.warning(
            "the screening is of %s and the audit of %s: the page is without it; set "
            "screening.model=%s and run the stage screen in another working directory",
            *(screened, audited, audited),
        )
        return None
    return screening_of(results, float(context.plan.suite.epsilon))


def screening_of(results: Mapping[str, Any], epsilon: float) -> dict[str, Any]:
    """Returns the detectors with their verdicts, and a row for each attack on each.

    Args:
      results: Of the stage `screen`: ``detectors``, each with ``attacks`` that do not know it and
        ``adaptive`` ones that do.
      epsilon: The budget whose attacks are shown; adaptive ones are, whatever theirs is.
    """
    rows, verdicts = [], []
    for entry in results["detectors"]:
        name = entry["detector"]
        verdicts.append({"detector": name, "verdict": entry["verdict"]})
        shown = [attack for attack in entry["attacks"] if abs(attack["epsilon"] - epsilon) < 1e-9]
        rows += [_row(name, attack, adaptive=False) for attack in shown]
        rows += [_row(name, attack, adaptive=True) for attack in entry["adaptive"]]
    return {"rows": rows, "verdicts": verdicts}


def _row(detector: str, entry: Mapping[str, Any], *, adaptive: bool) -> dict[str, Any]:
    return {
        "detector": detector,
        "attack": entry.get("attack") or entry["family"],
        "adaptive": adaptive,
        "auc": entry["auc"],
        "tpr_1": _estimate(entry["at_1_percent"]),
        "tpr_5": _estimate(entry["at_5_percent"]),
    }


def _estimate(share: Mapping[str, Any]) -> dict[str, Any]:
    low, high = share["ci95"]
    return {"value": share["share"], "low": low, "high": high, "n": share["n"]}

"""Can the figures be believed?  One line for each model, then only what did not pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from robust_ssl.report.tables import model_name, models_of

_GRAVE_FIRST = ("failed", "note")


def verdict_lines(document: Mapping[str, Any]) -> list[str]:
    """Returns the verdict on each model in one line, then what did not pass, indented.

    Args:
      document: ``results.json``.

    Returns:
      Lines of text; a model that was not examined is said to be so.
    """
    lines = []
    for model in models_of(document["results"]):
        found = document["verdicts"].get(model)
        if found is None:
            lines.append(f"{model_name(model)}: not examined")
            continue
        lines.append(f"{model_name(model)}: {found['verdict']}{_count(found)}")
        lines += [f"  {_sentence(check)}" for check in _not_passed(found)]
    return lines


def verdict_section(verdicts: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the report's section on verdicts as Markdown; empty where nothing was examined.

    Args:
      verdicts: By model, as in ``results.json``.
    """
    if not verdicts:
        return ""
    lines = ["## Can these figures be believed?", ""]
    for model, found in verdicts.items():
        lines.append(f"- {model_name(model)}: **{found['verdict']}**{_count(found)}")
        lines += [f"  - {_sentence(check)}" for check in _not_passed(found)]
    return "\n".join(lines)


def _count(found: Mapping[str, Any]) -> str:
    run = [check for check in found["checks"] if check["status"] != "not run"]
    passed = sum(check["status"] == "passed" for check in run)
    examined = f"; examined: {found['examined']}" if found.get("examined") else ""
    return f" ({passed} of {len(run)} checks passed{examined})"


def _not_passed(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [
        check for status in _GRAVE_FIRST for check in found["checks"] if check["status"] == status
    ]


def _sentence(check: Mapping[str, Any]) -> str:
    """Returns value, limit, what it means and what to do."""
    measured = "" if check["value"] is None else f": {_number(check['value'])}"
    held = "" if check["limit"] is None else f" (limit {_number(check['limit'])})"
    head = f"{check['status']}: {check['number']} {check['name']}{measured}{held}."
    return " ".join(part for part in (head, check["meaning"], check["advice"]) if part)


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"

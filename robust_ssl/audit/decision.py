"""From what was measured to a decision: risk, gates, checklists; the same every time."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from typing import Any

from robust_ssl import settings
from robust_ssl.audit import answers as answers_file
from robust_ssl.audit import checklists, document, frameworks, gates, policy, risk
from robust_ssl.audit.answers import AMOUNTS, STAGES, Answers


def rules(policy_file: str | os.PathLike | None, answers_path: str | os.PathLike | None):
    """Reads what a decision goes by, before anything is measured.

    Returns:
      The policy, the items of the checklist, and the answers.

    Raises:
      EntryError: Naming file and line of what is wrong.
    """
    limits, items = policy.read(policy_file), checklists.read()
    readers = {gate.id: gate.read_limit for gate in limits}
    ids = [item.id for item in items]
    return limits, items, answers_file.read(answers_path, readers, ids)


def decide(
    whole: Mapping[str, Any],
    stage: str,
    limits: policy.Policy,
    items: Sequence[checklists.Item],
    answers: Answers,
    date: datetime.date | None = None,
) -> dict[str, Any]:
    """Returns a document with what is decided on it for a stage.

    Args:
      whole: A document, sealed.
      stage: One of `answers.STAGES`.
      limits: The policy.
      items: The checklist.
      answers: What the company says.
      date: Of the decision; None is today.

    Raises:
      MissingFigureError: If a gate points to a figure that is not there.
    """
    if stage not in STAGES:
        raise ValueError(f"there is no stage {stage!r}; there are {', '.join(STAGES)}")
    date = date or datetime.date.today()
    decided: dict[str, Any] = {
        "date": str(date),
        "stage": stage,
        "answers": answers.as_json(),
        "risk": assess(whole["measured"], answers),
    }
    document_ = {**whole, "decided": decided}
    held = at(stage, limits, answers)
    decided["gates"] = [gates.judge(gate, document_, stage, answers, date) for gate in held]
    decided["policy"] = _origin(limits, decided["gates"], stage)
    decided["outcome"] = gates.overall(decided["gates"])
    decided["counts"] = {
        outcome.replace(" ", "_"): sum(g["outcome"] == outcome for g in decided["gates"])
        for outcome in (gates.PASSED, gates.FAILED, gates.NOT_DECIDABLE, gates.WAIVED)
    }
    # Nobody answers for a figure that is not trusted: that a waiver did nothing has to be said too.
    vain = {g["id"] for g in decided["gates"] if g["untrusted"] and not g["waiver"]}
    decided["expired"] = [
        w.as_json() for w in answers.waivers if not w.counts(date) or w.gate in vain
    ]
    decided["checklist"] = checklists.judge(items, document_, stage, answers, date)
    done = sum(item["state"] != checklists.NOT_DONE for item in decided["checklist"])
    decided["checklist_done"] = done
    decided["checklist_items"] = len(decided["checklist"])
    decided["frameworks"] = frameworks.as_json()
    document.check(document_)
    return document_


def _origin(
    limits: policy.Policy, judged: Sequence[Mapping[str, Any]], stage: str
) -> dict[str, Any]:
    """Returns which policy decided, and what the shipped one asks for beyond it."""
    beyond = gates.beyond(judged, policy.shipped(), stage) if limits.is_own else []
    return {
        "origin": "own" if limits.is_own else "shipped",
        "file": limits.file,
        "sha256": limits.sha256,
        "shipped_beyond": beyond,
    }


def at(stage: str, limits: policy.Policy, answers: Answers) -> list[policy.Gate]:
    """Returns the gates that decide on a stage.

    Raises:
      SettingsError: If there is none.
    """
    # A limit of the company's own stands, even where the policy has none at this stage.
    held = [gate for gate in limits if stage in gate.limits or gate.id in answers.limits]
    if not held:
        raise settings.SettingsError(
            f"{limits.gates[0].where.split(',')[0]}: no gate has a limit for the stage "
            f"{stage!r}, so nothing would be decided"
        )
    return held


def is_secured_measured(measured: Mapping[str, Any]) -> bool:
    """Whether there are shares of the secured classifier: its recipe may have failed."""
    return all(measured[name]["secured"] is not None for name in ("attacked", "clean"))


def assess(measured: Mapping[str, Any], answers: Answers) -> dict[str, Any] | None:
    """Returns the risk section; None where amounts are missing or nothing secured was measured."""
    if any(name not in answers.amounts for name in AMOUNTS) or not is_secured_measured(measured):
        return None
    attacked, clean, cost = (measured[name] for name in ("attacked", "clean", "cost"))

    def share(figure: Mapping[str, Any]) -> tuple[float, int]:
        return figure["value"], figure["n"]

    hours = cost["extra_training_seconds"]
    rates = risk.Rates(
        success_before=share(attacked["usual"]["success"]),
        success_after=share(attacked["secured"]["success"]),
        clean_before=share(clean["usual"]),
        clean_after=share(clean["secured"]),
        extra_training_hours=(hours or 0.0) / risk.SECONDS_PER_HOUR,
        inference_ratio=cost["inference_ratio"],
    )
    return {
        "currency": answers.currency,
        "training_counted": hours is not None,
        **risk.assess(answers.amounts, rates),
    }

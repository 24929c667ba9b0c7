"""Checklists of a roll-out: each item is ticked by evidence, by a named person, or not done."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import importlib.resources
import io
from collections.abc import Mapping, Sequence
from typing import Any

from robust_ssl import words
from robust_ssl.audit import gates, lines, policy
from robust_ssl.audit.answers import STAGES, Answers
from robust_ssl.audit.lines import Entry

PHASES = ("select", "finetune", "deploy", "operate")
BY_EVIDENCE, BY_PERSON, NOT_DONE = "evidence", "person", "not done"


@dataclasses.dataclass(frozen=True)
class Item:
    """One thing to be done.

    Attributes:
      id: Its name in answers.
      phase: One of `PHASES`.
      stage: From which stage on it is asked for.
      text: In each language.
      evidence: Pointer, comparison and limit that tick it; None where a person has to.
    """

    id: str
    phase: str
    stage: str
    text: Mapping[str, str]
    evidence: tuple[str, str, float | str] | None = None


def read() -> tuple[Item, ...]:
    """Reads the checklist that is shipped."""
    file = importlib.resources.files("robust_ssl.audit") / "checklist.yaml"
    entry = lines.parse(file.read_bytes(), "checklist.yaml")
    return tuple(_item(item) for item in entry.get("items").list())


def _item(entry: Entry) -> Item:
    entries = entry.mapping(("id", "phase", "from", "text", "evidence"))
    return Item(
        id=entry.get("id").text(),
        phase=entry.get("phase").one_of(PHASES),
        stage=entry.get("from").one_of(STAGES),
        text=policy.texts(entry.get("text")),
        evidence=_evidence(entries["evidence"]) if "evidence" in entries else None,
    )


def _evidence(entry: Entry) -> tuple[str, str, float | str]:
    comparison = entry.get("comparison").one_of(policy.COMPARISONS)
    limit = entry.get("limit")
    value = limit.text() if comparison == "is" else limit.number()
    return entry.get("measure").text(), comparison, value


def judge(
    items: Sequence[Item],
    document: Mapping[str, Any],
    stage: str,
    answers: Answers,
    date: datetime.date,
) -> list[dict[str, Any]]:
    """Returns the items of a stage, each with how it is ticked.

    Evidence comes before what a person says: where it speaks against an item, nobody's word ticks
    it.  What somebody says from a later day on does not count yet.
    """
    asked = [item for item in items if STAGES.index(item.stage) <= STAGES.index(stage)]
    return [_state(item, document, answers, date) for item in asked]


def _state(
    item: Item, document: Mapping[str, Any], answers: Answers, date: datetime.date
) -> dict[str, Any]:
    held = None
    if item.evidence:
        pointer, comparison, limit = item.evidence
        where = f"item {item.id}"
        figure = gates.resolve(document, pointer, where)
        held = gates.holds(figure, comparison, limit, where)
    tick = answers.ticks.get(item.id)
    said = tick is not None and tick.done and held is None and tick.date <= date
    state = BY_EVIDENCE if held else BY_PERSON if said else NOT_DONE
    return {
        "id": item.id,
        "phase": item.phase,
        "text": dict(item.text),
        "state": state,
        "pointer": item.evidence[0] if item.evidence else None,
        "by": tick.by if tick else None,
        "date": str(tick.date) if tick else None,
        "note": tick.note if tick else None,
    }


def as_csv(items: Sequence[Mapping[str, Any]], header: Sequence[str]) -> bytes:
    """Returns the checklist as a spreadsheet opens it: UTF-8 with a byte order mark.

    Args:
      items: As `judge` returns them.
      header: The names of the eight columns.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(header)
    for item in items:
        said = [item[name] or "" for name in ("by", "date", "pointer", "note")]
        row = [item["phase"], item["text"]["en"], item["text"]["ja"], item["state"], *said]
        writer.writerow([words.csv_cell(cell) for cell in row])
    return text.getvalue().encode("utf-8-sig")

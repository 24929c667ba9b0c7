"""What a company says of its own business: ``answers.yaml``, read with the line of every mistake.

Amounts nobody knows exactly are given as low, likely and high.  What is left empty is listed on the
page as missing; what is wrong is refused, because a page of wrong money is worse than none.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.resources
import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from robust_ssl.audit import lines
from robust_ssl.audit.lines import Entry

LANGUAGES = ("en", "ja")
STAGES = ("pilot", "staged", "full")
AMOUNTS = {  # each with the largest value it may have
    "decisions_per_year": 1e15,
    "attacked_share": 1.0,
    "loss_per_error": 1e15,
    "loss_per_clean_error": 1e15,
    "one_off_cost": 1e15,
    "compute_price_per_hour": 1e9,
    "retrainings_per_year": 1e4,
    "inference_price_per_1000": 1e9,
}
_POINTS = ("low", "likely", "high")
Gates = Mapping[str, Callable[[Entry], float | str]]  # what reads a limit of each


@dataclasses.dataclass(frozen=True)
class Triangle:
    """An amount that is not known exactly: a triangular distribution.

    Example:
      >>> Triangle(1.0, 2.0, 6.0).mean
      3.0
    """

    low: float
    likely: float
    high: float

    @property
    def mean(self) -> float:
        """The mean of the distribution."""
        return (self.low + self.likely + self.high) / 3


@dataclasses.dataclass(frozen=True)
class Tick:
    """What a named person says of an item of the checklist.

    Attributes:
      done: Whether it is done.
      by: Who says so.
      date: When.
      note: In their own words.
    """

    done: bool
    by: str
    date: datetime.date
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Waiver:
    """A gate that somebody answers for although it is not passed.

    Attributes:
      gate: Its id.
      name: Who answers for it.
      date: Since when.
      reason: Why.
      until: The last day on which it counts.
    """

    gate: str
    name: str
    date: datetime.date
    reason: str
    until: datetime.date

    def counts(self, today: datetime.date) -> bool:
        """Whether it counts on a day."""
        return self.date <= today <= self.until

    def as_json(self) -> dict[str, str]:
        """Returns what ``audit.json`` keeps of it."""
        return {name: str(value) for name, value in dataclasses.asdict(self).items()}


@dataclasses.dataclass(frozen=True)
class Limit:
    """A limit of the company's own in place of the policy's.

    Attributes:
      value: What the gate is held to, a number or a word.
      reason: Why.
      line: Of the file.
    """

    value: float | str
    reason: str
    line: int


@dataclasses.dataclass(frozen=True)
class Answers:
    """A company's answers, read.

    Attributes:
      file: Where they were read from; empty where there are none.
      organization: Who decides.
      use: What the classifier is for.
      owner: Who answers for the decision.
      currency: Of every amount of money, for example ``"JPY"``.
      amounts: By name, those of `AMOUNTS` that were filled in.
      missing: The names of those that were not.
      limits: By gate.
      ticks: By item of the checklist.
      waivers: As they stand; `Waiver.counts` says which count.
    """

    file: str = ""
    organization: str = ""
    use: str = ""
    owner: str = ""
    currency: str = ""
    amounts: Mapping[str, Triangle] = dataclasses.field(default_factory=dict)
    missing: tuple[str, ...] = tuple(AMOUNTS)
    limits: Mapping[str, Limit] = dataclasses.field(default_factory=dict)
    ticks: Mapping[str, Tick] = dataclasses.field(default_factory=dict)
    waivers: tuple[Waiver, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Returns what ``audit.json`` keeps of them, plain values."""
        return {
            "organization": self.organization,
            "use": self.use,
            "owner": self.owner,
            "currency": self.currency,
            "amounts": {name: dataclasses.asdict(t) for name, t in self.amounts.items()},
            "missing": list(self.missing),
        }


_KNOWN = ("organization", "use", "owner", "business", "limits", "checklist", "waivers")


def template(language: str) -> str:
    """Returns a commented ``answers.yaml`` to fill in, in English or Japanese."""
    folder = importlib.resources.files("robust_ssl.audit")
    return (folder / f"answers.{language}.yaml").read_text(encoding="utf-8")


def read(path: str | os.PathLike | None, gates: Gates, items: Collection[str]) -> Answers:
    """Reads ``answers.yaml``.

    Args:
      path: The file; None where there is none.
      gates: What reads a limit, by the ids that limits and waivers may name.
      items: The ids that ticks may name.

    Raises:
      EntryError: If it cannot be read, or naming the line of what is misspelt, missing, negative
        or reversed.
    """
    if path is None:
        return Answers()
    content = lines.read_bytes(path, "; `robust-ssl audit init > answers.yaml` begins one")
    return parse(lines.parse(content, os.fspath(path)), gates, items)


def parse(entry: Entry, gates: Gates, items: Collection[str]) -> Answers:
    """Reads the entries of an ``answers.yaml``; see `read`.

    Example:
      >>> parse(lines.parse("business: {decisions_per_yaer: 5}", "answers.yaml"), {}, [])
      Traceback (most recent call last):
      ...
      robust_ssl.audit.lines.EntryError: answers.yaml, line 1: unknown entry 'decisions_per_yaer'...
    """
    sections = entry.mapping(_KNOWN)
    texts = {n: sections[n].text() for n in ("organization", "use", "owner") if n in sections}
    currency, amounts = _business(sections["business"]) if "business" in sections else ("", {})
    return Answers(
        file=entry.file,
        **texts,
        currency=currency,
        amounts=amounts,
        missing=tuple(name for name in AMOUNTS if name not in amounts),
        limits=_limits(sections.get("limits"), gates),
        ticks=_ticks(sections.get("checklist"), items),
        waivers=_waivers(sections.get("waivers"), gates),
    )


def _business(section: Entry) -> tuple[str, dict[str, Triangle]]:
    entries = section.mapping(("currency", *AMOUNTS))
    if section.is_blank:
        return "", {}
    # A line that was deleted is a mistake, one that was left empty is an answer: not known yet.
    for name in ("currency", *AMOUNTS):
        if name not in entries:
            raise section.error(f"lacks {name!r}; add `{name}:` (it may be left empty)")
    currency = entries["currency"].text()
    amounts = {
        name: _triangle(entries[name], high)
        for name, high in AMOUNTS.items()
        if not entries[name].is_blank
    }
    if not re.fullmatch("[A-Z]{3}", currency):
        raise entries["currency"].error(
            f"is {currency!r}; write the three letters of a currency, such as JPY"
        )
    return currency, amounts


def _triangle(entry: Entry, high: float) -> Triangle:
    """Reads ``{low: , likely: , high: }``, a list of the three, or one number."""
    if isinstance(entry.value, str):
        number = entry.number(0, high)
        return Triangle(number, number, number)
    if isinstance(entry.value, list):
        if len(entry.value) != len(_POINTS):
            raise entry.error("must be three numbers: [low, likely, high]")
        points = entry.value
    else:
        entry.mapping(_POINTS)
        points = [entry.get(name) for name in _POINTS]
    numbers = [point.number(0, high) for point in points]
    for place in (1, 2):
        if numbers[place] < numbers[place - 1]:
            before, after = _POINTS[place - 1], _POINTS[place]
            raise points[place].error(
                f"is {numbers[place]:g}, below {before}, {numbers[place - 1]:g}; {before} must not "
                f"be above {after}"
            )
    return Triangle(*numbers)


def _limits(section: Entry | None, gates: Gates) -> dict[str, Limit]:
    limits = {}
    for gate, entry in section.mapping(gates).items() if section else ():
        entry.mapping(("limit", "reason"))
        value = gates[gate](entry.get("limit"))
        limits[gate] = Limit(value, entry.get("reason").text(), entry.line)
    return limits


def _ticks(section: Entry | None, items: Collection[str]) -> dict[str, Tick]:
    ticks = {}
    for item, entry in section.mapping(items).items() if section else ():
        entries = entry.mapping(("done", "by", "date", "note"))
        if entry.is_blank:
            continue
        ticks[item] = Tick(
            done=entry.get("done").flag(),
            by=entry.get("by").text(),
            date=entry.get("date").date(),
            note=entries["note"].text() if "note" in entries else "",
        )
    return ticks


def _waivers(section: Entry | None, gates: Collection[str]) -> tuple[Waiver, ...]:
    waivers = []
    for entry in section.list() if section else ():
        entry.mapping(("gate", "name", "date", "reason", "until"))
        waiver = Waiver(
            gate=entry.get("gate").one_of(gates),
            name=entry.get("name").text(),
            date=entry.get("date").date(),
            reason=entry.get("reason").text(),
            until=entry.get("until").date(),
        )
        if waiver.until < waiver.date:
            raise entry.get("until").error(f"is before its date, {waiver.date}")
        waivers.append(waiver)
    return tuple(waivers)

"""The policy: which limits each stage of a roll-out has, each with its reason in both languages."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.resources
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from robust_ssl.audit import lines, measures
from robust_ssl.audit.answers import LANGUAGES, STAGES
from robust_ssl.audit.lines import Entry

COMPARISONS = ("at_least", "at_most", "is")
# The end of its interval that a figure is held to a limit by, and the limit which no end reaches.
_BEYOND = {"at_least": ("low", 1), "at_most": ("high", 0)}
_TRUTHS = {"yes": "true", "no": "false"}  # as the page writes them
_WAIVE = "; to let it open, write a waiver, which has a name and an end"
_ENTRIES = ("id", "measure", "comparison", "limit", "unit", "title", "reason")


@dataclasses.dataclass(frozen=True)
class Gate:
    """One line of a policy.

    Attributes:
      id: Its name in limits and waivers.
      measure: A JSON pointer into ``audit.json``.
      comparison: One of `COMPARISONS`.
      limits: By stage; a stage that is not named has no such gate.
      unit: How its figure is written, one of `measures.UNITS`.
      title: In each language.
      reason: Why there is this limit, in each language.
      where: File and line, for errors.
    """

    id: str
    measure: str
    comparison: str
    limits: Mapping[str, float | str]
    unit: str
    title: Mapping[str, str]
    reason: Mapping[str, str]
    where: str

    def read_limit(self, entry: Entry) -> float | str:
        """Reads a limit of this gate, the policy's or somebody's own.

        Raises:
          EntryError: If it is no number where one is needed, or none that its figure can have:
            of 20 % the share is 0.2, and a gate at 20 would be open for good; or if it is a word
            that the policy does not ask for here.
        """
        limit = _limit(entry, self.comparison, self.unit, self.measure)
        asked = {*self.limits.values()}
        if self.comparison == "is" and limit not in asked:
            words = " or ".join(sorted(repr(word) for word in asked))
            raise entry.error(f"is {limit!r}; this gate asks for {words}{_WAIVE}")
        return limit

    def limit_at(self, stage: str) -> float | str:
        """Returns the limit at a stage that has one."""
        return self.limits[stage]


@dataclasses.dataclass(frozen=True)
class Policy:
    """The gates of a policy, and where it is from.

    Attributes:
      gates: As they stand in the file.
      file: Its name.
      sha256: Of the file's bytes; empty where it was read from no file.
    """

    gates: tuple[Gate, ...]
    file: str
    sha256: str = ""

    def __iter__(self) -> Iterator[Gate]:
        return iter(self.gates)

    @property
    def is_own(self) -> bool:
        """Whether it is another than the shipped one; an unchanged copy is not."""
        return self.sha256 != shipped().sha256


def read(path: str | os.PathLike | None = None) -> Policy:
    """Reads a policy; None is the one that is shipped.

    Raises:
      EntryError: If it cannot be read, or naming the line of what is wrong.
    """
    if path is None:
        return shipped()
    return _parse_bytes(lines.read_bytes(path), os.fspath(path))


@functools.cache
def shipped() -> Policy:
    """Returns the policy that comes with the package."""
    file = importlib.resources.files("robust_ssl.audit") / "policy.yaml"
    return _parse_bytes(file.read_bytes(), "policy.yaml")


def _parse_bytes(content: bytes, file: str) -> Policy:
    return parse(lines.parse(content, file), hashlib.sha256(content).hexdigest())


def parse(entry: Entry, sha256: str = "") -> Policy:
    """Reads the entries of a policy; see `read`."""
    entry.mapping(("gates",))
    gates: dict[str, Gate] = {}
    for item in entry.get("gates").list():
        gate = _gate(item)
        if gate.id in gates:
            raise item.error(f"has the id {gate.id!r}, which is there twice")
        gates[gate.id] = gate
    if not gates:
        raise entry.error("has no gate; a policy without one decides nothing")
    return Policy(tuple(gates.values()), pathlib.Path(entry.file).name, sha256)


def _gate(entry: Entry) -> Gate:
    entries = entry.mapping(_ENTRIES)
    name, comparison = entry.get("id").text(), entry.get("comparison").one_of(COMPARISONS)
    measure = entry.get("measure").text()
    if not measure.startswith(("/measured/", "/decided/risk")):
        raise entry.get("measure").error(
            f"is {measure!r}; a JSON pointer begins with /measured/ or /decided/risk"
        )
    unit = entries["unit"].one_of(measures.UNITS) if "unit" in entries else None
    unit = unit or measures.measure_at(measure).unit
    return Gate(
        id=name,
        measure=measure,
        comparison=comparison,
        limits=_limits(entry.get("limit"), comparison, unit, measure),
        unit=unit,
        title=texts(entry.get("title")),
        reason=texts(entry.get("reason")),
        where=f"{entry.file}, line {entry.line}, gate {name}",
    )


def _limits(entry: Entry, *kind: str) -> dict[str, Any]:
    """Reads one limit for all stages, or one for each."""
    if isinstance(entry.value, dict):
        stages = entry.mapping(STAGES)
        return {stage: _limit(entry.get(stage), *kind) for stage in stages}
    return dict.fromkeys(STAGES, _limit(entry, *kind))


def _limit(entry: Entry, comparison: str, unit: str, measure: str) -> float | str:
    if comparison == "is":
        return _TRUTHS.get(entry.text().lower(), entry.text())
    number, known = entry.number(), measures.measure_at(measure, unit)
    if known.unit == "points" and abs(number) > known.high:
        raise entry.error(f"is {entry.text()}; three points are written 0.03")
    if "count" in (unit, known.unit) and not number.is_integer():
        raise entry.error(f"is {entry.text()}; a count is a whole number")
    # Above a greatest value the error says what was meant: of 20 % the share is 0.2.
    if number <= known.low if comparison == "at_least" else number == known.high:
        raise entry.error(f"is {entry.text()}, which every figure keeps{_WAIVE}")
    end, beyond = _BEYOND[comparison]
    if number == beyond and measures.is_estimated(measure, end):
        raise entry.error(
            f"is {entry.text()}, which no figure can reach: the end of its interval is compared, "
            "and images are finitely many"
        )
    return entry.number(known.low, known.high)


def texts(entry: Entry) -> dict[str, str]:
    """Returns a text in each language; one alone stands for both."""
    if isinstance(entry.value, str):
        return dict.fromkeys(LANGUAGES, entry.text())
    entry.mapping(LANGUAGES)
    return {language: " ".join(entry.get(language).text().split()) for language in LANGUAGES}

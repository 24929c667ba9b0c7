"""The outcome of a check: passed, failed or absent, what it saw, and the evidence."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

from robust_ssl import words

Outcome = Literal["pass", "fail", "absent"]
# In this order, and never one left out: what is not shown is said to be absent.
NAMES = (
    *("revision", "files", "format", "signature", "architecture"),
    *("weights", "references", "documents", "scanner", "training"),
)
OPINIONS = ("scanner",)  # printed, never deciding anything
INSTALL = "install robust-ssl[provenance]"


@dataclasses.dataclass(frozen=True)
class Check:
    """One check and its outcome.

    Attributes:
      number: From 1.
      name: Which check.
      outcome: ``"pass"``, ``"fail"``, or ``"absent"`` where there is nothing to judge by.
      said: The outcome in words, never empty.
      evidence: What it was judged by, JSON values.

    Example:
      >>> print(Check(2, "files", "pass", "3 files are those of the lock"))
       2  pass    files         3 files are those of the lock
    """

    number: int
    name: str
    outcome: Outcome
    said: str
    evidence: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.number:2}  {self.outcome:6}  {self.name:12}  {words.line(self.said)}"

    def as_json(self) -> dict[str, Any]:
        """Returns the check as JSON has it."""
        return {
            "number": self.number,
            "name": self.name,
            "outcome": self.outcome,
            "said": self.said,
            "evidence": dict(self.evidence),
        }


def of(name: str, outcome: Outcome, said: str, **evidence: Any) -> Check:
    """Returns the outcome of one of the ten checks."""
    return Check(NAMES.index(name) + 1, name, outcome, said, evidence)


def passed(name: str, said: str, **evidence: Any) -> Check:
    """Returns that a check has passed."""
    return of(name, "pass", said, **evidence)


def failed(name: str, said: str, **evidence: Any) -> Check:
    """Returns that a check has failed."""
    return of(name, "fail", said, **evidence)


def absent(name: str, said: str, **evidence: Any) -> Check:
    """Returns that there is nothing to judge by."""
    return of(name, "absent", said, **evidence)


def as_json(checks: Iterable[Check]) -> list[dict[str, Any]]:
    """Returns checks as JSON has them."""
    return [check.as_json() for check in checks]


def show(checks: Iterable[Check]) -> str:
    """Returns checks as lines to read."""
    return "\n".join(map(str, checks))


def differs(checks: Iterable[Check]) -> bool:
    """Whether a check has failed; an opinion decides nothing."""
    return any(check.outcome == "fail" for check in checks if check.name not in OPINIONS)


def is_missing(checks: Iterable[Check], needed: Collection[str]) -> bool:
    """Whether one of the needed checks, by name, has nothing to judge by."""
    return any(check.outcome == "absent" for check in checks if check.name in needed)


def holds(checks: Iterable[Check], needed: Collection[str]) -> bool:
    """Whether no check has failed and none of the needed ones is absent."""
    checks = tuple(checks)
    return not differs(checks) and not is_missing(checks, needed)


def some(names: Iterable[str], most: int = 5) -> str:
    """Returns the first of some names, and how many more there are.

    Example:
      >>> some(["a", "b", "c"], most=2)
      'a, b and 1 more'
    """
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

"""What a check finds, and the verdict over all of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

TRUSTED, WITH_NOTES, NOT_TRUSTED = "trusted", "trusted with notes", "not trusted"
NOT_EXAMINED = "not examined"
ESSENTIAL = frozenset(range(1, 7))  # is the gradient honest?  Without these nothing can be said
STATUSES = ("passed", "not run", "note", "failed")  # from harmless to grave

NAMES = {
    1: "finite logits",
    2: "deterministic output",
    3: "logits, not probabilities",
    4: "zero gradient, cross-entropy",
    5: "zero gradient, margin",
    6: "gradient against finite differences",
    7: "steps that lower the loss",
    8: "converged",
    9: "silent hits",
    10: "twice the steps",
    11: "iterative against one step",
    12: "objectives agree",
    13: "accuracy against epsilon",
    14: "full-range epsilon",
    15: "stronger than random noise",
    16: "black box not stronger",
    17: "transfer not stronger",
    18: "budget and range",
    19: "8-bit rounding",
    20: "enough images",
    21: "per-image attack at least as strong",
    22: "beats noise and its own shuffled pixels",
    23: "holds on new images",
    24: "seeds agree",
    25: "crafted again after hardening",
    26: "patch at random and fixed places",
    27: "batch statistics unchanged",
}


@dataclasses.dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
      number: 1 to 27; its name is ``NAMES[number]``.
      value: What was measured; None where nothing was.
      limit: What it was held against; None where there is none.
      status: ``"passed"``, ``"note"``, ``"failed"`` or ``"not run"``.
      meaning: What it means that the check did not pass, or why it was not run.
      advice: What to do then.
      source: Where the check comes from.

    Example:
      >>> check = Check(4, 0.25, 0.01, "failed", "A quarter has no gradient.", "Attack without.")
      >>> print(check)
      failed: 4 zero gradient, cross-entropy: 0.25 (limit 0.01). A quarter has no gradient. Attack
      without.
    """

    number: int
    value: float | None
    limit: float | None
    status: str
    meaning: str
    advice: str = ""
    source: str = ""

    def __post_init__(self):
        if self.status not in STATUSES or self.number not in NAMES:
            raise ValueError(
                f"a check has a number in 1 to 27 and a status in {STATUSES}, "
                f"got {self.number} and {self.status!r}"
            )

    @property
    def name(self) -> str:
        """What is checked, in words."""
        return NAMES[self.number]

    def __str__(self) -> str:
        """Returns one line: value, limit, what it means and what to do."""
        measured = "" if self.value is None else f": {self.value:.4g}"
        held = "" if self.limit is None else f" (limit {self.limit:.4g})"
        head = f"{self.status}: {self.number} {self.name}{measured}{held}."
        return " ".join(part for part in (head, self.meaning, self.advice) if part)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON; a value that is no finite number becomes a string."""
        fields = {"number": self.number, "name": self.name, **dataclasses.asdict(self)}
        return {name: _plain(value) for name, value in fields.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else str(float(value))
    return int(value) if isinstance(value, np.integer) else value


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a robustness figure can be believed: the worst of its checks.

    A check that was not run says nothing: it is listed in `as_dict` and does not lower the
    verdict.

    Attributes:
      checks: What was found, by number.
      images: How many images were examined.
      gradient_evaluations: What the examination cost, in input gradients per examined image.
      accuracies: On the examined images, shares in [0, 1]: ``"clean"``, ``"reported"``, and
        ``"worst"``, right under the reported attacks and all of the examination.

    Example:
      >>> model = tuple(Check(number, 0.0, 0.0, "passed", "") for number in range(1, 7))
      >>> print(Verdict(model))
      trusted: 6 of 6 checks passed
      >>> few = Check(20, 0.03, 0.02, "note", "Few images.", "Take more.")
      >>> print(Verdict((*model, few)))
      trusted with notes: 6 of 7 checks passed
        note: 20 enough images: 0.03 (limit 0.02). Few images. Take more.
    """

    checks: tuple[Check, ...]
    images: int = 0
    gradient_evaluations: float = 0.0
    accuracies: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def word(self) -> str:
        """``"trusted"``, ``"trusted with notes"``, ``"not trusted"`` or ``"not examined"``.

        Trust needs an examined model: without checks 1 to 6 run it is ``"not examined"``, unless
        another check has failed.
        """
        found = {check.status for check in self.checks}
        run = {check.number for check in self.checks if check.status != "not run"}
        if "failed" not in found and not run >= ESSENTIAL:
            return NOT_EXAMINED
        if "failed" in found or found <= {"not run"}:
            return NOT_TRUSTED
        return WITH_NOTES if "note" in found else TRUSTED

    @property
    def trusted(self) -> bool:
        """Whether the figure was examined and nothing failed."""
        return self.word in (TRUSTED, WITH_NOTES)

    def numbers(self, status: str) -> tuple[int, ...]:
        """Returns the numbers of the checks with this status."""
        return tuple(check.number for check in self.checks if check.status == status)

    def __getitem__(self, number: int) -> Check:
        """Returns the check with this number."""
        return next(check for check in self.checks if check.number == number)

    def __add__(self, other: Verdict) -> Verdict:
        """Returns the verdict over the checks of both, for example per-image and universal."""
        return Verdict(
            self.checks + other.checks,
            max(self.images, other.images),
            self.gradient_evaluations + other.gradient_evaluations,
            {**other.accuracies, **self.accuracies},
        )

    def __str__(self) -> str:
        """Returns the verdict in one line, then only what did not pass."""
        run = [check for check in self.checks if check.status != "not run"]
        passed = sum(check.status == "passed" for check in run)
        grave = sorted(run, key=lambda check: STATUSES.index(check.status), reverse=True)
        lines = [f"{self.word}: {passed} of {len(run)} checks passed"]
        return "\n".join(lines + [f"  {check}" for check in grave if check.status != "passed"])

    def as_dict(self) -> dict[str, Any]:
        """Returns the part of ``results.json`` that belongs beside the figure."""
        return {
            "verdict": self.word,
            "images": int(self.images),
            "gradient_evaluations_per_image": round(float(self.gradient_evaluations), 3),
            "accuracies": {name: float(share) for name, share in self.accuracies.items()},
            "checks": [check.as_dict() for check in self.checks],
        }


def not_run(numbers: Iterable[int], reason: str) -> tuple[Check, ...]:
    """Returns checks that were not run, each with the reason.

    Example:
      >>> [check.status for check in not_run([16, 17], "no surrogate was given")]
      ['not run', 'not run']
    """
    return tuple(Check(number, None, None, "not run", reason) for number in numbers)


def status_at_most(value: float, limit: float, note: float | None = None) -> str:
    """Returns ``"passed"`` up to `limit`, ``"note"`` up to `note`, else (or if NaN) ``"failed"``.

    Example:
      >>> status_at_most(0.2, 0.1, note=0.3), status_at_most(float("nan"), 0.1)
      ('note', 'failed')
    """
    if value <= limit:
        return "passed"
    return "note" if note is not None and value <= note else "failed"


def status_of_difference(value: float, half_width: float, limit: float) -> str:
    """Returns ``"failed"`` where a difference is over its limit and no accident.

    Over the limit by accident, that is within the half-width of zero, is a ``"note"``: one image
    of a hundred proves nothing, and the limits were drawn on 497 images.

    Example:
      >>> [status_of_difference(v, 0.02, limit=0.002) for v in (0.001, 0.01, 0.03)]
      ['passed', 'note', 'failed']
    """
    if value <= limit + 1e-9:
        return "passed"
    return "failed" if value > half_width else "note"


def status_of_gain(gain: float, half_width: float, limit: float) -> str:
    """Returns ``"passed"`` where a gain is over its limit, ``"note"`` where it may well be.

    Example:
      >>> [status_of_gain(v, 0.02, limit=0.02) for v in (0.1, 0.01, 0.0)]
      ['passed', 'note', 'failed']
    """
    if gain > limit:
        return "passed"
    return "note" if gain > 0 and gain + half_width > limit else "failed"

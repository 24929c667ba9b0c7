"""The outcome of a check, and the verdict over all of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from robust_ssl.evaluation.checks.table import CHECKS, ESSENTIAL, names_of

# Of a figure, not of its model: an honest model whose figure is too good is not to blame for it.
BELIEVABLE, WITH_NOTES = "believable", "believable, with notes"
NOT_BELIEVABLE, NOT_EXAMINED = "not believable", "not examined"
STATUSES = ("passed", "not run", "note", "failed")  # from harmless to grave


@dataclasses.dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
      name: One of the `table.CHECKS`.
      status: ``"passed"``, ``"note"``, ``"failed"`` or ``"not run"``.
      value: What was measured; None where nothing was.
      limit: What it was held against; None where there is none.
      meaning: What it means that the check did not pass, or why it was not run.
      advice: What to do then.

    Example:
      >>> check = Check(
      ...     name="gradient_not_zero", status="failed", value=0.25, limit=0.01,
      ...     meaning="A quarter has no gradient.", advice="Attack without.")
      >>> print(check)
      failed: 4 nonzero gradient, cross-entropy: 0.25 (limit 0.01). A quarter has no gradient.
      Attack without.
    """

    name: str
    status: str
    value: float | None = None
    limit: float | None = None
    meaning: str = ""
    advice: str = ""

    def __post_init__(self):
        if self.name not in CHECKS or self.status not in STATUSES:
            raise ValueError(
                f"a check has a name of {', '.join(CHECKS)} and a status of "
                f"{', '.join(STATUSES)}, got {self.name!r} and {self.status!r}"
            )

    @property
    def title(self) -> str:
        """What is checked, in words."""
        return CHECKS[self.name].title

    @property
    def number(self) -> int:
        """The check's number in print."""
        return CHECKS[self.name].number

    def __str__(self) -> str:
        """Returns one line: value, limit, what it means and what to do."""
        measured = "" if self.value is None else f": {self.value:.4g}"
        held = "" if self.limit is None else f" (limit {self.limit:.4g})"
        head = f"{self.status}: {self.number} {self.title}{measured}{held}."
        return " ".join(part for part in (head, self.meaning, self.advice) if part)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON; a value that is no finite number becomes a string."""
        head = {"name": self.name, "title": self.title, "number": self.number}
        numbers = {"status": self.status, "value": _plain(self.value), "limit": _plain(self.limit)}
        return {**head, **numbers, "meaning": self.meaning, "advice": self.advice}


def _plain(value: float | np.generic | None) -> float | int | str | None:
    # JSON has no NaN and no infinity, which are just what a broken model measures.
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else str(float(value))
    return int(value) if isinstance(value, np.integer) else value


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a robustness figure can be believed: the worst of its checks.

    A check that was not run says nothing: it is listed in `as_dict` and does not lower the
    verdict.

    Attributes:
      checks: The outcomes, in the order of the table.
      images: How many images were examined.
      gradient_evaluations: What the examination cost, in input gradients per examined image.
      accuracies: On the examined images, shares in [0, 1]: ``"clean"``, ``"reported"``, and
        ``"worst"``, right under the reported attacks and all of the examination.

    Example:
      >>> model = tuple(Check(name=name, status="passed") for name in names_of(ESSENTIAL))
      >>> print(Verdict(model))
      believable: 6 of 6 checks passed
      >>> few = Check(name="enough_images", status="note", value=0.03, limit=0.02,
      ...             meaning="Few images.", advice="Take more.")
      >>> print(Verdict((*model, few)))
      believable, with notes: 6 of 7 checks passed
        note: 20 enough images: 0.03 (limit 0.02). Few images. Take more.
    """

    checks: tuple[Check, ...]
    images: int = 0
    gradient_evaluations: float = 0.0
    accuracies: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def word(self) -> str:
        """`BELIEVABLE`, `WITH_NOTES`, `NOT_BELIEVABLE` or `NOT_EXAMINED`.

        Belief needs an examined model: unless every essential check was run the figure is
        `NOT_EXAMINED`, except where another check has failed.
        """
        statuses = {check.status for check in self.checks}
        run = {check.name for check in self.checks if check.status != "not run"}
        if "failed" in statuses:
            return NOT_BELIEVABLE
        if not run >= ESSENTIAL:
            return NOT_EXAMINED
        return WITH_NOTES if "note" in statuses else BELIEVABLE

    @property
    def believable(self) -> bool:
        """Whether the figure was examined and nothing failed."""
        return self.word in (BELIEVABLE, WITH_NOTES)

    def names(self, status: str) -> tuple[str, ...]:
        """Returns the names of the checks with this status."""
        return tuple(check.name for check in self.checks if check.status == status)

    def __getitem__(self, name: str) -> Check:
        """Returns the check with this name."""
        return next(check for check in self.checks if check.name == name)

    def __add__(self, other: Verdict) -> Verdict:
        """Returns the verdict over the checks of both, for example per-image and universal."""
        return Verdict(
            self.checks + other.checks,
            max(self.images, other.images),
            self.gradient_evaluations + other.gradient_evaluations,
            {**other.accuracies, **self.accuracies},
        )

    def __str__(self) -> str:
        """Returns the verdict in one line, then only what did not pass, or why nothing was run."""
        run = [check for check in self.checks if check.status != "not run"]
        passed = sum(check.status == "passed" for check in run)
        grave = sorted(run, key=lambda check: STATUSES.index(check.status), reverse=True)
        lines = [f"{self.word}: {passed} of {len(run)} checks passed" if run else self.word]
        lines += [f"  {check}" for check in grave if check.status != "passed"]
        return "\n".join(lines + [f"  not run: {why}" for why in reasons(self.as_dict())])

    def as_dict(self) -> dict[str, Any]:
        """Returns the part of ``results.json`` that belongs beside the figure."""
        return {
            "verdict": self.word,
            "images": int(self.images),
            "gradient_evaluations_per_image": round(float(self.gradient_evaluations), 3),
            "accuracies": {name: float(share) for name, share in self.accuracies.items()},
            "checks": [check.as_dict() for check in self.checks],
        }


def reasons(verdict: Mapping[str, Any]) -> list[str]:
    """Returns why a figure was not examined, from `Verdict.as_dict`; of others nothing.

    Example:
      >>> reasons(Verdict(not_run("model", "All images are of one class.")).as_dict())
      ['All images are of one class.']
    """
    if verdict["verdict"] != NOT_EXAMINED:
        return []
    essential = [check for check in verdict["checks"] if check["name"] in ESSENTIAL]
    lacking = [check["meaning"] for check in essential if check["status"] == "not run"]
    return list(dict.fromkeys(filter(None, lacking)))  # each once: a reason is that of a group


def not_run(names: str | Iterable[str], reason: str) -> tuple[Check, ...]:
    """Returns checks that were not run, each with the reason.

    Args:
      names: A check, a group of the table, or several of both.
      reason: Why they were not.

    Example:
      >>> [check.name for check in not_run("path", "the logits are not finite")]
      ['steps_raise_loss', 'converged', 'no_silent_hits']
    """
    return tuple(Check(name=name, status="not run", meaning=reason) for name in names_of(names))


def status_at_most(value: float, limit: float, note: float | None = None) -> str:
    """Returns ``"passed"`` up to `limit`, ``"note"`` up to `note`, else (or if NaN) ``"failed"``.

    Example:
      >>> status_at_most(0.2, 0.1, note=0.3), status_at_most(float("nan"), 0.1)
      ('note', 'failed')
    """
    # Compared this way round, since NaN is at most nothing and so fails.
    if value <= limit:
        return "passed"
    return "note" if note is not None and value <= note else "failed"


def at_most(
    name: str, value: float, limit: float, note: float | None = None, *, meaning: str, advice: str
) -> Check:
    """Returns the outcome of a check that passes up to a limit and is a note up to `note`."""
    status = status_at_most(value, limit, note)
    return Check(name, status, value, limit, meaning, advice)


def status_of_difference(value: float, half_width: float, limit: float) -> str:
    """Returns ``"failed"`` where a difference is over its limit and no accident.

    Over the limit by accident, that is within the half-width of zero, is a ``"note"``: one image
    of a hundred proves nothing, and the limits were drawn on 497 images.

    Example:
      >>> [status_of_difference(v, 0.02, limit=0.002) for v in (0.001, 0.01, 0.03)]
      ['passed', 'note', 'failed']
    """
    # A share such as 3/100 less 2/100 is over 0.01 by its last digit.
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

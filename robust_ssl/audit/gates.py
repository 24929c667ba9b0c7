"""Gates: what was measured held to the limits of a policy, always by the interval's unsafe end.

A gate is passed, failed, waived or not decidable.  It is not decidable where what it needs was not
measured, and where it rests on an evaluation that is not trusted: a figure nobody can believe must
not open a gate.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from robust_ssl import settings
from robust_ssl.audit import policy
from robust_ssl.audit.answers import Answers, Limit, Waiver
from robust_ssl.audit.policy import Gate

PASSED, FAILED, NOT_DECIDABLE, WAIVED = "passed", "failed", "not decidable", "waived"
EXIT_CODES = {PASSED: 0, FAILED: 1, NOT_DECIDABLE: 3}
# What does not say how a classifier stands an attack.  All else does, and needs to be trusted: a
# section that is added later is not believed by mistake.
_NEED_NO_TRUST = ("encoder", "data", "clean", "cost", "models", "provenance", "inspection")


class MissingFigureError(settings.SettingsError):
    """A pointer leads to nothing that any audit measures."""


def resolve(document: Any, pointer: str, where: str) -> Any:
    """Returns what a JSON pointer (RFC 6901) leads to; None where that was not measured.

    A section that was not measured is null, and so is all within.

    Args:
      document: The whole ``audit.json``.
      pointer: For example ``"/measured/clean/secured"``.
      where: Who asks, for errors.

    Raises:
      MissingFigureError: If there is no such figure, with near names.

    Example:
      >>> resolve({"measured": {"screening": None}}, "/measured/screening/auc", "gate x")
      >>> resolve({"measured": {"clean": 0.9}}, "/measured/claen", "gate x")
      Traceback (most recent call last):
      ...
      robust_ssl.audit.gates.MissingFigureError: gate x: there is no figure /measured/claen; ...
    """
    value, walked = document, ""
    for part in pointer.split("/")[1:]:
        if value is None:
            return None
        name = part.replace("~1", "/").replace("~0", "~")
        walked += f"/{part}"
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif isinstance(value, Sequence) and not isinstance(value, str) and _has(value, name):
            value = value[int(name)]
        else:
            raise MissingFigureError(
                f"{where}: there is no figure {walked}{settings.near(name, _names(value))}"
            )
    return value


def _has(items: Sequence[Any], name: str) -> bool:
    return name.isascii() and name.isdigit() and int(name) < len(items)


def _names(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return list(value)
    return [str(n) for n in range(len(value))] if isinstance(value, list) else []


def safe_end(figure: Any, comparison: str) -> Any:
    """Returns the end of a figure's interval that a limit is held against.

    ``at_least`` takes the low end, ``at_most`` the high one: the limit must hold even there.

    Example:
      >>> safe_end({"value": 0.9, "low": 0.85, "high": 0.93}, "at_least")
      0.85
    """
    if isinstance(figure, Mapping) and "value" in figure:
        return figure.get({"at_least": "low", "at_most": "high"}.get(comparison, "value"))
    return figure


def holds(figure: Any, comparison: str, limit: float | str, where: str) -> bool | None:
    """Whether a figure keeps a limit; None where it was not measured.

    Raises:
      MissingFigureError: If what is there cannot be compared with the limit.

    Example:
      >>> holds(0.9, "at_least", 0.8, "gate x"), holds("fail", "is", "pass", "gate x")
      (True, False)
    """
    value = safe_end(figure, comparison)
    if value is None or value == "absent":
        return None
    if isinstance(value, Mapping | list):
        raise MissingFigureError(
            f"{where}: there is no single figure there{settings.near('', _names(value))}"
        )
    if comparison == "is":
        return _same(value, limit)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MissingFigureError(
            f"{where}: {comparison} is for numbers, and its figure is {str(value)[:60]!r}"
        )
    # 0.9 - 0.88 is a little more than 0.02.
    return value >= limit - 1e-9 if comparison == "at_least" else value <= limit + 1e-9


def _same(value: Any, limit: float | str) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value).lower() == str(limit).lower()
    try:
        return value == float(limit)
    except ValueError:
        return False


def untrusted(document: Mapping[str, Any], pointer: str) -> list[str]:
    """Returns the roles whose evaluation a figure rests on and that is not trusted.

    Example:
      >>> trust = {"usual": {"trusted": True}, "secured": {"trusted": False}}
      >>> document = {"measured": {"trust": trust}}
      >>> untrusted(document, "/measured/attacked/secured/accuracy")
      ['secured']
      >>> untrusted(document, "/measured/attacked/usual/accuracy")
      []
      >>> untrusted(document, "/decided/risk/net/p10")
      ['secured']
    """
    parts = [*pointer.split("/")[1:], "", "", ""]
    if parts[0] == "measured" and parts[1] in _NEED_NO_TRUST:
        return []
    roles = document["measured"]["trust"]
    named = [parts[2]] if parts[1] == "attacked" and parts[2] in roles else list(roles)
    return [role for role in named if roles[role] and not roles[role]["trusted"]]


def judge(
    gate: Gate,
    document: Mapping[str, Any],
    stage: str,
    answers: Answers,
    today: datetime.date,
) -> dict[str, Any]:
    """Holds what was measured to one gate.

    Returns:
      The gate's entry of ``audit.json``: outcome, figure, limit, why it is not decidable.
    """
    own: Limit | None = answers.limits.get(gate.id)
    limit = own.value if own else gate.limit_at(stage)
    figure = _figure(document, gate)
    doubted = untrusted(document, gate.measure)
    held = holds(figure, gate.comparison, limit, gate.where)
    why = "untrusted" if doubted else "not measured" if held is None else ""
    outcome = NOT_DECIDABLE if why else PASSED if held else FAILED
    waiver = _waiver(gate, answers.waivers, outcome, bool(doubted), today)
    return {
        "id": gate.id,
        "outcome": WAIVED if waiver else outcome,
        "without_waiver": outcome,
        "why": why,
        "untrusted": doubted,
        "measure": gate.measure,
        "unit": gate.unit,
        "comparison": gate.comparison,
        "limit": limit,
        "policy_limit": _loosened(gate, limit, stage),
        "figure": _shown(figure),
        "compared": safe_end(figure, gate.comparison),
        "own_reason": own.reason if own else None,
        "title": dict(gate.title),
        "reason": dict(gate.reason),
        "waiver": waiver.as_json() if waiver else None,
    }


def _figure(document: Mapping[str, Any], gate: Gate) -> Any:
    try:
        return resolve(document, gate.measure, gate.where)
    except MissingFigureError as error:
        # The policy is right: what it asks for was not yet measured then.
        if gate.measure not in {each.measure for each in policy.shipped()}:
            raise
        raise MissingFigureError(
            f"this audit has no figure {gate.measure}, which the gate {gate.id} asks for: it was "
            "measured by an earlier version; run `robust-ssl audit run` again, which measures "
            "what is missing: finished stages are kept"
        ) from error


def _loosened(gate: Gate, limit: float | str, stage: str) -> float | str | None:
    """Returns the policy's limit where the company's own lets more pass; else None."""
    policys = gate.limits.get(stage)
    if policys is None or gate.comparison == "is":
        return None
    return policys if _is_looser(limit, policys, gate.comparison) else None


def _is_looser(limit: Any, than: Any, comparison: str) -> bool:
    if comparison == "is":
        return limit != than
    return limit < than if comparison == "at_least" else limit > than


def beyond(
    judged: Sequence[Mapping[str, Any]], shipped: Iterable[Gate], stage: str
) -> list[dict[str, Any]]:
    """Returns the shipped gates of a stage that a policy leaves out or holds to a looser limit.

    A gate is the same where it compares the same figure in the same way: an id can be anything.

    Args:
      judged: The gates of the policy that decided, as `judge` returns them.
      shipped: Those of the shipped one.
      stage: Which is decided on.
    """
    entries = []
    for gate in shipped:
        if stage not in gate.limits:
            continue
        limit, kind = gate.limit_at(stage), (gate.measure, gate.comparison)
        own = [_policy_limit(g) for g in judged if (g["measure"], g["comparison"]) == kind]
        if not all(_is_looser(one, limit, gate.comparison) for one in own):
            continue
        strictest = max if gate.comparison == "at_least" else min
        entries.append(
            {
                "id": gate.id,
                "measure": gate.measure,
                "unit": gate.unit,
                "comparison": gate.comparison,
                "limit": limit,
                "own_limit": strictest(own, default=None),
                "title": dict(gate.title),
            }
        )
    return entries


def _policy_limit(judged: Mapping[str, Any]) -> float | str:
    """Returns a gate's limit; where the answers have a looser one, which is named, the policy's."""
    return judged["limit"] if judged["policy_limit"] is None else judged["policy_limit"]


def _shown(figure: Any) -> Any:
    """Keeps of a figure its value and interval; a text or a number is kept as it is."""
    if isinstance(figure, Mapping):
        return {name: figure.get(name) for name in ("value", "low", "high")}
    return figure


def _waiver(
    gate: Gate, waivers: Sequence[Waiver], outcome: str, doubted: bool, today: datetime.date
) -> Waiver | None:
    # Nobody can answer for a figure that means nothing.
    if outcome == PASSED or doubted:
        return None
    return next((w for w in waivers if w.gate == gate.id and w.counts(today)), None)


def overall(gates: Sequence[Mapping[str, Any]]) -> str:
    """Returns the outcome of all gates: one that fails decides, then one that is not decidable.

    Without a gate nothing is decided.

    Example:
      >>> overall([{"outcome": "passed"}, {"outcome": "waived"}])
      'passed'
      >>> overall([{"outcome": "not decidable"}, {"outcome": "failed"}])
      'failed'
    """
    outcomes = {gate["outcome"] for gate in gates}
    for outcome in (FAILED, NOT_DECIDABLE):
        if outcome in outcomes:
            return outcome
    return PASSED if outcomes else NOT_DECIDABLE

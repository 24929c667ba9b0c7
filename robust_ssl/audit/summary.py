"""What an audit says on a terminal: the outcome, what is in its way, and where the pages are."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from robust_ssl.audit import decision, document, gates


def lines(workdir: str | os.PathLike) -> list[str]:
    """Returns the decision in a working directory, a line for the outcome and one a gate that is
    not passed.
    """
    folder = pathlib.Path(workdir)
    whole = document.read(folder / document.NAME)
    decided = whole["decided"]
    counts = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in decided["counts"].items())
    shown = [f"{decided['stage']}: {decided['outcome'].upper()} ({counts})"]
    shown += [_gate(gate) for gate in decided["gates"] if gate["outcome"] != gates.PASSED]
    for gate in decided["gates"]:
        if (policys := gate.get("policy_limit")) is not None:
            own = _limit(gate["limit"])
            shown.append(f"  own limit: {gate['id']} {own}, in the policy {_limit(policys)}")
    shown += _policy(decided["policy"])
    if decided["risk"] is None:
        missing = ", ".join(decided["answers"]["missing"])
        why = [f"answers.yaml lacks {missing}"] if missing else []
        if not decision.is_secured_measured(whole["measured"]):
            why.append("the secured classifier was not measured")
        shown.append(f"  money: not computed; {'; '.join(why)}")
    return [*shown, f"pages: {folder / 'audit.html'}, {folder / 'audit.ja.html'}"]


def _policy(policy: Mapping[str, Any]) -> list[str]:
    """Returns what has to be known of a policy that is not the shipped one."""
    if policy["origin"] == "shipped":
        return []
    shown = [f"  own policy: {policy['file']}, SHA-256 {policy['sha256'][:12]}"]
    for gate in policy["shipped_beyond"]:
        limit = f"{gate['comparison']} {_limit(gate['limit'])}"
        own = gate["own_limit"]
        word = "left out" if own is None else f"looser, {_limit(own)}"
        shown.append(f"  {word}: {gate['id']}, in the shipped policy {limit}")
    return shown


def _gate(gate: Mapping[str, Any]) -> str:
    reason = f" ({gate['why']}{': ' if gate['untrusted'] else ''}{', '.join(gate['untrusted'])})"
    against = f": {_number(gate['compared'])} against {_limit(gate['limit'])}"
    why = reason if gate["why"] else against
    until = f", until {gate['waiver']['until']}" if gate["waiver"] else ""
    return f"  {gate['outcome']}: {gate['id']}{why}{until}"


def _limit(value: Any) -> str:
    return f"{value:.10g}" if isinstance(value, int | float) else str(value)


def _number(value: Any) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:.4g}" if is_number else str(value)

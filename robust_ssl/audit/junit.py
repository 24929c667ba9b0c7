"""The gates as JUnit XML, which build servers show: one that is not decidable is an error there."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from typing import Any

from robust_ssl import words
from robust_ssl.audit import gates


def xml(decided: Mapping[str, Any]) -> str:
    """Returns the gates of a decision as a test suite.

    Example:
      >>> xml({"stage": "pilot", "gates": []}).splitlines()[1].split(" tests=")[1]
      '"0" failures="0" errors="0" />'
    """
    outcomes = [gate["outcome"] for gate in decided["gates"]]
    suite = ElementTree.Element(
        "testsuite",
        name=f"robust-ssl audit, {decided['stage']}",
        tests=str(len(outcomes)),
        failures=str(outcomes.count(gates.FAILED)),
        errors=str(outcomes.count(gates.NOT_DECIDABLE)),
    )
    for gate in decided["gates"]:
        case = ElementTree.SubElement(suite, "testcase", classname="audit", name=gate["id"])
        _outcome(case, gate)
    ElementTree.indent(suite)
    return (
        "<?xml version='1.0' encoding='utf-8'?>\n" + ElementTree.tostring(suite, "unicode") + "\n"
    )


def _outcome(case: ElementTree.Element, gate: Mapping[str, Any]) -> None:
    title = gate["title"]["en"]
    # Controls, which XML cannot hold, may stand in a reason that somebody typed.
    held = words.line(f"{gate['compared']} against {gate['comparison']} {gate['limit']}")
    if gate["outcome"] == gates.FAILED:
        ElementTree.SubElement(case, "failure", message=words.line(title)).text = held
    elif gate["outcome"] == gates.NOT_DECIDABLE:
        ElementTree.SubElement(case, "error", message=f"not decidable: {gate['why']}").text = held
    elif gate["waiver"]:
        waiver = gate["waiver"]
        said = f"waived by {waiver['name']} until {waiver['until']}: {waiver['reason']}; {held}"
        ElementTree.SubElement(case, "system-out").text = words.line(said)

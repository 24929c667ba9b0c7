"""The gates as JUnit XML, which build servers show: one that is not decidable is an error there.

A shipped gate that a company's own policy leaves out or loosens is a test that was skipped.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from typing import Any

from robust_ssl import words
from robust_ssl.audit import gates


def xml(decided: Mapping[str, Any]) -> str:
    """Returns the gates of a decision as a test suite.

    Example:
      >>> policy = {"origin": "shipped", "shipped_beyond": []}
      >>> suite = xml({"stage": "pilot", "gates": [], "policy": policy}).splitlines()[1]
      >>> suite.split(" tests=")[1]
      '"0" failures="0" errors="0" skipped="0" />'
    """
    policy = decided["policy"]
    outcomes = [gate["outcome"] for gate in decided["gates"]]
    suite = ElementTree.Element(
        "testsuite",
        name=f"robust-ssl audit, {decided['stage']}",
        tests=str(len(outcomes) + len(policy["shipped_beyond"])),
        failures=str(outcomes.count(gates.FAILED)),
        errors=str(outcomes.count(gates.NOT_DECIDABLE)),
        skipped=str(len(policy["shipped_beyond"])),
    )
    if policy["origin"] == "own":
        properties = ElementTree.SubElement(suite, "properties")
        for name, key in (("own policy", "file"), ("SHA-256 of the policy", "sha256")):
            ElementTree.SubElement(properties, "property", name=name, value=words.line(policy[key]))
    for gate in decided["gates"]:
        case = ElementTree.SubElement(suite, "testcase", classname="audit", name=gate["id"])
        _outcome(case, gate)
    for gate in policy["shipped_beyond"]:
        case = ElementTree.SubElement(
            suite, "testcase", classname="audit.shipped_policy", name=gate["id"]
        )
        own = gate["own_limit"]
        word = "left out" if own is None else f"looser, {own}"
        said = f"{word}; in the shipped policy {gate['comparison']} {gate['limit']}"
        ElementTree.SubElement(case, "skipped", message=words.line(said))
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

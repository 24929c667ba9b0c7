"""``audit.json``: what was measured, sealed, and what was decided on it.

The seal is a checksum of what was measured: a verdict or a share that somebody edits is noticed.
Whatever is decided is made again from what was measured, so it has none.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from robust_ssl import disk, schemas, settings

SCHEMA = 1
NAME = "audit.json"
_WAY_OUT = (
    "bring it back from a copy, or run `robust-ssl audit run` again, which writes it anew: "
    "finished stages are kept"
)


class AuditFileError(settings.SettingsError):
    """An ``audit.json``, or what it rests on, is not what was written."""


def digest(value: Any) -> str:
    """Returns the SHA-256 of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def sealed(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a document of what was measured, before anything is decided on it.

    Raises:
      AuditFileError: If it does not keep ``audit.schema.json``, naming the field.
    """
    document = {"schema": SCHEMA, "measured": dict(measured), "decided": None}
    _refuse_nan(document)
    document["seal"] = digest(document["measured"])
    check(document)
    return document


def check(document: Any, file: str = NAME) -> None:
    """Raises unless a document keeps its contract and its seal.

    Raises:
      AuditFileError: Naming the offending field, such as ``measured.clean.usual.value``.
    """
    _check_version(document, file)
    _check_content(document, file)
    _check_seal(document, file)


def _check_version(document: Any, file: str) -> None:
    version = document.get("schema") if isinstance(document, Mapping) else None
    if isinstance(version, int) and version != SCHEMA:
        raise AuditFileError(
            f"{file}, schema: {version}; this version of the package reads {SCHEMA}. "
            + ("Take a newer package" if version > SCHEMA else "Run the audit again")
        )


def _check_content(document: Any, file: str) -> None:
    _refuse_nan(document, file)
    error = schemas.problem("audit", document)
    if error is not None:
        raise AuditFileError(f"{file}, {schemas.dotted(error)}: {error.message[:300]}")
    _check_intervals(document["measured"], "measured", file)
    for role, verdict in document["measured"]["trust"].items():
        if verdict is not None:
            _check_verdict(verdict, f"{file}, measured.trust.{role}")


def _check_seal(document: Mapping[str, Any], file: str) -> None:
    if document["seal"] != digest(document["measured"]):
        raise AuditFileError(
            f"{file} is not what was written there: what was measured does not agree with its "
            f"seal; {_WAY_OUT}"
        )


def _check_verdict(verdict: Mapping[str, Any], where: str) -> None:
    """Raises where the words of a verdict contradict each other, whoever computed the seal."""
    failed = [check["name"] for check in verdict["checks"] if check["status"] == "failed"]
    if failed and verdict["trusted"]:
        raise AuditFileError(f"{where}: trusted, but the check {failed[0]} failed")
    if verdict["trusted"] != verdict["verdict"].startswith("believable"):
        raise AuditFileError(f"{where}: {verdict['verdict']!r} and trusted do not agree")


def _check_intervals(value: Any, where: str, file: str) -> None:
    """Raises where an interval does not hold its share: gates go by its ends."""
    if isinstance(value, Mapping) and {"value", "low", "high"} <= value.keys():
        if not value["low"] - 1e-9 <= value["value"] <= value["high"] + 1e-9:
            raise AuditFileError(
                f"{file}, {where}: [{value['low']}, {value['high']}] does not hold {value['value']}"
            )
    elif isinstance(value, Mapping | list):
        inner = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, entry in inner:
            _check_intervals(entry, f"{where}.{name}", file)


def read(path: str | os.PathLike) -> dict[str, Any]:
    """Reads an ``audit.json``.

    Raises:
      AuditFileError: If it breaks its contract or its seal, naming the field.
      OSError: If it cannot be read.
    """
    file = os.fspath(path)
    try:
        document = disk.read_json(path)
        _check_version(document, file)
    except AuditFileError:
        raise
    except ValueError as error:
        raise AuditFileError(f"{error}; {_WAY_OUT}") from error
    try:
        _check_content(document, file)
    except AuditFileError as error:
        raise AuditFileError(f"{error}; {_WAY_OUT}") from error
    _check_seal(document, file)
    return document


def read_workdir(workdir: str | os.PathLike) -> dict[str, Any]:
    """Reads the audit of a working directory and compares it with the results beside it.

    Raises:
      AuditFileError: If there is none, or if ``results.json`` has been edited since.
    """
    folder = disk.expanded(workdir)
    if not (folder / NAME).is_file():
        raise AuditFileError(
            f"there is no {NAME} in {folder}; first: robust-ssl audit run --workdir={folder}"
        )
    document = read(folder / NAME)
    _check_results(folder, document["measured"]["made"]["results_sha256"])
    _check_manifest(folder, document["measured"])
    return document


def _check_results(folder: pathlib.Path, expected: str | None) -> None:
    file = folder / "results.json"
    if expected is None or not file.is_file():
        return  # an audit may be carried elsewhere without its evidence
    if hashlib.sha256(disk.read_bytes(file)).hexdigest() != expected:
        raise AuditFileError(
            f"{file} is not what this audit was made from; somebody has edited it. Run "
            "`robust-ssl audit run` again: it is written anew from the stages, which are kept"
        )


def _check_manifest(folder: pathlib.Path, measured: Mapping[str, Any]) -> None:
    """Compares with what the stage left, where that is there: a seal can be computed by anybody."""
    file = folder / "audit" / "manifest.json"
    if not file.is_file():
        return
    try:
        results = disk.read_json(file)["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AuditFileError(f"{file} cannot be read: {error}") from error
    if results != measured:
        raise AuditFileError(
            f"{folder / NAME} is not what the stage `audit` measured; run `robust-ssl audit run` "
            "again: finished stages are kept"
        )


def write(path: str | os.PathLike, document: Mapping[str, Any]) -> None:
    """Writes a document; the file is there whole or not at all."""
    check(document)
    # In ASCII: the name of a folder need not be UTF-8, and JSON has an escape for it.
    text = json.dumps(document, indent=1, allow_nan=False)
    disk.replace(path, text + "\n")


def _refuse_nan(document: Any, file: str = NAME) -> None:
    found = schemas.not_finite(document)
    if found is not None:
        raise AuditFileError(f"{file}, {found[0]}: {found[1]} is not a finite number")

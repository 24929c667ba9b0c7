"""Checks 1, 8 and 10: the revision, license and model card, and what is known of the training."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from robust_ssl import disk
from robust_ssl.provenance.check import Check, absent, failed, passed
from robust_ssl.provenance.source import Source
from robust_ssl.weights import cards, native

_OWN_LICENSE = "Apache-2.0"  # of the package, and so of what it ships
_MOST = 2**20  # bytes of a page that is read for what it says
# How the usual licenses begin, and what they are called at spdx.org.
_LICENSES = (
    (r"Apache License\s+Version 2\.0", "Apache-2.0"),
    (
        r"MIT License|granted, free of charge, to any\s+person\s+obtaining",
        "MIT",
    ),
    (r"BSD 3-Clause|Neither the name", "BSD-3-Clause"),
    (r"Attribution-NonCommercial\s+4\.0", "CC-BY-NC-4.0"),
    (r"Attribution-NonCommercial-ShareAlike\s+4\.0", "CC-BY-NC-SA-4.0"),
    (r"Attribution-NonCommercial-NoDerivatives\s+4\.0", "CC-BY-NC-ND-4.0"),
    (r"GNU GENERAL PUBLIC LICENSE", "GPL"),
)


def check_revision(source: Source, lock: Mapping[str, Any] | None) -> Check:
    """Check 1: what is named cannot become something else: a commit and not a branch."""
    revision = source.revision or origin(source)
    then = lock["source"]["revision"] if lock else ""
    evidence = {"revision": revision, "source": str(source.address or source.given)}
    if source.moved:
        said = f"{source.given} follows {source.moved!r}, which moves; today it is {revision}"
        return failed("revision", said, **evidence)
    if then and revision and revision != then and source.kind != "shipped":
        return failed("revision", f"it is {revision}, the lock has {then}", **evidence)
    if not revision:
        return absent("revision", "a local file; nobody has noted where it came from", **evidence)
    return passed("revision", f"pinned to {revision}", **evidence)


def origin(source: Source) -> str:
    """Returns the pinned address that an encoder was converted from, ``""`` if none is known."""
    imported = _card(source).get("imported_from")
    said = imported.get("source") if isinstance(imported, Mapping) else None
    return said if isinstance(said, str) and re.search("@[0-9a-f]{40}$", said) else ""


def _card(source: Source) -> Mapping[str, Any]:
    """Returns what the maker of an encoder tells of it; empty where it cannot be read."""
    try:
        record = cards.decode(disk.read_bytes(source.folder / native.CARD_FILE), source.folder)
    except (OSError, ValueError):
        return {}
    card = record.get("card") if isinstance(record, Mapping) else None
    return card if isinstance(card, Mapping) else {}


def documents(source: Source) -> dict[str, Any]:
    """Returns the license, and whether there is a model card."""
    page = _page(source, "README.md")
    said = _front_matter(page).get("license") or _card(source).get("license")
    if not isinstance(said, str):
        said = _license_of_files(source)
    if not said and source.kind == "shipped":
        said = _OWN_LICENSE
    return {"license": said or None, "model_card": bool(page.strip() or _card(source))}


def check_documents(source: Source, lock: Mapping[str, Any] | None) -> Check:
    """Check 8: the license and the model card are there, and are those of the lock."""
    now = documents(source)
    then = lock["documents"] if lock else now
    lost = [name.replace("_", " ") for name in now if then[name] and now[name] != then[name]]
    if lost:
        changes = ", ".join(f"{n}: {then[n]} -> {now[n]}" for n in now if now[n] != then[n])
        return failed("documents", f"other than in the lock: {changes}", **now)
    missing = [name.replace("_", " ") for name, value in now.items() if not value]
    if missing:
        return absent("documents", f"there is no {' and no '.join(missing)}", **now)
    return passed("documents", f"license {now['license']}, and a model card", **now)


def training(source: Source) -> dict[str, Any]:
    """Returns on what and when an encoder was trained, None where nobody says it."""
    card, matter = _card(source), _front_matter(_page(source, "README.md"))
    config = card.get("config")
    section = config.get("data") if isinstance(config, Mapping) else None
    named = [section, card.get("data")]
    data = None
    for entry in named:
        if isinstance(entry, Mapping):
            entry = entry.get("source") or entry.get("function") or entry.get("name")
        data = data or (entry if isinstance(entry, str) else None)
    data = data or matter.get("datasets")
    date = card.get("date") or matter.get("date")
    return {"data": data, "date": date if isinstance(date, str) else None}


def check_training(source: Source, lock: Mapping[str, Any] | None) -> Check:
    """Check 10: on what and when it was trained is known, and is what the lock says."""
    now = training(source)
    shown = f"data {now['data'] or 'unknown'}, date {now['date'] or 'unknown'}"
    if lock and any(lock["training"][name] not in (None, now[name]) for name in now):
        then = lock["training"]
        return failed("training", f"{shown}; the lock has {then['data']}, {then['date']}", **now)
    if None in now.values():
        return absent("training", shown, **now)
    return passed("training", shown, **now)


def _page(source: Source, name: str) -> str:
    file = source.files.get(name)
    try:
        return "" if file is None else disk.read_bytes(file, _MOST).decode("utf-8", "replace")
    except (OSError, ValueError):
        return ""


def _front_matter(page: str) -> dict[str, str]:
    """Returns the plain entries of a page's YAML head; of a list, its items with commas."""
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", page, re.DOTALL)
    entries: dict[str, str] = {}
    name = ""
    for line in match[1].splitlines() if match else ():
        entry = re.match(r"(\w+):\s*(.*?)\s*$", line)
        item = re.match(r"\s*-\s+(.*?)\s*$", line)
        if entry:
            name, text = entry[1], entry[2].strip("'\"")
            entries[name] = text
        elif item and name:
            entries[name] = ", ".join(filter(None, [entries[name], item[1].strip("'\"")]))
    return {name: text for name, text in entries.items() if text}


def _license_of_files(source: Source) -> str:
    for name in source.files:
        if pathlib.PurePosixPath(name).stem.upper() in ("LICENSE", "LICENCE"):
            text = _page(source, name)
            known = (spdx for words, spdx in _LICENSES if re.search(words, text))
            return next(known, "see " + name) if text.strip() else ""
    return ""

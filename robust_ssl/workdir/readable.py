"""What is written for readers: it is made again from results, and nobody's notes are lost."""

from __future__ import annotations

import json
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from robust_ssl import disk
from robust_ssl.workdir.manifest import changed_files, digest, sum_files, write_atomically
from robust_ssl.workdir.stage import StageDirectory

RECORD = ".pages.json"  # checksums of what was written for reading

_log = logging.getLogger(__name__)


def write_pages(stage: StageDirectory, texts: Mapping[pathlib.Path, str]) -> None:
    """Writes what a finished stage says to readers, unless it is there already.

    What somebody has edited since is kept under another name, with a word in the log.  Of several
    processes the first one writes.

    Args:
      stage: The stage; its directory keeps what was written.
      texts: What the files should hold.

    Raises:
      UnwritableError: If one of them cannot be written.
    """
    if jax.process_index():
        return
    record = stage.path / RECORD
    before = read_record(record)
    # Earlier they were among the stage's own files.
    sums = {**stage.manifest["files"], **before}
    for file, text in texts.items():
        if holds(file, text):
            continue
        name = pathlib.PurePath(os.path.relpath(file, stage.path)).as_posix()
        changed = _change(stage, name, sums)
        if changed:
            kept = disk.keep_edited(file)
            _log.warning("%s %s; it is written again%s", file, changed, kept and f"; {kept}")
        write_atomically(file, text)
    after = sum_files(stage.path, texts)
    if after != before:
        write_record(record, after)


def holds(file: pathlib.Path, text: str) -> bool:
    """Returns whether a file is there and has this text, no more and no less."""
    try:
        return file.read_bytes() == text.encode()
    except OSError:
        return False


def _change(stage: StageDirectory, name: str, sums: Mapping[str, Any]) -> str:
    """What somebody has done to a file since it was written; nothing if it is as it was."""
    if name in sums:
        return changed_files(stage.path, {name: sums[name]}).get(name, "")
    return "is of somebody else" if (stage.path / name).exists() else ""


def read_record(file: pathlib.Path) -> dict[str, Any]:
    """Returns the checksums that `write_record` wrote; none where it is lost or damaged."""
    try:
        record = disk.read_json(file)
        if digest(record["files"]) == record["sha256"]:
            return record["files"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {}


def write_record(file: pathlib.Path, sums: Mapping[str, Any]) -> None:
    """Writes what `sum_files` says of what was written for reading."""
    record = {"files": sums, "sha256": digest(sums)}
    write_atomically(file, json.dumps(record, indent=1) + "\n")

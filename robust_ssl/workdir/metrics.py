"""``metrics.jsonl``: one JSON object a line; damage costs its own line and nothing else."""

from __future__ import annotations

import json
import logging
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from robust_ssl import disk
from robust_ssl.workdir.manifest import unwritable

_log = logging.getLogger(__name__)


def append(file: pathlib.Path, line: str) -> None:
    """Adds a line.

    Raises:
      OSError: If it cannot be written, with the file's name.
    """
    try:
        with open(file, "a", encoding="utf-8") as stream:
            stream.write(line + "\n")
    except OSError as error:
        raise unwritable(file, error) from error


def read_metrics(file: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines that can be read; none where there is no file."""
    return [entry for _, entry in lines(file) if entry is not None]


def keep_before(file: pathlib.Path, step: int) -> None:
    """Drops the lines of `step` and later, and one cut short by a sudden end.

    A line before, that cannot be read, is dropped with a word in the log; the file as it was is
    kept beside.
    """
    if not file.exists():
        return
    damaged, last = 0, False
    try:
        with disk.replacing(file) as stream:  # line by line: a log may have millions
            for line, entry in lines(file):
                damaged += last  # the last line is what a sudden end cuts
                last = entry is None
                if entry is not None and entry["step"] < step:
                    stream.write(line.rstrip(b"\n") + b"\n")
            if damaged:
                kept = file.with_name(file.name + ".damaged")
                _log.warning(
                    "%s: %d lines cannot be read and are left out; the file as it was is %s",
                    *(file, damaged, kept.name),
                )
                shutil.copyfile(file, kept)
    except OSError as error:
        raise unwritable(file, error) from error


def lines(file: pathlib.Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yields each line, and what it says; None where it is damaged."""
    if not file.exists():
        return
    with open(file, "rb") as stream:
        for line in stream:
            yield line, _parse(line)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line.decode("utf-8"))
    except ValueError:  # bytes that are no UTF-8 too
        return None
    whole = isinstance(entry, dict) and type(entry.get("step")) is int  # true is none
    return entry if whole else None

"""`encoder.lock.json` on disk: sealed when it is written, and believed only if it is whole."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from robust_ssl import disk
from robust_ssl.weights import cards, hub

SCHEMA = 1


def write_lock(
    record: Mapping[str, Any], path: str | os.PathLike, *, replace: bool = False
) -> pathlib.Path:
    """Writes a lock with a checksum of itself; a source that is a path is named from the lock's.

    Args:
      record: What `locks.lock` returned.
      path: The file.
      replace: Whether a file that says something else may be replaced: a lock is evidence.

    Raises:
      FileExistsError: If there is another file and it may not be replaced.
      OSError: If it cannot be written.
    """
    file = pathlib.Path(path)
    source = dict(record["source"])
    if source["kind"] != "shipped" and not hub.is_address(source["given"]):
        # A lock beside its encoder stays right where both are moved together.
        place = disk.expanded(source["given"]).resolve()
        try:
            relative = os.path.relpath(place, file.resolve().parent)
        except ValueError:  # another drive
            relative = str(place)
        source["given"] = pathlib.PurePath(relative).as_posix()
    content = cards.encode({**record, "source": source})
    if file.exists() and not replace and disk.read_bytes(file) != content:
        raise FileExistsError(
            f"{file} is there and says something else; remove it, or write elsewhere"
        )
    cards.replace_file(file, content)
    return file


def read_lock(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a lock.

    Raises:
      ValueError: If it is no lock, of a newer version, or not what was written.
      FileNotFoundError: If it is not there.
    """
    if not pathlib.Path(path).exists():
        way_out = "make one: robust-ssl encoder lock SOURCE"
        raise FileNotFoundError(f"there is no lock {path}; {way_out}")
    record = cards.read_sealed(path, "encoder.lock", SCHEMA, "lock of an encoder")
    return {name: entry for name, entry in record.items() if name != "sha256"}

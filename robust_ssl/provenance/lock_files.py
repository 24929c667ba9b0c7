"""`encoder.lock.json` on disk: sealed when it is written, and believed only if it is whole."""

from __future__ import annotations

import functools
import importlib.resources
import json
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
        place = pathlib.Path(source["given"]).expanduser().resolve()
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
    import jsonschema

    record = cards.decode(disk.read_bytes(path, disk.MOST_JSON), path)
    schema = record.get("schema") if isinstance(record, Mapping) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise ValueError(
            f"{path} has schema {schema}, this version reads {SCHEMA}; take a newer robust-ssl"
        )
    problem = jsonschema.exceptions.best_match(_validator().iter_errors(record))
    if problem is not None:
        where = "/".join(map(str, problem.absolute_path)) or "the whole file"
        raise ValueError(f"{path} is no lock of an encoder: {where}: {problem.message[:200]}")
    cards.check_seal(record, path)
    return {name: entry for name, entry in record.items() if name != "sha256"}


@functools.cache
def _validator() -> Any:
    import jsonschema

    file = importlib.resources.files("robust_ssl.schemas") / "encoder.lock.schema.json"
    return jsonschema.Draft202012Validator(json.loads(file.read_text(encoding="utf-8")))

"""Where a set is made before it is renamed to its place; what killed processes left is removed.

A process that prepares locks a file in its folder, and the system frees the lock when the process
ends, however it does.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import platform
import shutil
import tempfile
from collections.abc import Iterator

from robust_ssl import disk

_PREFIX, _OWNER, _ASIDE = ".preparing-", "owner.json", "replaced"
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def scratch(directory: pathlib.Path, target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Makes a folder in a data directory, so that the last step is one renaming, and removes it.

    Args:
      directory: The data directory.
      target: The set's place in it.
    """
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=directory) as name:
        folder = pathlib.Path(name)
        owner = {"host": platform.node(), "target": target.relative_to(directory).as_posix()}
        # Under its name only once it is locked: nobody takes this process for one that is gone.
        early = folder / f"{_OWNER}.new"
        with early.open("w", encoding="utf-8") as file:
            file.write(json.dumps(owner))
            file.flush()
            if disk.lock(file.fileno()):
                early.rename(folder / _OWNER)
            yield folder


def put(made: pathlib.Path, target: pathlib.Path, folder: pathlib.Path) -> None:
    """Renames the new set to its place; what is there now goes only if that succeeds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    there, aside = target.exists(), folder / _ASIDE  # with --overwrite, or left by other means
    if there:
        os.replace(target, aside)
    try:
        os.replace(made, target)
    except BaseException:
        if there:
            os.replace(aside, target)
        raise


def remove_stale(directory: pathlib.Path) -> None:
    """Removes what processes of this machine that are gone were preparing.

    A set that one of them had put aside, and not yet replaced, gets its place back.
    """
    for folder in sorted(directory.glob(f"{_PREFIX}*")):
        try:
            with (folder / _OWNER).open("r+", encoding="utf-8") as file:
                if _is_here(owner := json.load(file)) and disk.lock(file.fileno()):
                    _remove(folder, directory / owner["target"])
        except FileNotFoundError:  # another process has just begun, or has removed it
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("%s is left of a preparation and cannot be removed: %s", folder, error)


def _is_here(owner: dict[str, str]) -> bool:
    return owner["host"] == platform.node()


def _remove(folder: pathlib.Path, target: pathlib.Path) -> None:
    if (folder / _ASIDE).exists() and not target.exists():
        os.replace(folder / _ASIDE, target)
    _log.warning("removing %s, which a process that is gone was preparing", folder)
    shutil.rmtree(folder)

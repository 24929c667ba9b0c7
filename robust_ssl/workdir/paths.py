"""Which paths can be a working directory, and a way around what libraries take for patterns."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import re
import tempfile
from collections.abc import Iterable

from robust_ssl import disk

# Orbax globs with the whole path in the pattern, and tensorstore takes a backslash for a slash.
_PATTERN = re.compile(r"[\[\]*?\\]")


class WorkdirError(ValueError):
    """The working directory cannot be made, written or understood."""


def workdir_path(workdir: str | os.PathLike) -> pathlib.Path:
    """Returns the whole path of a working directory, ``~`` at its beginning replaced.

    Whole, since a config or a function in it may change the process's directory: what is locked
    and what is written stay one place.  A link is followed now, once: whoever points it elsewhere
    later does not move a run.

    Raises:
      WorkdirError: If it is the address of a bucket or a site, empty, or no text, or if there is
        no directory that it begins in.

    Example:
      >>> workdir_path("gs://bucket/run")
      Traceback (most recent call last):
      ...
      robust_ssl.workdir.paths.WorkdirError: --workdir 'gs://bucket/run' is an address...
    """
    text = os.fspath(workdir)
    if not isinstance(text, str):
        text = os.fsdecode(text)
    if not text.strip():
        raise WorkdirError("--workdir is empty; name a directory (is a variable not set?)")
    if disk.is_address(text):
        raise WorkdirError(
            f"--workdir {text!r} is an address; only directories of a file system are written: "
            "mount the bucket, or take a local directory and copy it when the run is done"
        )
    if "\0" in text or not _is_text(text):
        raise WorkdirError(
            f"--workdir {text!r} is no UTF-8, which files inside it must name; take another name"
        )
    try:
        path = disk.expanded(text).absolute()
    except (RuntimeError, FileNotFoundError) as error:  # no home, or this directory was removed
        raise WorkdirError(f"--workdir {text!r}: {error}; write the whole path") from error
    return pathlib.Path(os.path.realpath(path)) if path.is_symlink() else path


def check_place(path: pathlib.Path) -> None:
    """Raises WorkdirError where no working directory can be, without making one.

    Raises:
      WorkdirError: If the path, or the nearest above it that is there, is no directory or may not
        be written.
    """
    try:
        place = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
        reason = "is a file" if not place.is_dir() else "may not be written"
        if place.is_dir() and os.access(place, os.W_OK):
            return
    except OSError as error:  # a folder that may not be looked into
        place, reason = path, error.strerror or str(error)
    raise WorkdirError(
        f"cannot write to {path}: {'it' if place == path.absolute() else place} {reason}; "
        "give --workdir a directory that you may write to"
    )


def check_files(workdir: pathlib.Path, names: Iterable[str]) -> None:
    """Raises WorkdirError where something is in the way of a file that a run ends with."""
    for name in names:
        folder = (workdir / name).parent
        if folder != workdir and folder.exists() and not folder.is_dir():
            raise WorkdirError(
                f"{folder} is a file, and a directory of this name is to be made; move it away, or "
                "take another --workdir"
            )
        if (workdir / name).is_dir():
            raise WorkdirError(
                f"{workdir / name} is a directory, and a file of this name is to be written; move "
                "it away, or take another --workdir"
            )


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def plain(path: pathlib.Path) -> pathlib.Path:
    """Returns a path without characters of patterns that leads to a directory which may have them.

    The directory need not be there; its parent must be.

    Args:
      path: For example ``runs/lr=[0.1]/stage/checkpoints/10``.

    Raises:
      WorkdirError: If there is no place for a link.
    """
    path = path.absolute()
    if not _PATTERN.search(str(path)):
        return path
    # The same name in every process: they write one checkpoint together.
    parent = str(path.parent)
    name = f"robust_ssl-{os.getuid()}-{hashlib.sha256(parent.encode()).hexdigest()[:16]}"
    for place in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"):
        link = pathlib.Path(place, name)
        if not _PATTERN.search(str(link)) and _links(link, parent):
            return link / path.name
    raise WorkdirError(
        f"{path} has one of the characters [ ] * ? \\ in it, and no temporary directory takes a "
        "link to it; take another --workdir"
    )


def _links(link: pathlib.Path, target: str) -> bool:
    try:
        link.symlink_to(target, target_is_directory=True)
        _remove_dangling(link.parent)
    except FileExistsError:
        pass
    except OSError:
        return False
    try:  # anybody can put something under this name
        return link.lstat().st_uid == os.getuid() and os.readlink(link) == target
    except OSError:
        return False


def _remove_dangling(place: pathlib.Path) -> None:
    """Removes links to directories that are gone: nobody works in those."""
    for link in place.glob(f"robust_ssl-{os.getuid()}-*"):
        with contextlib.suppress(OSError):  # another process may be doing the same
            if link.is_symlink() and not link.exists():
                link.unlink()

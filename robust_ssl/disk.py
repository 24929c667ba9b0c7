"""Files of strangers are read within bounds, and files are written without opening anybody's links.

What is read must be a regular file: a pipe or ``/dev/zero`` called ``model.safetensors`` would be
read for ever.  Its size, and what it unpacks to, are compared with what is allowed first.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import pathlib
import re
import secrets
import stat
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np

MOST_JSON = 2**26  # bytes; the longest results.json of a comparison has 2**22
MOST_RATIO, SMALL = 64, 2**26  # times its size that a file unpacks to, where that is not little
MOST_NESTED = 64  # lists in lists; Python's own readers end at about 1,000, in a RecursionError
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_TEXTS = (".md", ".csv")  # what people write into
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{16}\.tmp", re.DOTALL)  # as `replacing` names it
# What zipfile and NumPy raise for bytes that are no .npz.  A want of memory, or a library that
# cannot be imported, says nothing of the file.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError),
    *(EOFError, IndexError, KeyError, OSError, OverflowError, SyntaxError, TypeError),
    RuntimeError,  # of an "encrypted" or otherwise compressed member: a flipped bit in its header
)
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


# What is wrong with a place, and stays so; anything else is wrong with the disk.
_NO_PLACE = {
    *(errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
}


class PlaceError(OSError):
    """A file cannot be written where it should be; its message says what is in the way."""


class HomeError(RuntimeError):
    """A path begins with the home of nobody."""


def is_address(text: str) -> bool:
    """Whether a text names a bucket or a site, such as ``gs://bucket/run``, and no file."""
    return _ADDRESS.match(text) is not None


def expanded(path: str | os.PathLike) -> pathlib.Path:
    """Returns a path with the home directory in place of a ``~`` that it begins with.

    ``./~u`` is a folder here whose name begins so; it comes back whole, to stay that folder.

    Raises:
      HomeError: If there is no such home.

    Example:
      >>> expanded("runs/~u"), expanded("./~u") == pathlib.Path.cwd() / "~u"
      (PosixPath('runs/~u'), True)
    """
    place = pathlib.Path(path)
    if not str(place).startswith("~"):
        return place
    if not os.fspath(path).startswith("~"):
        return place.absolute()
    try:
        return place.expanduser()
    except RuntimeError as error:
        user = place.parts[0]
        raise HomeError(f"there is no home {user} (./{user} is a folder here)") from error


def rooted(typed: str) -> str:
    """Returns a typed path so that it stays the same place when the process changes directory.

    What is no path from here stays as it is: nothing, a home's ``~``, an address.

    Example:
      >>> rooted("~/runs"), rooted("gs://runs"), rooted("runs") == os.path.join(os.getcwd(), "runs")
      ('~/runs', 'gs://runs', True)
    """
    if not typed.strip() or typed.startswith(("~", "/")) or is_address(typed):
        return typed
    return os.path.join(os.getcwd(), typed)


@contextlib.contextmanager
def open_regular(path: str | os.PathLike, most: int | None = None) -> Iterator[BinaryIO]:
    """Opens a file for reading.

    Args:
      path: The file, or a link to it.
      most: Bytes that it may have; None for as many as this machine has memory.

    Raises:
      ValueError: If it is no regular file, or larger.
      OSError: If it cannot be opened.
    """
    # Opening a pipe would wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    number = os.open(path, flags)
    status = os.fstat(number)
    if not stat.S_ISREG(status.st_mode):
        os.close(number)  # `fdopen` would leave a directory's open
        kind = next((name for is_kind, name in _KINDS if is_kind(status.st_mode)), "no file")
        raise ValueError(f"{path} is {kind}; give a regular file")
    with os.fdopen(number, "rb") as file:
        limit, whose = (most, "are read") if most is not None else (memory(), "are in memory here")
        if status.st_size > limit:
            raise ValueError(f"{path} has {status.st_size:,} bytes; at most {limit:,} {whose}")
        yield file


def memory() -> int:
    """Returns the bytes of memory of this machine; what is larger cannot be read whole."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on every system
        return 2**40


def read_bytes(path: str | os.PathLike, most: int | None = None) -> bytes:
    """Returns the content of a file; raises as `open_regular`."""
    with open_regular(path, most) as file:
        # No further than its size: some files of /proc have no end.
        return file.read(os.fstat(file.fileno()).st_size)


def read_json(path: str | os.PathLike, most: int = MOST_JSON) -> Any:
    """Returns the value in a JSON file; raises as `open_regular` and `parse_json`."""
    return parse_json(read_bytes(path, most), path)


def parse_json(
    content: str | bytes, where: str | os.PathLike, most: int = MOST_JSON, *, finite: bool = False
) -> Any:
    """Returns a JSON value.

    Args:
      content: The text.
      where: What an error calls it.
      most: Bytes that it may have.
      finite: Whether NaN and infinity, which Python reads and JSON does not have, are refused.

    Raises:
      ValueError: If it is not JSON or not UTF-8, is longer than `most` bytes, or is nested deeper
        than `MOST_NESTED`.
    """
    if len(content) > most:
        raise ValueError(f"{where} has {len(content):,} bytes; at most {most:,} are read")
    try:
        value = json.loads(content, parse_constant=_no_number if finite else None)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    except RecursionError:
        value = None
    if (value is None and content.strip() not in ("null", b"null")) or _is_deep(value):
        raise ValueError(f"{where} is nested deeper than {MOST_NESTED} levels; no file of ours is")
    return value


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no number")


def _is_deep(value: Any) -> bool:
    # Level by level, not by recursion, which is what such a file aims at.
    level = [value]
    for _ in range(MOST_NESTED):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


def read_npz(file: BinaryIO, most: int) -> dict[str, np.ndarray]:
    """Reads the arrays of a ``.npz``, none of which may be pickled.

    Args:
      file: Open for reading.
      most: Bytes that all arrays together may have; a compressed file may be a thousand times
        smaller.

    Raises:
      ValueError: If it is no such file, is damaged, or an array is not as large as it says.
      MemoryError: If there is no room for it.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            total, size = sum(member.file_size for member in members), file.seek(0, os.SEEK_END)
            limit = min(most, max(SMALL, MOST_RATIO * size))
            if total > limit:
                raise ValueError(f"it unpacks to {total:,} bytes; at most {limit:,} are read")
            for member in members:
                _check_member(archive, member)
        file.seek(0)
        with np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except ValueError:
        raise
    except _DAMAGE as error:
        raise ValueError(f"it is damaged: {error or type(error).__name__}") from error


def _check_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Compares what an array says of itself with its bytes: NumPy asks for the memory first."""
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{member.filename} is in version {version} of NumPy's format")
        header = "read_array_header_1_0" if version == (1, 0) else "read_array_header_2_0"
        shape, _, dtype = getattr(np.lib.format, header)(stream)
        claimed = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or stream.tell() + claimed != member.file_size:
            raise ValueError(f"{member.filename} is not as large as it says; it is forged")


def check_place(path: str | os.PathLike) -> None:
    """Raises where something is in the way of a file, for who has long to work before writing it.

    Folders that are not there are in nobody's way.

    Raises:
      PlaceError: If the file is a directory, or a folder that it needs is a file.
    """
    path = pathlib.Path(path)
    if os.path.isdir(path):
        raise PlaceError(
            f"{path} is a directory, and a file of this name is to be written; move it away, or "
            "name a file in it"
        )
    above = next((each for each in path.parents if os.path.lexists(each)), None)
    if above is not None and not os.path.isdir(above):
        raise PlaceError(
            f"{above} is no directory, and {path.name} is to be written in one of this name; move "
            "it away, or name another place"
        )


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Opens a new file that takes the place of `path` when the block ends without an error.

    A reader finds the old file or the new one.  The name in between cannot be foreseen and is made
    anew, so that no link that somebody has left there is followed.

    Raises:
      PlaceError: If `path` is no place for a file, saying why and what to do.
      OSError: If the disk is full or fails.
    """
    path = pathlib.Path(path)
    check_place(path)
    name = os.fsencode(path.name)[:100].decode(errors="ignore")  # systems count bytes
    partial = path.with_name(f".{name}.{secrets.token_hex(8)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    flags |= getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(partial, flags, 0o666), "wb") as file:
            lock(file.fileno())  # so that nobody takes it for a leftover
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the new name with no content
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        # Nobody has typed the name in between.
        if isinstance(error, OSError) and error.filename in (partial, str(partial)):
            raise _refused(path, error) from error
        raise


def _refused(path: pathlib.Path, error: OSError) -> OSError:
    if error.errno == errno.ENOENT:
        return PlaceError(f"cannot write {path}: there is no folder {path.parent}; make it first")
    if error.errno in _NO_PLACE:
        return PlaceError(f"cannot write {path}: {error.strerror}; name another place")
    return type(error)(error.errno, error.strerror, str(path))  # a full or failing disk


def is_partial(path: str | os.PathLike) -> bool:
    """Whether a name is one that `replacing` makes and a killed process leaves.

    Example:
      >>> is_partial("zoo/.encoder.json.0123456789abcdef.tmp"), is_partial("zoo/mine.tmp")
      (True, False)
    """
    return _PARTIAL.fullmatch(pathlib.PurePath(path).name) is not None


def replace(path: str | os.PathLike, content: str | bytes) -> None:
    """Replaces a file as a whole, text as UTF-8; see `replacing`."""
    with replacing(path) as file:
        file.write(content if isinstance(content, bytes) else content.encode())


def keep_edited(file: pathlib.Path) -> str:
    """Renames a text that somebody has edited, before another takes its place.

    Returns:
      What became of it, for people; nothing where there is no text to be kept.
    """
    if file.suffix not in _TEXTS or not file.is_file() or not file.stat().st_size:
        return ""
    names = (f"{file.name}.changed{number or ''}" for number in itertools.count())
    free = next(file.with_name(n) for n in names if not file.with_name(n).exists())
    os.replace(file, free)
    return f"what was there is {free.name}"


def remove_leftovers(folders: Iterable[str | os.PathLike]) -> None:
    """Removes from folders what `replacing` has left where a process was killed.

    A file that a process is writing stays.  So does everything where the disk knows no locks.
    """
    for folder in folders:
        with contextlib.suppress(OSError):
            for name in filter(_PARTIAL.fullmatch, os.listdir(folder)):
                _remove_unless_written(os.path.join(folder, name))


def _remove_unless_written(partial: str) -> None:
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with contextlib.suppress(OSError):
        number = os.open(partial, flags)
        try:
            if lock(number):
                os.unlink(partial)
        finally:
            os.close(number)


def lock(number: int) -> bool:
    """Locks an open file until it is closed; False where another has it, or nobody can."""
    with contextlib.suppress(ImportError, OSError):  # not every system and disk has them
        import fcntl

        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False

"""One run at a time in a working directory: who holds it, and whether the holder is still there.

The lock is a small file with the holder's host, process and time of start.  On one machine the
process table says whether a holder lives.  Of another machine only the file can tell: the holder
touches it every few seconds.  Whoever finds it untouched for a minute takes it over.  Times are
compared for change and not for order, so clocks that disagree, or jump, do no harm.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import datetime
import json
import logging
import os
import pathlib
import platform
import secrets
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from robust_ssl import disk
from robust_ssl.parallel import exchange
from robust_ssl.workdir.paths import WorkdirError

FILE = ".lock"
TOUCH_EVERY = 5  # seconds
WATCH = 60  # seconds without a touch after which a holder elsewhere counts as gone
_SHARED_WITHIN = 50  # seconds within which a shared disk shows what the first process wrote

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Held:
    """A lock that this process has; `count` is how often it was asked for."""

    token: str
    process: int
    writes: bool  # whether it is the one of several processes whose lock it is
    count: int = 1


_held: dict[str, _Held] = {}


@contextlib.contextmanager
def hold(workdir: str | os.PathLike) -> Iterator[None]:
    """Keeps every other run out of a working directory until the block is left.

    A run that holds it already may hold it again.  Of several processes the first one holds it, and
    the others make sure that they see the same directory.

    Raises:
      WorkdirError: If another run holds it, or the processes do not share it.
    """
    workdir = os.path.realpath(workdir)  # the same place to the end, wherever the process goes
    acquire(workdir)
    try:
        yield
    finally:
        release(workdir)


def acquire(workdir: str | os.PathLike) -> None:
    """Begins what `release` ends; see `hold`.  The directory must be there."""
    path = os.path.realpath(workdir)
    held = _held.get(path)
    if held is not None and held.process == os.getpid():
        held.count += 1
        return
    token, refusal = secrets.token_hex(8), ""
    if jax.process_index() == 0:
        try:
            _take(pathlib.Path(path), token)
        except WorkdirError as error:
            refusal = str(error)
        except OSError as error:
            refusal = f"cannot lock {path}: {error.strerror or error}"
    token, refusal = json.loads(exchange(json.dumps([token, refusal]))[0])
    if not refusal and jax.process_count() > 1:
        blind = exchange("" if _shows(pathlib.Path(path), token) else "blind")
        refusal = _not_shared(path, [i for i, said in enumerate(blind) if said])
        if refusal and jax.process_index() == 0:
            _remove(pathlib.Path(path), token)
    if refusal:
        raise WorkdirError(refusal)
    _held[path] = _Held(token, os.getpid(), writes=jax.process_index() == 0)
    if jax.process_index() == 0:
        # No further down: whose workdir is "." may have a million pictures there.
        disk.remove_leftovers([path, *_folders(path)])
    _keep_touching()


def _folders(path: str) -> list[str]:
    """The folders directly in a working directory, links and hidden ones left out."""
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        folders = [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
        return [entry.path for entry in folders if not entry.name.startswith(".")]
    return []


def release(workdir: str | os.PathLike) -> None:
    """Lets others in, if nothing in this process holds the directory any more."""
    path = os.path.realpath(workdir)
    held = _held.get(path)
    if held is None:
        return
    held.count -= 1
    if held.count == 0:
        del _held[path]
        if held.process == os.getpid() and held.writes:
            _remove(pathlib.Path(path), held.token)


def check_held(workdir: str | os.PathLike) -> None:
    """Raises WorkdirError if another run took the directory over: this one must write no more."""
    path = os.path.realpath(workdir)
    held = _held.get(path)
    if held is None or not held.writes:
        return
    file = pathlib.Path(path) / FILE
    holder = _read(file)
    if holder is None:
        state = "is not there any more" if not file.exists() else "cannot be read"
        raise WorkdirError(
            f"{file} {state}: the directory was moved, removed or changed under a run, which "
            "stops. Bring it back, or give its new place, and run the same command again"
        )
    if holder["token"] != held.token:
        raise WorkdirError(
            f"{path} was taken over by {_words(holder)}: this process did not answer for {WATCH} "
            "s; it stops, so that two do not write into one directory"
        )


# --- The file -----------------------------------------------------------------------------------


def _take(path: pathlib.Path, token: str) -> None:
    file = path / FILE
    while True:
        with _alone(file):
            holder = _read(file)
            if holder is None or _is_gone(holder):
                return _write(file, token, holder)
            copied = _is_copy(holder, file)  # asked here, where the holder cannot remove the file
        # Nobody touches a copy; but on some disks a file has another number for each who looks.
        if _same_machine(holder) and not copied:
            raise WorkdirError(_refusal(path, holder))
        _log.warning(
            "%s is held by %s; watching for up to %d s whether it lives",
            *(path, _words(holder), WATCH),
        )
        if _is_touched(file, holder):
            raise WorkdirError(_refusal(path, holder))
        with _alone(file):
            if _read(file) == holder:
                return _write(file, token, holder)


def _write(file: pathlib.Path, token: str, before: dict[str, Any] | None) -> None:
    if before is not None:
        copied = _is_copy(before, file) and not _is_gone(before)
        why = "whose directory was copied here" if copied else "which is gone"
        _log.warning("took %s over: it was held by %s, %s", file.parent, _words(before), why)
    holder = {
        "host": platform.node(),
        "process": os.getpid(),
        "started": _start_of(os.getpid()),
        "machine": _machine(),
        "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "token": token,
        "file": file.stat().st_ino,
    }
    with open(file, "r+", encoding="utf-8") as stream:  # in place: others may wait for this file
        stream.truncate()
        stream.write(json.dumps(holder) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def _remove(path: pathlib.Path, token: str) -> None:
    file = path / FILE
    with contextlib.suppress(OSError):
        if not file.exists():
            return
        with _alone(file):
            holder = _read(file)
            if holder is None or holder.get("token") == token:
                file.unlink()


@contextlib.contextmanager
def _alone(file: pathlib.Path) -> Iterator[None]:
    """Lets one process at a time look at the file and change it."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            with contextlib.suppress(ImportError, OSError):  # not every disk has them
                import fcntl

                fcntl.flock(descriptor, fcntl.LOCK_EX)
            try:
                is_file = os.stat(file).st_ino == os.fstat(descriptor).st_ino
            except FileNotFoundError:
                is_file = False
            if is_file:  # else it was removed while this process waited for it
                yield
                return
        finally:
            os.close(descriptor)


def _read(file: pathlib.Path) -> dict[str, Any] | None:
    """Returns who holds the directory; None for nobody, or a file that is damaged."""
    try:
        holder = disk.read_json(file)
    except (OSError, ValueError):
        return None
    known = {"host", "process", "started", "machine", "since", "token"}
    return holder if isinstance(holder, dict) and known <= holder.keys() else None


# --- The holder ---------------------------------------------------------------------------------


def _is_copy(holder: dict[str, Any], file: pathlib.Path) -> bool:
    """Whether a lock seems to be copied with its directory: its file has another number."""
    return holder.get("file", file.stat().st_ino) != file.stat().st_ino


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether a process of this machine has ended; False where it cannot be known."""
    return _same_machine(holder) and _start_of(holder["process"]) != holder["started"]


def _same_machine(holder: dict[str, Any]) -> bool:
    return (holder["host"], holder["machine"]) == (platform.node(), _machine())


def _machine() -> str:
    """Tells apart machines, and containers on one, that are called the same."""
    parts = []
    with contextlib.suppress(OSError):
        parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))  # process numbers mean something within it
    return " ".join(parts)


def _start_of(process: int) -> str | None:
    """Returns when a process was started, in its machine's ticks; None if it has ended."""
    try:
        stat = pathlib.Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        if os.path.exists("/proc/self/stat"):
            return None
        return _alive_without_proc(process)
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # a program's name may have blanks
    return None if fields[0] in "ZX" else fields[19]  # of a zombie nothing but its number is left


def _alive_without_proc(process: int) -> str | None:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return ""
    return ""


def _is_touched(file: pathlib.Path, holder: dict[str, Any]) -> bool:
    """Whether the holder touches the file while it is watched."""
    before = _touched_at(file)
    end = time.monotonic() + WATCH
    while time.monotonic() < end:
        time.sleep(min(1, TOUCH_EVERY))
        if _touched_at(file) != before or _read(file) != holder:
            return file.exists()
    return False


def _touched_at(file: pathlib.Path) -> int | None:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return None


def _words(holder: dict[str, Any]) -> str:
    return f"process {holder['process']} on {holder['host']} since {holder['since']}"


def _refusal(path: pathlib.Path, holder: dict[str, Any]) -> str:
    return (
        f"{path} is in use by another run, {_words(holder)}; wait for it to end, or take another "
        "directory; nothing was changed"
    )


# --- Threads and processes ----------------------------------------------------------------------


_touching: threading.Thread | None = None


def _keep_touching() -> None:
    global _touching
    if jax.process_index() == 0 and (_touching is None or not _touching.is_alive()):
        _touching = threading.Thread(target=_touch, daemon=True, name="lock")
        _touching.start()


def _touch() -> None:
    while True:
        for path in list(_held):
            with contextlib.suppress(OSError):
                os.utime(os.path.join(path, FILE))
        time.sleep(TOUCH_EVERY)


@atexit.register
def _release_all() -> None:
    for path, held in list(_held.items()):
        if held.process == os.getpid() and held.writes:
            _remove(pathlib.Path(path), held.token)


def _shows(path: pathlib.Path, token: str) -> bool:
    """Whether this process sees what the first one wrote; a network disk may take its time."""
    end = time.monotonic() + _SHARED_WITHIN
    while True:
        holder = _read(path / FILE)
        if holder is not None and holder["token"] == token:
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.5)


def _not_shared(path: str, blind: list[int]) -> str:
    if not blind:
        return ""
    return (
        f"process {', '.join(map(str, blind))} does not see in {path} what process 0 wrote there "
        f"{_SHARED_WITHIN} s ago; give all processes the same --workdir, on a disk that they share"
    )

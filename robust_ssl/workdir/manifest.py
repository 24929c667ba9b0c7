"""The manifest of a stage: what was run, on what, with what outcome, as one JSON file."""

from __future__ import annotations

import datetime
import errno
import fnmatch
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import pathlib
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from robust_ssl import disk
from robust_ssl.workdir.paths import WorkdirError, workdir_path

SCHEMA = 2  # 1 is that of robust_ssl 0.1
PACKAGES = ("robust-ssl", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


# What is read from a manifest, and is not believed if it is not what was written.
_WORK = ("schema", "stage", "status", "config", "inputs", "seed", "seconds")
_WORK += ("fingerprint", "results", "files", "log", "stuck")
# What is only told of it: one may look at it, but nothing is made of it.
_RECORD = ("versions", "devices", "started", "finished", "before")

# Beside what a stage leaves: what it is resumed from, what it says of itself, what was not taken.
_NO_RESULTS = ("manifest.json", "metrics.jsonl", "checkpoints", "damaged-*", "other-*")
_NO_RESULTS += ("*.tmp", "*.partial", "*.damaged", "*.other", "*.changed", "*.changed[0-9]*")
# What others leave there and take away again: editors, file managers, network disks, Python.
_NO_RESULTS += (".*", "*~", "*.swp", "#*#", "Thumbs.db", "desktop.ini", "__pycache__")

_log = logging.getLogger(__name__)

_WILD = r"[*?\[]"  # what `fnmatch` takes for more than itself
_REASON = 300  # characters of another library's error
_SHOWN = 12  # directories named in one error
_WAY_OUT = "take another --workdir, or finish this one with robust_ssl 0.1; nothing was changed"


class ConfigChangedError(ValueError):
    """A stage directory holds the work of another configuration."""


class UnwritableError(OSError):
    """A file could not be written; the same command goes on once there is room."""


def make_directory(path: str | os.PathLike) -> pathlib.Path:
    """Makes a directory with its parents and makes sure that it can be written.

    Raises:
      WorkdirError: If that fails, with the reason.
    """
    path = workdir_path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Permission bits do not say it: the disk may be mounted read-only.
        probe = path / f".writable-{platform.node()}-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise WorkdirError(
            f"cannot write to {path}: {error.strerror or error}; "
            "give --workdir a directory that you may write to"
        ) from error
    return path


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
    """Returns the manifest of a stage directory.

    Raises:
      WorkdirError: If it is missing, is not JSON, is of another kind or version, or is not what
        was written.
    """
    file = pathlib.Path(path) / "manifest.json"
    try:
        manifest = disk.read_json(file)
    except (OSError, ValueError) as error:
        raise WorkdirError(f"{file} cannot be read ({error}); {_again(file)}") from error
    needed = {"schema", "stage", "status", "config", "inputs", "seed", "started", "seconds"}
    missing = needed - set(manifest) if isinstance(manifest, dict) else needed
    if missing:
        raise WorkdirError(
            f"{file} is no stage manifest: it lacks {', '.join(sorted(missing))}; {_again(file)}"
        )
    if manifest["schema"] != SCHEMA:
        raise WorkdirError(
            f"{file} has schema {manifest['schema']!r}, this version reads {SCHEMA}; {_WAY_OUT}"
        )
    _check_seal(file, manifest)
    return manifest


def _again(file: pathlib.Path) -> str:
    """The way out: parts say themselves what they were made from, so none of them is lost."""
    return (
        f"bring it back from a copy, or remove it: the same command then makes {file.parent.name} "
        "again from what is intact there"
    )


def seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a manifest with checksums of itself, by which `read_manifest` believes it."""
    return {**manifest, "sha256": _sums(manifest)}


def _sums(manifest: Mapping[str, Any]) -> dict[str, str]:
    parts = {"work": _WORK, "record": _RECORD}
    return {
        part: digest({name: manifest.get(name) for name in names}) for part, names in parts.items()
    }


def _check_seal(file: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    written = manifest.get("sha256")
    written, now = written if isinstance(written, Mapping) else {}, _sums(manifest)
    if written.get("work") != now["work"]:
        raise WorkdirError(
            f"{file} is not what was written there: its checksum does not agree; {_again(file)}"
        )
    if written.get("record") != now["record"]:
        _log.warning("%s: versions, devices or times are not those that were written", file)


def digest(value: Any) -> str:
    """Returns the SHA-256 of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check_layout(workdir: str | os.PathLike) -> None:
    """Refuses a working directory with stages that robust_ssl 0.1 wrote; touches nothing.

    Its stages have other names, so a run would begin again beside them and mix the two.

    Raises:
      WorkdirError: If there are such directories; it names them and the way out.
    """
    workdir = workdir_path(workdir)
    old = []
    for pattern in ("*/manifest.json", "methods/*/manifest.json", "encoders/*/*/manifest.json"):
        files = [file for file in workdir.glob(pattern) if _schema(file) == 1]
        old += [file.parent.relative_to(workdir).as_posix() for file in files]
    if old:
        names = ", ".join(sorted(old)[:_SHOWN])
        more = f" and {len(old) - _SHOWN} more" if len(old) > _SHOWN else ""
        raise WorkdirError(f"{workdir} holds work of robust_ssl 0.1: {names}{more}; {_WAY_OUT}")


def _schema(file: pathlib.Path) -> Any:
    """Returns the schema of a stage's manifest; None for any other file."""
    try:
        manifest = disk.read_json(file)
    except (OSError, ValueError):
        return None
    is_stage = isinstance(manifest, dict) and {"stage", "status"} <= manifest.keys()
    return manifest.get("schema") if is_stage else None


def json_ready(value: Any) -> Any:
    """Returns the value as JSON can say it: arrays as lists, NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {str(key): json_ready(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(entry) for entry in value]
    if isinstance(value, jax.Array | np.ndarray | np.generic):  # waits for the device
        return json_ready(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None  # Python writes NaN, which other readers of JSON refuse
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{value!r} of type {type(value).__name__} cannot be written as JSON")


def check_unchanged(
    path: pathlib.Path,
    old: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    collects: bool = False,
    places: Sequence[str] = (),
) -> None:
    """Compares the settings of a stage with those in its manifest.

    Args:
      path: The stage directory, for the message.
      old: The manifest there.
      settings: The entries that must agree with it: config, inputs, seed.
      collects: Whether inputs may come and go; those of the same name must agree.
      places: Mappings and lists of the config, by dotted name, whose entries may do so too.

    Raises:
      ConfigChangedError: If any value differs; each is named as ``config.epochs: 1 -> 2``.
    """
    before, after = {name: old[name] for name in settings}, dict(settings)
    may_come = [["inputs"]] if collects else []
    for place in [*may_come, *(["config", *place.split(".")] for place in places)]:
        before, after = _in_both(before, after, place)
    before, after = _dotted(before), _dotted(after)
    changes = [
        _change(name, before.get(name, "(absent)"), after.get(name, "(absent)"))
        for name in sorted(before | after)
        if before.get(name) != after.get(name)
    ]
    if changes:
        raise ConfigChangedError(
            f"{path} holds work made with other settings (old -> new):\n"
            + "\n".join(changes)
            + "\ntake another --workdir, or go back to the old value; nothing was changed"
        )


def _change(name: str, old: str, new: str) -> str:
    digests = [re.fullmatch(r'"([0-9a-f]{8})[0-9a-f]{56}"', text) for text in (old, new)]
    if name.startswith("inputs.") and all(digests):  # what it was says nobody
        old, new = (match[1] for match in digests)
        return f"  {name}: its content is another one ({old}... -> {new}...)"
    return f"  {name}: {old} -> {new}"


def _in_both(before: Any, after: Any, place: Sequence[str]) -> tuple[Any, Any]:
    """Returns two values without what only one of them has at a place."""
    if not place:
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            both = before.keys() & after.keys()
            return {name: before[name] for name in both}, {name: after[name] for name in both}
        if isinstance(before, list) and isinstance(after, list):
            return [x for x in before if x in after], [x for x in before if x in after]
        return before, after
    name = place[0]
    if not all(isinstance(value, Mapping) for value in (before, after)):
        return before, after
    if name not in before or name not in after:  # the place itself came or went
        return tuple({n: v for n, v in value.items() if n != name} for value in (before, after))
    old, new = _in_both(before[name], after[name], place[1:])
    return {**before, name: old}, {**after, name: new}


def _dotted(value: Any, prefix: str = "") -> dict[str, str]:
    """Returns the leaves of nested mappings as JSON text, by dotted name."""
    if not isinstance(value, Mapping) or (prefix and not value):
        return {prefix: json.dumps(value)}
    leaves: dict[str, str] = {}  # as text, since 1 == True == 1.0 in Python
    if any(re.search(_WILD, str(name)) for name in value):
        leaves[f"{prefix}, in this order"] = json.dumps(_order_of_patterns(value))
    for key, entry in value.items():
        leaves |= _dotted(entry, f"{prefix}.{key}" if prefix else key)
    return leaves


def _order_of_patterns(patterns: Iterable[str]) -> list[str]:
    """Returns patterns as far as their order means something: others are sorted.

    Of two that may fit the same path the later one counts.  Such a pair begins alike, up to the
    first wildcard of one of them.
    """
    rest, order = list(patterns), []

    def may_meet(one: str, other: str) -> bool:
        one, other = (re.split(_WILD, pattern, maxsplit=1)[0] for pattern in (one, other))
        return one.startswith(other) or other.startswith(one)

    while rest:
        free = [p for i, p in enumerate(rest) if not any(may_meet(p, q) for q in rest[:i])]
        order.append(min(free))
        rest.remove(order[-1])
    return order


def write_atomically(file: pathlib.Path, content: str | bytes) -> None:
    """Replaces a file as a whole: a reader, or a sudden end, finds the old one or the new.

    Raises:
      UnwritableError: If it cannot be written (a full disk), or is not what was written; it names
        the file.
    """
    content = content if isinstance(content, bytes) else content.encode()
    try:
        disk.replace(file, content)
        written = file.read_bytes()  # by its name, as whoever comes later does
    except OSError as error:
        raise unwritable(file, error) from error
    if written != content:
        raise UnwritableError(errno.EIO, f"{file} is not what was just written there")


def unwritable(file: pathlib.Path, error: Exception) -> UnwritableError:
    """Returns the error for a file that could not be written, a full disk most often."""
    reason = getattr(error, "strerror", None) or (str(error).strip().splitlines() or ["?"])[0]
    if len(reason) > _REASON:  # where it happened comes first, what happened last
        reason = f"{reason[: _REASON // 2]} ... {reason[-_REASON // 2 :]}"
    return UnwritableError(
        getattr(error, "errno", None) or errno.EIO,
        f"cannot write {file}: {reason}; make room, or take another --workdir, and run the same "
        "command again: what was finished is kept",
    )


def is_result(name: str) -> bool:
    """Returns whether a file of this name is a part of what a stage leaves."""
    return not any(fnmatch.fnmatchcase(name, pattern) for pattern in _NO_RESULTS)


def sum_files(folder: pathlib.Path, files: Iterable[pathlib.Path]) -> dict[str, Any]:
    """Returns length and SHA-256 of files, by their path from a folder."""
    sums = {}
    for file in sorted(files):
        length, sha256 = _sum(file)
        name = pathlib.PurePath(os.path.relpath(file, folder)).as_posix()
        sums[name] = {"bytes": length, "sha256": sha256}
    return sums


def changed_files(folder: pathlib.Path, sums: Mapping[str, Any]) -> dict[str, str]:
    """Returns which files are not what `sum_files` saw, each with what is wrong with it.

    What is no result does not count: of before there are sums of what a file manager had left.
    """
    changed = {}
    for name, entry in sums.items():
        file = folder / name
        if not is_result(file.name):
            continue
        try:
            length, sha256 = _sum(file)
        except FileNotFoundError:
            changed[name] = "is not there"
            continue
        except OSError as error:
            changed[name] = f"cannot be read ({error.strerror or error})"
            continue
        if length != entry["bytes"]:
            changed[name] = f"has {length} bytes instead of {entry['bytes']}"
        elif sha256 != entry["sha256"]:
            changed[name] = "has other bits than were written"
    return changed


_known_sums: dict[tuple[Any, ...], str] = {}


def _sum(file: pathlib.Path) -> tuple[int, str]:
    state = file.stat()
    # A stage is opened many times in a run; its files are read once.
    key = (str(file), state.st_ino, state.st_size, state.st_mtime_ns)
    if key not in _known_sums:
        with open(file, "rb") as stream:
            _known_sums[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    return state.st_size, _known_sums[key]


def versions() -> dict[str, str]:
    """Returns the version of Python and of each package a result may depend on."""
    numbers = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            numbers[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            numbers[package] = "not installed"  # run from a checkout
    return numbers


def devices() -> dict[str, Any]:
    """Returns platform, number and kind of all devices, on all processes."""
    first, *others = jax.devices()
    return {"platform": first.platform, "count": 1 + len(others), "kind": first.device_kind}


def now() -> str:
    """Returns the time in UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

"""The manifest of a stage: what was run, on what, with what outcome, as one JSON file."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

SCHEMA = 2  # 1 is that of robust_ssl 0.1
PACKAGES = ("robust-ssl", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


_SHOWN = 12  # directories named in one error
_WAY_OUT = "take another --workdir, or finish this one with robust_ssl 0.1; nothing was changed"


class ConfigChangedError(ValueError):
    """A stage directory holds the work of another configuration."""


class WorkdirError(ValueError):
    """The working directory cannot be made, written or understood."""


def make_directory(path: str | os.PathLike) -> pathlib.Path:
    """Makes a directory with its parents and makes sure that it can be written.

    Raises:
      WorkdirError: If that fails, with the reason.
    """
    path = pathlib.Path(path).expanduser()
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
      WorkdirError: If it is missing, is not JSON, or is of another kind or version.
    """
    file = pathlib.Path(path) / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WorkdirError(
            f"{file} cannot be read ({error}); bring it back from a copy, or remove "
            f"{file.parent} to run this stage again"
        ) from error
    needed = {"schema", "stage", "status", "config", "inputs", "seed", "started", "seconds"}
    missing = needed - set(manifest) if isinstance(manifest, dict) else needed
    if missing:
        raise WorkdirError(
            f"{file} is no stage manifest: it lacks {', '.join(sorted(missing))}; remove "
            f"{file.parent} to run this stage again"
        )
    if manifest["schema"] != SCHEMA:
        raise WorkdirError(
            f"{file} has schema {manifest['schema']!r}, this version reads {SCHEMA}; {_WAY_OUT}"
        )
    return manifest


def check_layout(workdir: str | os.PathLike) -> None:
    """Refuses a working directory with stages that robust_ssl 0.1 wrote; touches nothing.

    Its stages have other names, so a run would begin again beside them and mix the two.

    Raises:
      WorkdirError: If there are such directories; it names them and the way out.
    """
    workdir = pathlib.Path(workdir).expanduser()
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
        manifest = json.loads(file.read_text(encoding="utf-8"))
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
) -> None:
    """Compares the settings of a stage with those in its manifest.

    Args:
      path: The stage directory, for the message.
      old: The manifest there.
      settings: The entries that must agree with it: config, inputs, seed.
      collects: Whether inputs may come and go; those of the same name must agree.

    Raises:
      ConfigChangedError: If any value differs; each is named as ``config.epochs: 1 -> 2``.
    """
    before, after = {name: old[name] for name in settings}, dict(settings)
    if collects:
        both = old["inputs"].keys() & settings["inputs"].keys()
        for entries in (before, after):
            entries["inputs"] = {name: entries["inputs"][name] for name in both}
    before, after = _dotted(before), _dotted(after)
    changes = [
        f"  {name}: {before.get(name, '(absent)')} -> {after.get(name, '(absent)')}"
        for name in sorted(before | after)
        if before.get(name) != after.get(name)
    ]
    if changes:
        raise ConfigChangedError(
            f"{path} holds work made with other settings (old -> new):\n"
            + "\n".join(changes)
            + "\ntake another --workdir, or go back to the old value; nothing was changed"
        )


def _dotted(value: Any, prefix: str = "") -> dict[str, str]:
    """Returns the leaves of nested mappings as JSON text, by dotted name."""
    if not isinstance(value, Mapping) or (prefix and not value):
        return {prefix: json.dumps(value)}
    leaves: dict[str, str] = {}  # as text, since 1 == True == 1.0 in Python
    for key, entry in value.items():
        leaves |= _dotted(entry, f"{prefix}.{key}" if prefix else key)
    return leaves


def write_atomically(file: pathlib.Path, content: str | bytes) -> None:
    """Replaces a file as a whole: a reader, or a sudden end, finds the old one or the new."""
    temporary = file.with_name(file.name + ".tmp")
    with open(temporary, "wb") as stream:
        stream.write(content if isinstance(content, bytes) else content.encode())
        stream.flush()
        os.fsync(stream.fileno())  # else a power cut may leave the new name with no content
    os.replace(temporary, file)


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

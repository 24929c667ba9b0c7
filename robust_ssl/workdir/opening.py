"""Opens a stage: what is there is compared with what it should be, before it is used."""

from __future__ import annotations

import fnmatch
import logging
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from robust_ssl import disk
from robust_ssl.parallel import everywhere, exchange
from robust_ssl.workdir import lock
from robust_ssl.workdir.manifest import (
    SCHEMA,
    changed_files,
    check_unchanged,
    devices,
    json_ready,
    make_directory,
    now,
    read_manifest,
    sum_files,
    versions,
)
from robust_ssl.workdir.paths import WorkdirError, workdir_path
from robust_ssl.workdir.stage import StageDirectory

_log = logging.getLogger(__name__)

_TRIES = 60  # two seconds apart, for what all processes must see


def open_stage(
    workdir: str | os.PathLike,
    name: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    seed: int,
    *,
    collects: bool = False,
    places: Sequence[str] = (),
    redo: bool = False,
    made: str = "made",
) -> StageDirectory:
    """Opens the directory of one stage: new, to be resumed, or done.

    A stage that is not done is written, so the working directory is locked until it is closed.

    Args:
      workdir: Where the run lives; made if it does not exist.
      name: The stage's name, also the directory's.
      config: The resolved configuration of this stage, JSON-able.
      inputs: Fingerprint of everything the stage reads, by name; see `fingerprint`.
      seed: The integer all its random keys derive from.
      collects: Whether the stage only collects what others made, as a table does.  Its inputs may
        then come and go, and it is done again.  Those of the same name must be what they were.
      places: Mappings and lists of `config`, by dotted name (``"scoring.attacks"``), whose entries
        may come and go too.
      redo: Whether a finished stage that has lost a file is done again, as far as it has to be,
        with a word in the log; else that is an error.
      made: The word for what the stage does, for errors: ``"trained"``.

    Returns:
      The directory; its `done` says whether there is nothing left to do.

    Raises:
      ConfigChangedError: If the directory was made with another config, other inputs or another
        seed.  Nothing on disk is changed.
      WorkdirError: If the directory cannot be made or written, another run writes in it, its
        manifest cannot be read, or what the finished stage left is lost or damaged.

    Example:
      >>> import tempfile
      >>> with open_stage(tempfile.mkdtemp(), "stage1", {"epochs": 1}, {}, seed=0) as stage:
      ...     stage.save(10, {"w": jnp.ones(3)})
      ...     stage.finish({"clean_accuracy": 0.5})
      >>> stage.done, stage.manifest["results"]
      (True, {'clean_accuracy': 0.5})
    """
    workdir = workdir_path(workdir)
    path = workdir / name
    settings = json_ready({"config": config, "inputs": inputs, "seed": seed})

    def finished(quiet: bool = False) -> tuple[dict[str, Any] | None, StageDirectory | None]:
        old = _settled_manifest(path)
        if old is None:
            return None, None
        check_unchanged(path, old, settings, collects=collects, places=places)
        same = old["status"] == "done" and all(old[name] == settings[name] for name in settings)
        if same and check_left(path, old, redo=redo, made=made, quiet=quiet):
            return old, StageDirectory(path, old)
        return old, None

    old, stage = finished(quiet=True)
    if stage is not None:
        return stage
    make_directory(path)
    lock.acquire(workdir)
    try:
        # Another run may have come before.
        old, stage = finished()
        if stage is not None:
            lock.release(workdir)
            return stage
        return _begin(path, workdir, old, settings)
    except BaseException:
        lock.release(workdir)
        raise


def _begin(
    path: pathlib.Path,
    workdir: pathlib.Path,
    old: dict[str, Any] | None,
    settings: Mapping[str, Any],
) -> StageDirectory:
    """Returns a stage that is new, or goes on."""
    manifest = {
        "schema": SCHEMA,
        "stage": path.relative_to(workdir).as_posix(),
        "status": "running",
        **settings,
        "versions": versions(),
        "devices": devices(),
        "before": _record_changes(path, old) if old else [],
        "started": old["started"] if old else now(),
        "finished": None,
        "seconds": old["seconds"] if old else 0.0,
        "fingerprint": None,
        "results": None,
        "files": {},
        "log": "",
        "stuck": (old or {}).get("stuck"),
    }
    stage = StageDirectory(path, manifest, locked=workdir)
    stage.write_manifest()
    stage.remove_unfinished()
    if not stage.checkpoints.exists():
        stage.keep_metrics_before(0)  # a stage that starts over logs everything again
    return stage


def check_left(
    path: pathlib.Path,
    manifest: Mapping[str, Any],
    *,
    redo: bool = False,
    made: str = "made",
    quiet: bool = False,
) -> bool:
    """Returns whether all that a finished stage left is there, bit for bit.

    Args:
      path: Its directory.
      manifest: What it says.
      redo: Whether False is returned where something is not; else that is an error.
      made: The word for what the stage does.
      quiet: Whether nothing is said of what is made again, nor edited text set aside for it.

    Raises:
      WorkdirError: If something is not, with its name and the way out.
    """
    changed: dict[str, str] = {}
    if jax.process_index() == 0:
        files = manifest.get("files", {})
        # A page beside a stage is written again from its results: `readable.write_pages`.
        files = {name: files[name] for name in files if not fnmatch.fnmatchcase(name, "../*.md")}
        changed = changed_files(path, files)
    text = exchange("\n".join(f"{n} {why}" for n, why in changed.items()))[0]  # one has read it
    if not text:
        if jax.process_index() == 0:
            _warn_of_log(path / "metrics.jsonl", manifest.get("log"))
        return True
    names = "\n".join(f"  {line}" for line in text.splitlines()[:3])
    more = len(text.splitlines()) - 3
    names += f" (and {more} more)" if more > 0 else ""
    if redo:
        if not quiet:
            kept = "".join(
                f"; {kept}" for name in changed if (kept := disk.keep_edited(path / name))
            )
            said = "%s is not what was %s there and is made again:\n%s%s"
            _log.warning(said, path, made, names, kept)
        return False
    raise WorkdirError(
        f"{path} is not what was {made} there:\n{names}\nbring it back from a copy, or remove "
        f"{path / 'manifest.json'}: the same command then makes it again from what is intact"
    )


def _warn_of_log(file: pathlib.Path, sha256: str | None) -> None:
    """Says if a finished stage's log has changed: nothing is made of it any more."""
    name = file.name
    if sha256 and (not file.exists() or sum_files(file.parent, [file])[name]["sha256"] != sha256):
        _log.warning("%s is lost, or not what was logged there", file)


def _record_changes(path: pathlib.Path, old: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns what versions and devices a stage had before it went on under others."""
    before, here = list(old.get("before") or []), {"versions": versions(), "devices": devices()}
    changes = [
        f"{name}: {(old.get(part) or {}).get(name)} -> {value}"
        for part in here
        for name, value in here[part].items()
        if (old.get(part) or {}).get(name) != value
    ]
    if changes:
        _log.warning(
            "%s goes on with other versions or devices (%s); its numbers may differ in the last "
            "bits from those of a run without a change",
            *(path, ", ".join(changes)),
        )
        before.append({part: old.get(part) for part in here} | {"until": now()})
    return before


def _settled_manifest(path: pathlib.Path) -> dict[str, Any] | None:
    """Returns a stage's manifest, None where there is none; finished for all processes or none.

    A network disk may show an old state for a minute: those that see an unfinished stage would
    wait for ever for those that see nothing left to do.
    """
    for _ in range(_TRIES):
        manifest = read_manifest(path) if (path / "manifest.json").exists() else None
        done = manifest is not None and manifest["status"] == "done"
        if everywhere(done) or everywhere(not done):
            return manifest
        time.sleep(2)
    raise WorkdirError(
        f"{path} is finished for some processes only; give all of them the same workdir, on a "
        "disk that they share"
    )

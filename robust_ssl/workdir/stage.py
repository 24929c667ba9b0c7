"""A stage's directory: its manifest, metrics, checkpoints to resume from, and result.

``<workdir>/<stage>/`` holds

* ``manifest.json``: what was run, on what, with what outcome;
* ``metrics.jsonl``: one JSON object a line, never NaN, no step twice;
* ``checkpoints/<step>/``: the last two states, from which an interrupted stage goes on.

The arrays that it leaves, a model or a perturbation, are a file of their kind beside them.

Files are replaced whole and arrays carry checksums (`arrays`): neither a sudden end nor a damaged
disk leaves something that is taken for a result.
"""

from __future__ import annotations

import json
import logging
import os
import pathlib
import shutil
import time
from collections.abc import Mapping
from typing import Any

import jax

from robust_ssl.parallel import barrier, everywhere, first_process
from robust_ssl.workdir.arrays import (
    TREE,
    DamagedTreeError,
    WrongTreeError,
    digest,
    orbax_v1,
    read_tree,
    with_checksums,
)
from robust_ssl.workdir.manifest import (
    SCHEMA,
    WorkdirError,
    check_unchanged,
    devices,
    json_ready,
    make_directory,
    now,
    read_manifest,
    versions,
    write_atomically,
)

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
) -> StageDirectory:
    """Opens the directory of one stage: new, to be resumed, or done.

    Args:
      workdir: Where the run lives; made if it does not exist.
      name: The stage's name, also the directory's.
      config: The resolved configuration of this stage, JSON-able.
      inputs: Fingerprint of everything the stage reads, by name; see `fingerprint`.
      seed: The integer all its random keys derive from.
      collects: Whether the stage only collects what others made, as a table does.  Its inputs may
        then come and go, and it is done again.  Those of the same name must be what they were.

    Returns:
      The directory; its `done` says whether there is nothing left to do.

    Raises:
      ConfigChangedError: If the directory was made with another config, other inputs or another
        seed.  Nothing on disk is changed.
      WorkdirError: If the directory cannot be made or written, or its manifest cannot be read.

    Example:
      >>> import tempfile
      >>> with open_stage(tempfile.mkdtemp(), "stage1", {"epochs": 1}, {}, seed=0) as stage:
      ...     stage.save(10, {"w": jnp.ones(3)})
      ...     stage.finish({"clean_accuracy": 0.5})
      >>> stage.done, stage.manifest["results"]
      (True, {'clean_accuracy': 0.5})
    """
    path = pathlib.Path(workdir).expanduser() / name
    settings = json_ready({"config": config, "inputs": inputs, "seed": seed})
    old = _settled_manifest(path)
    if old is not None:
        check_unchanged(path, old, settings, collects=collects)
        if old["status"] == "done" and old["inputs"] == settings["inputs"]:
            return StageDirectory(path, old)
    make_directory(path)
    manifest = {
        "schema": SCHEMA,
        "stage": name,
        "status": "running",
        **settings,
        "versions": versions(),
        "devices": devices(),
        "started": old["started"] if old else now(),
        "finished": None,
        "seconds": old["seconds"] if old else 0.0,
        "fingerprint": None,
        "results": None,
    }
    stage = StageDirectory(path, manifest)
    stage.write_manifest()
    stage.remove_unfinished()
    if not stage.checkpoints.exists():
        stage.keep_metrics_before(0)  # a stage that starts over logs everything again
    return stage


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


class StageDirectory:
    """One stage's directory; `open_stage` makes it.

    Use it as a context manager: leaving the block waits for what is still being written.

    Attributes:
      path: ``<workdir>/<stage>``.
      manifest: What ``manifest.json`` says; see `open_stage`.
    """

    def __init__(self, path: pathlib.Path, manifest: dict[str, Any]):
        self.path = path
        self.manifest = manifest
        self._seconds_before = manifest["seconds"]
        self._opened = time.monotonic()
        self._saving: Any = None

    def __enter__(self) -> StageDirectory:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    @property
    def done(self) -> bool:
        """Whether the result is there."""
        return self.manifest["status"] == "done"

    @property
    def seconds(self) -> float:
        """How long the stage has been worked on, interruptions not counted."""
        return self._seconds_before + time.monotonic() - self._opened

    @property
    def fingerprint(self) -> str:
        """Identifies the finished result: what a later stage names among its inputs."""
        if not self.done:
            raise ValueError(f"{self.path} is not finished; run its stage first")
        return self.manifest["fingerprint"]

    @property
    def results(self) -> dict[str, Any]:
        """The numbers the stage reported when it finished."""
        return self.manifest["results"] or {}

    @property
    def checkpoints(self) -> pathlib.Path:
        """Where the states to resume from are kept."""
        return self.path / "checkpoints"

    def _steps(self) -> list[int]:
        """Returns the steps that are saved, from the newest down; orbax commits by a rename."""
        names = [entry.name for entry in self.checkpoints.glob("*")]
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def save(self, step: int, tree: Any) -> None:
        """Saves a state in the background and keeps the last two.

        Args:
          step: How many updates the state has seen, which is the number of the next one.
          tree: Arrays only, no random keys.  What is being written is a copy, so its buffers
            may be donated at once.
        """
        self.wait()
        if step in first_process(self._steps()):  # all must save, or none
            return  # a state is a function of its step: it is there already
        arrays, metadata = with_checksums(tree)
        # Not orbax's `training.Checkpointer`: it reads the metadata of all steps when it starts,
        # so one flipped bit there would hide the intact state beside it (seen with 0.12.8).
        self._saving = orbax_v1().save_async(
            self.checkpoints.absolute() / str(step),
            arrays,
            checkpointable_name=TREE,
            custom_metadata=metadata,
        )
        self._saving.on_complete(lambda _: self._remove_old())
        self.write_manifest()

    def wait(self) -> None:
        """Returns when all that was saved is on disk; raises if that failed (a full disk)."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()
            self._remove_old()  # `result` may return before what waits for completion has run

    def _remove_old(self) -> None:
        """Removes all states but two: the newest may turn out to be damaged."""
        if jax.process_index() == 0:
            for step in self._steps()[2:]:
                shutil.rmtree(self.checkpoints / str(step), ignore_errors=True)

    def remove_unfinished(self) -> None:
        """Removes what a sudden end left of a state that was being written."""
        if jax.process_index() == 0:
            for rest in self.checkpoints.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(rest, ignore_errors=True)

    def restore_latest(self, like: Any) -> tuple[int, Any] | None:
        """Returns the newest undamaged state, and cuts the metrics back to it.

        A state whose checksums do not agree is moved to ``damaged-<step>`` beside
        ``checkpoints``, and the one before it is taken.

        Args:
          like: The tree expected, of arrays or `jax.ShapeDtypeStruct` with shardings; the state
            arrives on these shardings, whatever the devices it was saved from.

        Returns:
          The step and the state, or None where nothing has been saved.

        Raises:
          WrongTreeError: If paths, shapes or dtypes differ.
          DamagedTreeError: If there are states, and none is intact.
        """
        self.wait()
        damaged: dict[int, Exception] = {}
        for step in first_process(self._steps()):
            tree, error = None, None
            try:
                tree = read_tree(self.checkpoints / str(step), like)
            except WrongTreeError:
                raise  # no damage: the state before it would not fit either
            except Exception as caught:  # orbax has many words for a damaged file
                error = caught
            if everywhere(error is None):
                self._set_aside(damaged)
                self.keep_metrics_before(step)
                return step, tree
            damaged[step] = error or DamagedTreeError("another process could not read it")
        if damaged:
            reasons = "\n".join(f"  step {step}: {_brief(e)}" for step, e in damaged.items())
            raise DamagedTreeError(
                f"no checkpoint in {self.checkpoints} is intact:\n{reasons}\n"
                f"remove {self.path} to run this stage from its start"
            )
        self.keep_metrics_before(0)
        return None

    def _set_aside(self, damaged: Mapping[int, Exception]) -> None:
        for step, error in damaged.items():
            target = self.path / f"damaged-{step}"
            _log.warning(
                "checkpoint %s is damaged (%s); moved to %s, going on from the one before",
                self.checkpoints / str(step),
                _brief(error),
                target,
            )
            if jax.process_index() == 0:
                shutil.rmtree(target, ignore_errors=True)
                (self.checkpoints / str(step)).rename(target)
        if damaged:
            barrier("set_aside")  # the others would still see the old name

    def log(self, step: int, **metrics: Any) -> None:
        """Appends a line to ``metrics.jsonl``; reading arrays waits for the devices.

        Args:
          step: Number of the update the metrics belong to, from 0.
          **metrics: Numbers, arrays or nested mappings; NaN and infinity become null.
        """
        line = json.dumps(json_ready({"step": int(step), **metrics}), allow_nan=False)
        if jax.process_index() == 0:
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the lines of ``metrics.jsonl``."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return [entry for entry in map(_parse_line, lines) if entry is not None]

    def keep_metrics_before(self, step: int) -> None:
        """Drops the metrics of `step` and later, and a line cut short by a sudden end."""
        if jax.process_index() == 0 and (self.path / "metrics.jsonl").exists():
            entries = [entry for entry in self.metrics() if entry["step"] < step]
            text = "".join(json.dumps(entry) + "\n" for entry in entries)
            write_atomically(self.path / "metrics.jsonl", text)

    def finish(self, results: Mapping[str, Any] | None = None, identity: str | None = None) -> None:
        """Writes the result and marks the stage as done, which is the last thing to happen.

        Args:
          results: Numbers for the manifest, JSON-able; NaN and infinity become null.
          identity: Fingerprint of the arrays that the stage leaves; None is that of its numbers,
            which count only where they are the result: seconds differ from run to run.
        """
        self.close()  # a save that failed must not be marked as done
        results = json_ready(results or {})
        self.manifest.update(
            status="done",
            finished=now(),
            fingerprint=identity or digest(results)[:16],
            results=results,
        )
        self.write_manifest()
        barrier("finish")  # later stages of every process read the result

    def write_manifest(self) -> None:
        """Brings ``manifest.json`` up to date; a reader sees the old one or the new one whole."""
        self.manifest["seconds"] = round(self.seconds, 3)
        if jax.process_index() == 0:  # the processes share the directory
            text = json.dumps(self.manifest, indent=2, allow_nan=False) + "\n"
            write_atomically(self.path / "manifest.json", text)

    def close(self) -> None:
        """Waits for what is being saved."""
        self.wait()


def _parse_line(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None  # cut short by a sudden end
    return entry if isinstance(entry, dict) and "step" in entry else None


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__

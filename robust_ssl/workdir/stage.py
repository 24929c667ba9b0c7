"""A stage's directory: its manifest, metrics, checkpoints to resume from, and result.

``<workdir>/<stage>/`` holds

* ``manifest.json``: what was run, on what, with what outcome;
* ``metrics.jsonl``: one JSON object a line, never NaN, no step twice;
* ``checkpoints/<step>/``: the last two states, from which an interrupted stage goes on.

The arrays that it leaves, a model or a perturbation, are a file of their kind beside them.

Files are replaced whole and arrays carry checksums (`arrays`): neither a sudden end nor a damaged
disk leaves something that is taken for a result.  Whatever is read again is tied to what it was
made from: config, inputs, seed and the code of the user's functions (`StageDirectory.origin`).
"""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import pathlib
import shutil
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from robust_ssl import disk
from robust_ssl.parallel import barrier, everywhere, first_process
from robust_ssl.workdir import lock
from robust_ssl.workdir.arrays import (
    TREE,
    DamagedTreeError,
    WrongTreeError,
    is_committed,
    orbax_v1,
    read_tree,
    record_of,
    with_checksums,
)
from robust_ssl.workdir.manifest import (
    digest,
    is_result,
    json_ready,
    now,
    seal,
    sum_files,
    unwritable,
    write_atomically,
)
from robust_ssl.workdir.metrics import append, keep_before, read_metrics
from robust_ssl.workdir.paths import plain

_log = logging.getLogger(__name__)


_A_WHILE = 60.0  # seconds, well below what orbax waits


class StageDirectory:
    """One stage's directory; `open_stage` makes it.

    Use it as a context manager: leaving the block waits for what is still being written.

    Attributes:
      path: ``<workdir>/<stage>``.
      manifest: What ``manifest.json`` says; see `open_stage`.
    """

    def __init__(
        self, path: pathlib.Path, manifest: dict[str, Any], locked: pathlib.Path | None = None
    ):
        self.path = path
        self.manifest = manifest
        self._locked = locked  # the working directory that `close` lets others into
        self._workdir = locked
        self._seconds_before = manifest["seconds"]
        self._opened = time.monotonic()
        self._saving: Any = None
        self._saving_since = 0.0  # by a clock that nobody sets
        self._saved_step = 0
        self._has_read_back = False

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
    def origin(self) -> str:
        """Identifies all that the stage's work is a function of; every part it keeps has it."""
        made_from = ("stage", "config", "inputs", "seed")
        return digest({name: self.manifest[name] for name in made_from})[:16]

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
        if self._workdir is not None:
            lock.check_held(self._workdir)
        arrays, metadata = with_checksums(tree, self._origin_of_step(step), self._log_sum())
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        # Not orbax's `training.Checkpointer`: it reads the metadata of all steps when it starts,
        # so one flipped bit there would hide the intact state beside it (seen with 0.12.8).
        self._saving_since = time.monotonic()
        try:
            self._saving = orbax_v1().save_async(
                plain(self.checkpoints / str(step)),
                arrays,
                checkpointable_name=TREE,
                custom_metadata=metadata,
            )
        except Exception as error:  # a full disk is a ValueError of tensorstore's, too
            raise unwritable(self.checkpoints / str(step), error) from error
        self._saving.on_complete(lambda _: self._remove_old())
        self._saved_step = step
        self.write_manifest()

    def _log_sum(self) -> str:
        file = self.path / "metrics.jsonl"
        if jax.process_index() or not file.exists():
            return ""  # one process writes both
        return sum_files(self.path, [file])[file.name]["sha256"]

    def _origin_of_step(self, step: int) -> str:
        return f"{self.origin}-{step}"  # the step too: directories may be renamed

    def wait(self) -> None:
        """Returns when all that was saved is on disk; raises if that failed (a full disk)."""
        saving, self._saving = self._saving, None
        if saving is not None:
            try:
                saving.result()
                if jax.process_index() == 0:
                    self._read_back(self._saved_step)
            except Exception as error:  # orbax has many words for a full disk
                cause = self._cause(error)
                raise unwritable(self.checkpoints / str(self._saved_step), cause) from error
            self._remove_old()  # `result` may return before what waits for completion has run

    def _cause(self, error: Exception) -> Exception:
        # Orbax waits by the wall's clock, which somebody may set.
        early = time.monotonic() - self._saving_since < _A_WHILE
        if isinstance(error, TimeoutError) and early:
            return OSError(errno.EIO, "the clock was set while it was written")
        return error

    def _read_back(self, step: int) -> None:
        """Raises unless what was saved can be read; all of it once, later what costs nothing."""
        path = self.checkpoints / str(step)
        if not is_committed(path, self._origin_of_step(step)):
            raise OSError("it is not what was just written there")
        if not self._has_read_back and jax.process_count() == 1:
            read_tree(path)
            gc.collect()  # the threads that orbax reads with
            self._has_read_back = True

    def _remove_old(self) -> None:
        """Removes all states but two: the newest may turn out to be damaged."""
        if jax.process_index() == 0:
            for step in self._steps()[2:]:
                shutil.rmtree(self.checkpoints / str(step), ignore_errors=True)

    def remove_unfinished(self) -> None:
        """Removes what a sudden end left of what was being written."""
        if jax.process_index() == 0:
            disk.remove_leftovers(folder for folder, _, _ in os.walk(self.path))
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
            tree, error, foreign = None, None, False
            try:
                record = record_of(self.checkpoints / str(step))
                foreign = record["origin"] != self._origin_of_step(step)
                if not foreign:
                    tree = read_tree(self.checkpoints / str(step), like)
            except (WrongTreeError, MemoryError, ImportError):
                raise  # no damage: the state before it would not fit, or not be read, either
            except Exception as caught:  # orbax has many words for a damaged file
                error = caught
            if not everywhere(not foreign):
                self._move(step, "other", "was made with another config, seed, input or code")
                continue
            if everywhere(error is None):
                for number, reason in damaged.items():
                    self._move(number, "damaged", f"is damaged ({_brief(reason)})")
                self.keep_metrics_before(step)
                if record["log"] and not jax.process_index() and self._log_sum() != record["log"]:
                    _log.warning(
                        "%s is lost, or not what was logged before step %d: its numbers may be "
                        "wrong, the state is not",
                        *(self.path / "metrics.jsonl", step),
                    )
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

    def _move(self, step: int, kind: str, why: str) -> None:
        """Renames a state that is not taken, with a word in the log."""
        path, target = self.checkpoints / str(step), self.path / f"{kind}-{step}"
        _log.warning("checkpoint %s %s; moved to %s", path, why, target)
        if jax.process_index() == 0:
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)
        barrier("move")  # the others would still see the old name

    def log(self, step: int, **metrics: Any) -> None:
        """Appends a line to ``metrics.jsonl``; reading arrays waits for the devices.

        Args:
          step: Number of the update the metrics belong to, from 0.
          **metrics: Numbers, arrays or nested mappings; NaN and infinity become null.
        """
        line = json.dumps(json_ready({"step": int(step), **metrics}), allow_nan=False)
        if jax.process_index() == 0:
            append(self.path / "metrics.jsonl", line)

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the lines of ``metrics.jsonl``."""
        return read_metrics(self.path / "metrics.jsonl")

    def keep_metrics_before(self, step: int) -> None:
        """Drops the metrics of `step` and later, and a line cut short by a sudden end."""
        if jax.process_index() == 0:
            keep_before(self.path / "metrics.jsonl", step)

    def finish(
        self,
        results: Mapping[str, Any] | None = None,
        identity: str | None = None,
        beside: Iterable[pathlib.Path] = (),
    ) -> None:
        """Writes the result and marks the stage as done, which is the last thing to happen.

        Every file that it leaves is read back, and its checksum goes into the manifest.

        Args:
          results: Numbers for the manifest, JSON-able; NaN and infinity become null.
          identity: Fingerprint of the arrays that the stage leaves; None is that of its numbers,
            which count only where they are the result: seconds differ from run to run.
          beside: Files that it leaves elsewhere.
        """
        self.wait()  # a save that failed must not be marked as done
        results = json_ready(results or {})
        self.manifest.update(
            status="done",
            finished=now(),
            fingerprint=identity or digest(results)[:16],
            results=results,
            files=sum_files(self.path, [*_left(self.path), *beside]),
            log=self._log_sum(),
        )
        self.write_manifest()
        barrier("finish")  # later stages of every process read the result
        self._unlock()

    def write_manifest(self) -> None:
        """Brings ``manifest.json`` up to date; a reader sees the old one or the new one whole."""
        self.manifest["seconds"] = round(self.seconds, 3)
        if jax.process_index() == 0:  # the processes share the directory
            if self._workdir is not None:
                lock.check_held(self._workdir)
            text = json.dumps(seal(self.manifest), indent=2, allow_nan=False) + "\n"
            write_atomically(self.path / "manifest.json", text)

    def close(self) -> None:
        """Waits for what is being saved, and lets other runs into the working directory."""
        try:
            self.wait()
        finally:
            self._unlock()

    def _unlock(self) -> None:
        locked, self._locked = self._locked, None
        if locked is not None:
            lock.release(locked)


def _left(path: pathlib.Path) -> list[pathlib.Path]:
    """The files that a finished stage leaves, without those it is resumed from."""
    if jax.process_index():
        return []  # one process writes the manifest
    left = []
    for folder, folders, names in os.walk(path):
        folders[:] = filter(is_result, folders)
        left += [pathlib.Path(folder, name) for name in filter(is_result, names)]
    return [file for file in left if file.is_file()]


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__

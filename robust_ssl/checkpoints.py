"""What a stage leaves on disk: a manifest, metrics, checkpoints to resume from, and its result.

``<workdir>/<stage>/`` holds

* ``manifest.json``: what was run, on what, with what outcome;
* ``metrics.jsonl``: one JSON object a line, never NaN, no step twice;
* ``checkpoints/<step>/``: the last two states, from which an interrupted stage goes on;
* ``final/``: the result, which is all that other stages read.

Files are replaced whole and arrays carry checksums (`trees`), so neither a sudden end nor a damaged
disk leaves something that is taken for a result.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import pathlib
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from robust_ssl import manifests, trees
from robust_ssl.manifests import ConfigChangedError, WorkdirError, json_ready, make_directory
from robust_ssl.parallel import everywhere
from robust_ssl.trees import DamagedTreeError, WrongTreeError, fingerprint

__all__ = [
    "ConfigChangedError",
    "DamagedTreeError",
    "StageDirectory",
    "WorkdirError",
    "WrongTreeError",
    "fingerprint",
    "make_directory",
    "open_stage",
]

_log = logging.getLogger(__name__)

_LOOKS = 60  # two seconds apart, for what all processes must see


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
      collects: Whether the stage only collects what others made, as a table does: which inputs it
        has may change, and it is then done again; those of the same name must be what they were.

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
      ...     stage.finish({"w": jnp.ones(3)}, {"clean_accuracy": 0.5})
      >>> stage.done, stage.manifest["results"]
      (True, {'clean_accuracy': 0.5})
    """
    path = pathlib.Path(workdir).expanduser() / name
    asked = json_ready({"config": config, "inputs": inputs, "seed": seed})
    old = _read_manifest(path)
    if old is not None:
        manifests.check_unchanged(path, old, asked, collects=collects)
        if old["status"] == "done" and old["inputs"] == asked["inputs"]:
            return StageDirectory(path, old)
    make_directory(path)
    manifest = {
        "schema": manifests.SCHEMA,
        "stage": name,
        "status": "running",
        **asked,
        "versions": manifests.versions(),
        "devices": manifests.devices(),
        "started": old["started"] if old else manifests.now(),
        "finished": None,
        "seconds": old["seconds"] if old else 0.0,
        "fingerprint": None,
        "results": None,
    }
    stage = StageDirectory(path, manifest)
    stage.write_manifest()
    if not stage.checkpoints.exists():
        stage.keep_metrics_before(0)  # a stage that starts over logs everything again
    return stage


def _read_manifest(path: pathlib.Path) -> dict[str, Any] | None:
    """Returns a stage's manifest, None where there is none; finished for all processes or none.

    A network disk may show an old state for a minute: those that see an unfinished stage would
    wait for ever for those that see nothing left to do.
    """
    for _ in range(_LOOKS):
        found = manifests.read(path) if (path / "manifest.json").exists() else None
        done = found is not None and found["status"] == "done"
        if everywhere(done) or everywhere(not done):
            return found
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

    # A manager starts threads, and a finished stage needs none.
    @functools.cached_property
    def _manager(self):
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, cleanup_tmp_directories=True, lightweight_initialize=True
        )
        return ocp.CheckpointManager(self.checkpoints.absolute(), options=options)

    def save(self, step: int, tree: Any) -> None:
        """Saves a state in the background and keeps the last two.

        Args:
          step: How many updates the state has seen, which is the number of the next one.
          tree: Arrays only, no random keys.  What is being written is a copy, so its buffers
            may be donated at once.
        """
        if step in self._manager.all_steps():
            return  # a state is a function of its step: it is there already
        self._manager.save(step, args=trees.save_arguments(tree), force=True)
        self.write_manifest()

    def wait(self) -> None:
        """Returns when all that was saved is on disk; raises if that failed (a full disk)."""
        self._manager.wait_until_finished()

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
        damaged: dict[int, Exception] = {}
        for step in _as_first_process_sees(self._manager.all_steps()):
            tree, error = None, None
            try:
                tree = trees.read(self.checkpoints / str(step), like)
            except WrongTreeError:
                raise
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
            _barrier("set_aside")
            self._manager.reload()

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
            kept = [entry for entry in self.metrics() if entry["step"] < step]
            text = "".join(json.dumps(entry) + "\n" for entry in kept)
            manifests.write_atomically(self.path / "metrics.jsonl", text)

    def finish(self, tree: Any = None, results: Mapping[str, Any] | None = None) -> None:
        """Writes the result and marks the stage as done, which is the last thing to happen.

        Args:
          tree: The result, arrays only; None for a stage that leaves numbers only.
          results: Numbers for the manifest, JSON-able; NaN and infinity become null.
        """
        self.close()
        if tree is not None:
            trees.write(self.path / "final", tree)
        results = json_ready(results or {})
        self.manifest.update(
            status="done",
            finished=manifests.now(),
            # Numbers count only where they are the result: seconds differ from run to run.
            fingerprint=trees.digest(results)[:16] if tree is None else fingerprint(tree),
            results=results,
        )
        self.write_manifest()
        _barrier("finish")

    def load_final(self, like: Any) -> Any:
        """Returns the result on the shardings of `like`.

        Raises:
          WrongTreeError: If paths, shapes or dtypes differ from those of `like`.
          DamagedTreeError: If the result is not what was saved.
        """
        with self._explained():
            return trees.read(self.path / "final", like)

    def read_final(self) -> dict[str, Any]:
        """Returns the result as nested dicts of NumPy arrays, whatever its structure was."""
        with self._explained():
            return trees.read(self.path / "final")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except WrongTreeError:
            raise
        except Exception as error:
            raise DamagedTreeError(
                f"cannot read {self.path / 'final'}: {_brief(error)}; "
                f"remove {self.path} to run this stage again"
            ) from error

    def write_manifest(self) -> None:
        """Brings ``manifest.json`` up to date; a reader sees the old one or the new one whole."""
        self.manifest["seconds"] = round(self.seconds, 3)
        if jax.process_index() == 0:
            text = json.dumps(self.manifest, indent=2, allow_nan=False) + "\n"
            manifests.write_atomically(self.path / "manifest.json", text)

    def close(self) -> None:
        """Waits for what is being saved and stops the threads that save it."""
        if "_manager" in self.__dict__:
            self._manager.wait_until_finished()
            self._manager.close()
            del self.__dict__["_manager"]


def _parse_line(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None  # cut short by a sudden end
    return entry if isinstance(entry, dict) and "step" in entry else None


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _as_first_process_sees(steps: Iterable[int]) -> list[int]:
    """Returns the steps from the newest down, the same in all processes."""
    newest = sorted(steps, reverse=True)
    if jax.process_count() == 1:
        return newest
    from jax.experimental import multihost_utils

    padded = np.full(8, -1, np.int32)
    padded[: len(newest[:8])] = newest[:8]
    return [int(x) for x in multihost_utils.broadcast_one_to_all(padded) if x >= 0]


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)

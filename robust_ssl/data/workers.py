"""Batches that processes of their own read and decode, with grain.

For sets whose pictures take longer to decode than a step takes.  A batch is the same function of
its step wherever it is read, so neither the number of workers nor a resumed run changes it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from typing import Any

import numpy as np

AHEAD = 2  # batches that each worker prepares
_BESIDE = ("digests", "unreadable")  # what a worker found out about the set, beside its batch


class _Steps:
    """The batches from a step on, as a source of random access; it travels to the workers."""

    def __init__(self, examples: Any, order: Callable[..., np.ndarray], first: int, places: Any):
        self.examples, self.order, self.first, self.places = examples, order, first, places

    def __len__(self) -> int:
        return 2**40  # training decides when it ends

    def __getitem__(self, place: int) -> dict[str, Any]:
        rows = self.order(step=self.first + place)
        batch = self.examples.read(rows, threads=1, places=self.places)
        rows = rows if self.places is None else rows[self.places]
        source = self.examples.rows[rows]
        beside = {
            "digests": self.examples.digests[source],
            "unreadable": [(int(r), w) for r, w in self.examples.unreadable.items() if r in source],
        }
        return {**batch, "rows": rows.astype(np.int32), **beside}


def read_in_processes(
    examples: Any,
    order: Callable[..., np.ndarray],
    first: int,
    workers: int,
    places: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the batches from step `first` on, read by processes of their own.

    Args:
      examples: `StreamedExamples`; what it reads from must be picklable, as far as cloudpickle can.
      order: ``order(step=...)``: which examples make the batch of a step, int ``[batch]``.
      first: Number of the first step.
      workers: How many processes.
      places: Of each batch, only these are read; see `StreamedExamples.read`.

    Yields:
      What ``examples.read`` returns, and ``rows``.

    Raises:
      ValueError: If a picture cannot be read, with its place; it ends the workers.
      RuntimeError: If grain is not there, or a worker ends before its time.
    """
    grain = _grain()
    steps = grain.MapDataset.source(_Steps(examples, order, first, places))
    one_by_one = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=AHEAD)
    prefetched = steps.to_iter_dataset(one_by_one).mp_prefetch(options, _serve_the_run)
    with _signals_blocked():
        iterator = iter(prefetched)
    with contextlib.closing(iterator):
        with _signals_blocked():  # the workers start with the first batch
            batch = next(iterator)
        while True:
            beside = {name: batch.pop(name) for name in _BESIDE}
            # Out of the memory that is shared with the worker, which takes it back.
            batch = {name: np.array(values) for name, values in batch.items()}
            examples.digests[examples.rows[batch["rows"]]] = np.array(beside["digests"])
            examples.note_unreadable(dict(beside["unreadable"]))
            yield batch
            batch = next(iterator)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _serve_the_run(worker: int, count: int) -> None:
    """Has a worker end when the run ends it or is gone, and not by a signal to the whole group.

    A terminal, SLURM and systemd send such ones.  The run then saves its state after its step, for
    which it needs batches.  Grain ends its workers by an event, and by SIGKILL where that does not
    help; after a `kill -9` of the run nobody else would.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_after_run, daemon=True, name="parent").start()


def _end_after_run() -> None:
    run = multiprocessing.parent_process()
    if run is not None:
        run.join()
        os._exit(1)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Has processes that are started here begin with signals blocked, for they import for seconds.

    It holds for this thread and those that it starts; the main thread still gets its signals.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # its start, which grain's would cause, unblocks both
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _grain() -> Any:
    try:
        import grain
    except ImportError as error:
        raise RuntimeError(
            "pictures are read by processes of their own with grain, which is not installed: "
            'pip install "robust-ssl[grain]", or set workers to 0'
        ) from error
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain reads flags of its own, whoever started Python
        flags.FLAGS.mark_as_parsed()
    return grain

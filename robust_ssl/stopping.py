"""How a run is stopped: a signal is a request, which a stage answers after its current step."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Iterator

_stop = threading.Event()
_points = itertools.count()  # JAX wants the points at which processes ask together to be numbered


class Stopped(Exception):  # noqa: N818 (no error: the state is saved, the run goes on later)
    """A stage was asked to stop, and its state is on disk."""


def request_stop() -> None:
    """Asks the running stage to save its state after the current step and to stop."""
    _stop.set()


def stop_requested() -> bool:
    """Returns whether somebody asked to stop; a stage asks after every step.

    Several processes all ask at the same points.  A SIGTERM to one of them is answered by all at
    the same one, a little later.
    """
    if _stop.is_set():
        return True
    from jax.experimental import multihost_utils  # this module does without JAX until then

    return multihost_utils.reached_preemption_sync_point(next(_points))


def clear_stop() -> None:
    """Forgets a request to stop, before another run in the same process."""
    _stop.clear()


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Turns the first SIGTERM or Ctrl-C into `request_stop`; a second one ends at once.

    Works in the main thread only, as signals do.  Not for several processes, which must all stop
    at the same step: there JAX passes the signal on (`stop_requested`).
    """
    previous = {}

    def restore():
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(number, frame):
        request_stop()
        restore()
        # print() may be interrupted in the middle of a print(), which is an error.
        os.write(2, b"\nstopping after this step; once more to stop at once\n")

    clear_stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        restore()

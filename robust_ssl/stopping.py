"""How a run is stopped: a signal is a request, which a stage answers after its current step.

Several processes have to stop at the same point.  The one that is asked tells the others through
JAX's coordination service; a thread of each names the next point that it can still stop at; and all
stop at the latest of these.  Points are compared by order, so none is missed.  (JAX's own way,
`reached_preemption_sync_point`, compares them for equality.  A library that asks under numbers of
its own, as orbax does when it saves, made it agree on a point that nobody came to.)
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

_stop = threading.Event()
_LOOK_EVERY = 0.3  # seconds between two looks at whether another process was asked
_NOTICE = "RECEIVED_PREEMPTION_NOTICE"  # where JAX notes a SIGTERM that its own handler caught


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
    if not _several():
        return _stop.is_set()
    return _agreement().reached()


def clear_stop() -> None:
    """Forgets a request to stop, before another run in the same process."""
    global _current
    _stop.clear()
    if _current is not None:
        _current.close()
        _current = _Agreement(_current.round + 1)


def _several() -> bool:
    """Whether this process has joined others; does without JAX until then."""
    return "jax" in sys.modules and _processes().client() is not None


def _processes() -> Any:
    from robust_ssl.parallel import processes

    return processes


class _Agreement:
    """Finds the point at which all processes stop.

    Attributes:
      round: How many runs there were before in these processes.
    """

    def __init__(self, number: int):
        self.round = number
        self._points = 0  # that this process has come to
        self._proposal: int | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="stopping")
        self._thread.start()
        # A thread that is inside the service's client when Python ends takes the process with it.
        atexit.register(self.close)

    def reached(self) -> bool:
        """Counts a point; returns whether all stop here, or should have before."""
        with self._lock:
            self._points += 1
            point, proposal = self._points, self._proposal
        return proposal is not None and point >= self._latest()

    def close(self) -> None:
        """Ends its thread."""
        self._closed.set()
        self._thread.join(timeout=5)

    def _latest(self) -> int:
        """The latest proposal: threads make them, so none waits for a process that computes."""
        import jax

        processes = _processes()
        keys = [(f"stop/{self.round}/{number}", number) for number in range(jax.process_count())]
        return max(int(processes.wait_for(key, number)) for key, number in keys)

    def _watch(self) -> None:
        processes = _processes()
        with contextlib.suppress(Exception):  # the service is gone: so is the run
            while not self._closed.is_set() and not self._asked(processes):
                self._closed.wait(_LOOK_EVERY)
            if not self._closed.is_set():
                self._propose(processes)

    def _asked(self, processes: Any) -> bool:
        if _stop.is_set():
            processes.put(f"stop/{self.round}", "asked")
            return True
        asked = processes.look(f"robust_ssl/stop/{self.round}")
        # JAX keeps its notice for good, so it is an answer for the first run only.
        notice = processes.look(_NOTICE) if self.round == 0 else None
        return asked is not None or notice is not None

    def _propose(self, processes: Any) -> None:
        import jax

        with self._lock:
            # No step of this process lies between what it says and what it then does.
            self._proposal = self._points + 1
        processes.put(f"stop/{self.round}/{jax.process_index()}", str(self._proposal))


_current: _Agreement | None = None


def _agreement() -> _Agreement:
    global _current
    if _current is None:
        _current = _Agreement(0)
    return _current


def interrupt_on_sigterm() -> None:
    """Has SIGTERM raise KeyboardInterrupt, as Ctrl-C does: what is half-made is then removed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextlib.contextmanager
def stop_on_signals(several: bool = False, ends: bool = False) -> Iterator[Callable[[], None]]:
    """Turns the first SIGTERM or Ctrl-C into `request_stop`; a second one ends at once.

    Works in the main thread only, as signals do.  Of several processes a second signal ends none:
    the others would wait for it, and schedulers send more than one.

    Args:
      several: Whether this process is going to join others.
      ends: Whether the process ends with the block.  A SIGTERM that comes after it then changes
        nothing: what is done stays done, in the exit code too.

    Yields:
      A function to call once the processes have joined: JAX then has put a handler of its own in
      place of this one.
    """
    previous = {}

    def restore():
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(number, frame):
        again = _stop.is_set()
        request_stop()
        if several or _several():
            text = b"already stopping\n" if again else b"stopping after a step of all processes\n"
        else:
            restore()
            text = b"stopping after this step; once more to stop at once\n"
        # print() may be interrupted in the middle of a print(), which is an error.
        with contextlib.suppress(OSError):  # it would come out of whatever is running now
            os.write(2, b"\n" + text)

    def install():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, handle)
        if _several():
            _agreement()  # before the first point: the others may be asked earlier

    clear_stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.getsignal(number)
    install()
    try:
        yield install
    finally:
        restore()
        if ends:  # Python keeps this one to its last instruction, unlike a handler
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

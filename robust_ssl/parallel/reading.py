"""Work on the host that runs ahead of the devices."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

_PATIENCE = 10.0  # seconds for the item that is being made when nobody reads any more


def prefetch(iterator: Iterable[Any], depth: int = 2) -> Iterator[Any]:
    """Runs an iterator in a thread of its own, `depth` items ahead.

    An exception in it is raised where the item would have come.  Whoever closes this waits some
    seconds for the thread, which closes the iterator: what that started, such as processes, has
    then ended.

    Raises:
      ValueError: With the first item, if `depth` is below 1, which a queue takes for no limit.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    items: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def offer(entry) -> None:
        while not stop.is_set():
            try:
                return items.put(entry, timeout=0.1)  # not for ever: the reader may be gone
            except queue.Full:
                continue

    def work():
        try:
            for item in iterator:
                offer((item, None))
                if stop.is_set():
                    return
            offer((None, StopIteration()))
        except BaseException as error:
            offer((None, error))
        finally:
            # Here and not by the garbage collector: at Python's end that comes after the modules
            # that the iterator needs to end its processes.
            if hasattr(iterator, "close"):
                with contextlib.suppress(Exception):  # nobody is there to be told
                    iterator.close()

    # A daemon, so that a process which ends does not wait for ever for what nobody reads.
    thread = threading.Thread(target=work, daemon=True, name="prefetch")
    thread.start()
    try:
        while True:
            item, error = items.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        if thread is not threading.current_thread():  # the collector runs in any thread
            thread.join(_PATIENCE)

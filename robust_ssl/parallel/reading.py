"""Work on the host that runs ahead of the devices."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any


def prefetch(iterator: Iterable[Any], depth: int = 2) -> Iterator[Any]:
    """Runs an iterator in a thread of its own, `depth` items ahead.

    An exception in it is raised where the item would have come.
    """
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

    # A daemon, so that a process which ends does not wait for what nobody reads.
    threading.Thread(target=work, daemon=True, name="prefetch").start()
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

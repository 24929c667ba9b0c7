"""What several processes tell each other without a device, and what they say of a late one.

Decisions of the host (is a file there, has everybody read it) go through JAX's coordination
service, not through the devices.  The first exchange between CPU devices gives up after 30 seconds,
and none of devices can say which process it waits for.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.errors import JaxRuntimeError

PATIENCE = 3600  # seconds that one process waits for another; hosts read large sets at their pace
_SLICE = 2  # seconds between two looks at whether a process has failed
_NOTE_AFTER = 60  # seconds after which is said who is waited for
_PREFIX = "robust_ssl"

_log = logging.getLogger(__name__)
_rounds = itertools.count()  # all processes ask the same questions in the same order


class LostProcessError(RuntimeError):
    """Another process has failed, or did not come to where this one waits for it."""


def client() -> Any:
    """Returns the client of JAX's coordination service; None in a process that is alone."""
    from jax._src import distributed  # JAX has no public name for it; orbax uses it too

    return distributed.global_state.client


def exchange(text: str, patience: float = PATIENCE) -> list[str]:
    """Returns what each process passes, in the order of their numbers.

    All of them have to call it, at the same point.

    Args:
      text: What this one has to say.
      patience: Seconds that it waits for another one.

    Raises:
      LostProcessError: If a process has failed, or does not come.
    """
    if jax.process_count() == 1:
        return [text]
    service, number, own = client(), next(_rounds), jax.process_index()
    service.key_value_set(f"{_PREFIX}/{number}/{own}", text)
    said = [
        text if process == own else wait_for(f"{number}/{process}", process, patience)
        for process in range(jax.process_count())
    ]
    if number > 1:  # who has come this far has read what was said two questions ago
        service.key_value_delete(f"{_PREFIX}/{number - 2}/{own}")
    return said


def wait_for(key: str, process: int, patience: float = PATIENCE) -> str:
    """Returns what a process has put under a key, when it has."""
    begun, noted = time.monotonic(), False
    while True:
        try:
            return client().blocking_key_value_get(f"{_PREFIX}/{key}", 1000 * _SLICE)
        except JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                reason = str(error).splitlines()[0]
                raise LostProcessError(f"process {process} cannot be reached: {reason}") from error
        waited = time.monotonic() - begun
        _raise_if_failed(process)
        if waited > patience:
            raise LostProcessError(
                f"process {process} did not come within {patience:g} s to where the others wait "
                "for it; see what it says itself"
            )
        if waited > _NOTE_AFTER and not noted:
            noted = True
            _log.warning("waiting for process %d, which is %.0f s late", process, waited)


def say_failed(reason: str) -> None:
    """Tells the other processes that this one ends, so that they do not wait for it."""
    if client() is not None:
        put(f"failed/{jax.process_index()}", reason)


def _raise_if_failed(process: int) -> None:
    reason = look(f"{_PREFIX}/failed/{process}")
    if reason is not None:
        raise LostProcessError(f"process {process} has failed: {reason}")


def look(key: str) -> str | None:
    """Returns what is under a key of the coordination service, None where nothing is."""
    try:
        return client().key_value_try_get(key)
    except JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def put(key: str, text: str) -> None:
    """Puts a text under a key, where `wait_for` finds it."""
    client().key_value_set(f"{_PREFIX}/{key}", text, allow_overwrite=True)


def everywhere(ok: bool) -> bool:
    """Returns whether something holds in all processes, so that all take the same turn.

    All of them have to ask, at the same point: one that turned off would leave the others waiting.
    """
    return "no" not in exchange("yes" if ok else "no")


def first_process(numbers: Sequence[int]) -> list[int]:
    """Returns what the first process passes to all of them: whole numbers."""
    if jax.process_count() == 1:
        return list(numbers)
    first = exchange(",".join(map(str, numbers)))[0]
    return [int(number) for number in filter(None, first.split(","))]


def barrier(name: str) -> None:
    """Waits until all processes are here; `name` is the place, for whoever reads the code."""
    del name
    exchange("")

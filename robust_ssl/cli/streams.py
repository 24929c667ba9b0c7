"""Standard output and error of a command that runs for days: what of them fails, and at whose cost.

A terminal goes, a disk with the log is full, a scheduler starts a command without either.  None of
it may end a training.  So lines are written as far as that goes; what was lost is said at the end.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from robust_ssl import words

_NAMES = ("stdout", "stderr")


class LenientStream:
    """A stream whose failed writes are remembered in place of raised.

    A reader that has left is no failure: `BrokenPipeError` is raised, as everywhere.

    Attributes:
      error: Why the first lost write failed, or None.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes a text, if that is possible."""
        self._try(self._stream.write, text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Writes texts, if that is possible."""
        self._try(self._stream.writelines, lines)

    def flush(self) -> None:
        """Hands over what was written, if that is possible."""
        self._try(self._stream.flush)

    def _try(self, call: Any, *arguments: Any) -> None:
        try:
            call(*arguments)
        except BrokenPipeError:
            raise
        except OSError as error:
            self.error = self.error or error


def open_closed() -> None:
    """Gives what the process was started without a stream that keeps nothing.

    The numbers 1 and 2 too: the next file that is opened would have them, and libraries in C write
    their lines to these numbers, so to the middle of that file.
    """
    for number, name in enumerate(_NAMES, start=1):
        if getattr(sys, name) is None:
            with contextlib.suppress(OSError):
                _fill(number)
            nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (to the end)
            setattr(sys, name, nowhere)


def _fill(number: int) -> None:
    try:
        os.fstat(number)
    except OSError:  # closed: nothing of ours has taken it
        nowhere = os.open(os.devnull, os.O_WRONLY)
        if nowhere != number:
            os.dup2(nowhere, number)
            os.close(nowhere)
        os.set_inheritable(number, True)  # for the processes that read data


def make_lenient() -> tuple[LenientStream, LenientStream]:
    """Has both streams remember what they cannot write, and returns them.

    For a process that is the command's own: the streams stay so to its end, at which Python writes
    what is left.
    """
    sys.stdout, sys.stderr = LenientStream(sys.stdout), LenientStream(sys.stderr)
    return sys.stdout, sys.stderr


def say_lost(out: LenientStream, log: LenientStream, either: bool) -> None:
    """Says what could not be written, where that can be.

    Args:
      out: Standard output.
      log: Standard error.
      either: Whether standard output may tell of the log; not where a program may read it.
    """
    if out.error is not None:
        words.say(f"robust-ssl: error: standard output cannot be written: {_why(out.error)}", log)
    if log.error is None:
        return
    text = f"robust-ssl: lines were lost: standard error cannot be written: {_why(log.error)}"
    log.error = None
    words.say(text, log)
    if log.error is not None and either:
        words.say(text, out)


def _why(error: OSError) -> str:
    return error.strerror or str(error)


def silence() -> None:
    """Has Python not try once more at its end to write for a reader that has left, and say so."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

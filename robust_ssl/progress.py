"""What a person sees while a stage runs, and how she stops it.

On a terminal this is one bar, elsewhere one line every few seconds.  Neither makes the host wait
for the devices: a loss is shown once it is there, which may be some steps later.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

MODES = ("auto", "bar", "log", "quiet")
BAR_SECONDS = 0.5
LOG_SECONDS = 5.0

_mode = "auto"
_stop = threading.Event()
# Far above any step number, by which orbax asks JAX the same question when it saves.
_looks = itertools.count(1 << 30)


class Stopped(Exception):  # noqa: N818 (no error: the state is saved, the run goes on later)
    """A stage was asked to stop, and its state is on disk."""


def set_mode(mode: str) -> None:
    """Says how stages report from now on.

    Args:
      mode: ``"auto"`` (a bar on a terminal, lines elsewhere), ``"bar"``, ``"log"`` or ``"quiet"``.

    Raises:
      ValueError: If the mode is another.
    """
    global _mode
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    _mode = mode


def request_stop() -> None:
    """Asks the running stage to save its state after the current step and to stop."""
    _stop.set()


def stop_requested() -> bool:
    """Whether somebody asked to stop; a stage looks after every step.

    Several processes all look at the same points, and a SIGTERM to one of them is answered by all
    at the same one, a little later.
    """
    if _stop.is_set():
        return True
    from jax.experimental import multihost_utils  # this module does without JAX until then

    return multihost_utils.reached_preemption_sync_point(next(_looks))


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


@dataclasses.dataclass(frozen=True)
class Progress:
    """How stages report.

    Attributes:
      mode: One of `MODES`; None for what `set_mode` said last.

    Example:
      >>> with Progress("quiet").stage("stage1", total_steps=2, images_per_step=8) as bar:
      ...     for step in range(2):
      ...         bar.update(step + 1, loss=jnp.float32(step))
      >>> bar.finished_steps, bar.loss
      (2, 1.0)
    """

    mode: str | None = None

    @contextlib.contextmanager
    def stage(
        self, name: str, total_steps: int, images_per_step: int = 0, start_step: int = 0
    ) -> Iterator[Bar]:
        """Reports on one stage.

        Args:
          name: What the line begins with.
          total_steps: Number of steps of the whole stage.
          images_per_step: Global batch size; 0 for work that has no images.
          start_step: Steps already done, in a stage that goes on from a checkpoint.

        Yields:
          The bar; call ``bar.update(steps_done, loss=...)`` after every step.
        """
        display = _display(self.mode or _mode)
        bar = Bar(name, total_steps, images_per_step, start_step, display)
        try:
            yield bar
            bar.finish()
        finally:
            display.close()


class Bar:
    """What is known of a running stage; `Progress.stage` makes it.

    Attributes:
      finished_steps: Steps known to be computed, not only sent to the devices.
      loss: The latest loss known, or None.
    """

    def __init__(self, name: str, total: int, images_per_step: int, start_step: int, display: Any):
        self.name, self.total, self.images_per_step = name, total, images_per_step
        self.display = display
        self.finished_steps = start_step
        self.loss: float | None = None
        self._begun = time.monotonic()
        self._due = self._begun + display.seconds
        self._losses: collections.deque = collections.deque(maxlen=64)
        # (time, steps) of late refreshes: the rate leaves out compiling, and follows changes.
        self._marks: collections.deque = collections.deque(maxlen=20)

    def update(self, step: int, loss: Any = None) -> None:
        """Notes that `step` steps have been sent off; shows it when a refresh is due.

        Args:
          step: How many steps of the stage there have been, this one included.
          loss: Scalar array or float, kept until it can be read without waiting; None where a
            step is known to be over when it returns.
        """
        self._losses.append((step, loss))
        if not self._marks:  # the first step to end is where measuring begins
            self._read_finished()
        now = time.monotonic()
        if now >= self._due:
            self._due = now + self.display.seconds
            self._read_finished()
            self.display.show(self)

    def finish(self) -> None:
        """Waits for the last loss and shows the end of the stage."""
        if self._losses:
            self.finished_steps, loss = self._losses[-1]
            self._take(loss)
        self.display.end(self)

    @property
    def rate(self) -> float | None:
        """Steps a second of late, or None before two steps have ended."""
        if len(self._marks) < 2:
            return None
        (begun, first), (now, last) = self._marks[0], self._marks[-1]
        return (last - first) / (now - begun) if now > begun and last > first else None

    @property
    def seconds_left(self) -> float | None:
        """Estimated time to the last step, seconds."""
        return (self.total - self.finished_steps) / self.rate if self.rate else None

    @property
    def seconds(self) -> float:
        """Time since the stage began, seconds."""
        return time.monotonic() - self._begun

    def describe(self) -> str:
        """Returns rate, loss and time left, as far as they are known."""
        parts = []
        if self.rate and self.images_per_step:
            parts.append(f"{self.rate * self.images_per_step:,.0f} images/s")
        elif self.rate:
            parts.append(f"{self.rate:.3g} steps/s")
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4g}")
        if self.seconds_left is not None:
            parts.append(f"{_duration(self.seconds_left)} left")
        return ", ".join(parts)

    def _read_finished(self) -> None:
        for steps, loss in reversed(self._losses):
            if not hasattr(loss, "is_ready") or loss.is_ready():
                if steps > self.finished_steps or not self._marks:
                    self._marks.append((time.monotonic(), steps))
                self.finished_steps = max(steps, self.finished_steps)
                self._take(loss)
                return

    def _take(self, loss: Any) -> None:
        self.loss = self.loss if loss is None else float(loss)


def _display(mode: str) -> Any:
    if mode == "auto":
        mode = "bar" if sys.stderr.isatty() else "log"
    return {"bar": _Terminal, "log": _Lines, "quiet": _Nothing}[mode]()


class _Nothing:
    seconds = float("inf")

    def show(self, bar: Bar) -> None:
        pass

    def end(self, bar: Bar) -> None:
        pass

    def close(self) -> None:
        pass


class _Lines(_Nothing):
    def __init__(self):
        self.seconds = LOG_SECONDS

    def show(self, bar: Bar) -> None:
        known = bar.describe() or f"{_duration(bar.seconds)} so far"
        _say(f"{bar.name}: step {bar.finished_steps}/{bar.total}, {known}")

    def end(self, bar: Bar) -> None:
        loss = "" if bar.loss is None else f", loss {bar.loss:.4g}"
        _say(
            f"{bar.name}: {bar.finished_steps}/{bar.total} steps in {_duration(bar.seconds)}{loss}"
        )


class _Terminal(_Lines):
    def __init__(self):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.seconds = BAR_SECONDS
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[known]}"),
            console=Console(stderr=True),
            auto_refresh=False,
            transient=True,  # the line at the end stays instead
        )
        self._task = None
        self._progress.start()

    def show(self, bar: Bar) -> None:
        known = bar.describe() or f"{_duration(bar.seconds)} so far"
        if self._task is None:
            self._task = self._progress.add_task(bar.name, total=bar.total, known=known)
        self._progress.update(self._task, completed=bar.finished_steps, known=known, refresh=True)

    def end(self, bar: Bar) -> None:
        self.close()
        super().end(bar)

    def close(self) -> None:
        self._progress.stop()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    """Returns ``42 s``, ``3:05`` (minutes) or ``2:03:05`` (hours)."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

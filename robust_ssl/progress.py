"""What a person sees while a stage runs.

On a terminal and in a notebook this is one bar.  Elsewhere it is a line every few seconds where
there is news, and a sign of life every minute where there is none.  Neither makes the host wait
for the devices: a loss is shown once it is there, which may be some steps later.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator
from typing import Any

from robust_ssl import words

MODES = ("auto", "bar", "log", "quiet")
BAR_SECONDS = 0.5
LOG_SECONDS = 5.0
HEARTBEAT_SECONDS = 60.0  # between two lines that say the same
SLOW = 0.1  # steps a second below which seconds per step are easier to read

_mode = "auto"


def set_mode(mode: str) -> None:
    """Says how stages report from now on.

    Args:
      mode: ``"auto"`` (a bar on a terminal or in a notebook, lines elsewhere), ``"bar"``,
        ``"log"`` or ``"quiet"``.

    Raises:
      ValueError: If the mode is another.
    """
    global _mode
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    _mode = mode


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

    def __post_init__(self):
        if self.mode is not None and self.mode not in MODES:
            raise ValueError(f"progress must be one of {MODES}, got {self.mode!r}")

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
          The bar; call ``bar.update(steps_done, loss=..., doing=...)`` after every step, and
          within a long one.
        """
        display = _display(self.mode or _mode)
        bar = Bar(name, total_steps, images_per_step, start_step, display)
        try:
            yield bar
            bar.finish()
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(f"at step {bar.finished_steps} of {total_steps} of {name}")
            raise
        finally:
            display.close()


class Bar:
    """What is known of a running stage; `Progress.stage` makes it.

    Attributes:
      finished_steps: Steps known to be computed, not only sent to the devices.
      sent: Steps sent off, which is more until they are looked at.
      loss: The latest loss known, or None.
      doing: What is being done now, or None.
    """

    def __init__(self, name: str, total: int, images_per_step: int, start_step: int, display: Any):
        self.name, self.total, self.images_per_step = name, total, images_per_step
        self.display = display
        self.finished_steps = self.sent = start_step
        self.loss: float | None = None
        self.doing: str | None = None
        self._begun = self._step_begun = time.monotonic()
        self._due = self._begun + display.seconds
        # Each is a buffer on a device, which lives as long as it is in here.
        self._losses: collections.deque = collections.deque(maxlen=64)
        # (time, steps) of late refreshes: the rate leaves out compiling, and follows changes.
        self._marks: collections.deque = collections.deque(maxlen=20)

    def update(self, step: int | None = None, loss: Any = None, doing: str | None = None) -> None:
        """Notes that `step` steps have been sent off; shows it when a refresh is due.

        Args:
          step: How many steps of the stage there have been, this one included; None is as many as
            before.
          loss: Scalar array or float, kept until it can be read without waiting; None where a
            step is known to be over when it returns.
          doing: What is being done now, for stages whose steps are long and differ.
        """
        self.doing = doing
        self.sent = self.sent if step is None else step
        self._losses.append((self.sent, loss))
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

    @property
    def seconds_of_step(self) -> float:
        """Time since the last step known to be over, seconds."""
        return time.monotonic() - self._step_begun

    def describe(self) -> str:
        """Returns what is being done or the rate, loss and time left, as far as they are known."""
        parts = [self.doing or self._pace()]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4g}")
        if self.seconds_left is not None:
            parts.append(f"{duration(self.seconds_left)} left")
        return ", ".join(filter(None, parts)) or f"{duration(self.seconds)} so far"

    def _pace(self) -> str:
        if not self.rate:
            return ""
        if self.images_per_step:
            return f"{self.rate * self.images_per_step:,.0f} images/s"
        if self.rate < SLOW:
            return f"{1 / self.rate:.3g} s/step"
        return f"{self.rate:.3g} steps/s"

    def _read_finished(self) -> None:
        for steps, loss in reversed(self._losses):
            if not hasattr(loss, "is_ready") or loss.is_ready():  # float() would wait for it
                if steps > self.finished_steps or not self._marks:
                    self._marks.append((time.monotonic(), steps))
                if steps > self.finished_steps:
                    self.finished_steps, self._step_begun = steps, time.monotonic()
                self._take(loss)
                return

    def _take(self, loss: Any) -> None:
        self.loss = self.loss if loss is None else float(loss)


def _display(mode: str) -> Any:
    if mode == "auto":
        mode = "bar" if sys.stderr.isatty() or _in_notebook() else "log"
    if mode == "bar" and _in_notebook():
        return _Notebook()
    return {"bar": _Terminal, "log": _Lines, "quiet": _Nothing}[mode]()


def _in_notebook() -> bool:
    """Whether this is a notebook's kernel; IPython is there only if it has been imported."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


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
        self._news: Any = None
        self._printed = 0.0

    def show(self, bar: Bar) -> None:
        # Long steps are updated many times: "evaluate: step 1/3" once stood there five times.
        news, now = (bar.finished_steps, bar.doing), time.monotonic()
        known = bar.describe()
        if news == self._news:
            if now < self._printed + HEARTBEAT_SECONDS:
                return
            known = ", ".join(
                filter(None, [bar.doing, f"{duration(bar.seconds_of_step)} in this step"])
            )
        self._news, self._printed = news, now
        place = f"{bar.finished_steps} of {bar.total}"
        if not bar.doing:
            place = f"step {bar.finished_steps}/{bar.total}"
        words.say(f"{bar.name}: {place}, {known}")

    def end(self, bar: Bar) -> None:
        words.say(_end(bar))


class _Terminal(_Lines):
    def __init__(self):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        super().__init__()
        self.seconds = BAR_SECONDS
        self._progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[known]}", markup=False),
            console=Console(stderr=True),
            auto_refresh=False,
            transient=True,  # the line at the end stays instead
        )
        self._task = None
        self._progress.start()

    def show(self, bar: Bar) -> None:
        known = words.line(bar.describe())
        if self._task is None:
            name = words.line(bar.name)
            self._task = self._progress.add_task(name, total=bar.total, known=known)
        self._progress.update(self._task, completed=bar.finished_steps, known=known, refresh=True)

    def end(self, bar: Bar) -> None:
        self.close()
        super().end(bar)

    def close(self) -> None:
        self._progress.stop()


class _Notebook(_Lines):
    """A bar of text under the cell, which is written over as it grows."""

    def __init__(self):
        super().__init__()
        self.seconds = BAR_SECONDS
        self._shown = None

    def show(self, bar: Bar) -> None:
        filled = round(20 * bar.finished_steps / max(bar.total, 1))
        place = f"{'█' * filled}{'░' * (20 - filled)} {bar.finished_steps}/{bar.total}"
        self._write(f"{bar.name} {place} {bar.describe()}")

    def end(self, bar: Bar) -> None:
        self._write(_end(bar))

    def _write(self, line: str) -> None:
        from IPython.display import display

        line = words.line(line)
        if self._shown is None:
            self._shown = display({"text/plain": line}, raw=True, display_id=True)
        else:
            self._shown.update({"text/plain": line}, raw=True)


def _end(bar: Bar) -> str:
    loss = "" if bar.loss is None else f", loss {bar.loss:.4g}"
    return f"{bar.name}: {bar.finished_steps}/{bar.total} steps in {duration(bar.seconds)}{loss}"


def duration(seconds: float) -> str:
    """Returns ``42 s``, ``3:05`` (minutes) or ``2:03:05`` (hours)."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

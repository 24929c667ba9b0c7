"""What a foreign file of weights holds, and what was met while it was looked at."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from robust_ssl import words
from robust_ssl.weights import mapping
from robust_ssl.weights.files import WeightsFile
from robust_ssl.weights.normalization import Normalization


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a file of weights holds and what becomes of it.

    Attributes:
      file: The file as it was read.
      layout: How its tensors are called; None where no layout fits.
      builder: The network's builder in `robust_ssl.models`; None where it is not known.
      options: The builder's options.
      kept: Names in the file of the tensors that are used.
      dropped: How many tensors are left out on purpose, by the part of a model they belong to.
      normalization: What is named, or found beside the weights.
      notes: What one should know and need not act on.
      problems: Why it cannot be converted as it was asked; empty if it can.
    """

    file: WeightsFile
    layout: mapping.Layout | None = None
    builder: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kept: tuple[str, ...] = ()
    dropped: Mapping[str, int] = dataclasses.field(default_factory=dict)
    normalization: Normalization = dataclasses.field(default_factory=Normalization)
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def known_layout(self) -> mapping.Layout:
        """The layout, once it is known that one fits."""
        assert self.layout is not None  # the first thing that is looked for
        return self.layout

    def __str__(self) -> str:
        # Of the file, before anything is widened to float32.
        types = collections.Counter(self.file.tensors[name].dtype.name for name in self.kept)
        numbers = sum(self.file.tensors[name].size for name in self.kept)
        options = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        under = f", under {self.file.found_under!r}" if self.file.found_under else ""
        lines = [
            ("file", f"{self.file.path} ({self.file.format}{under})"),
            ("sha256", self.file.sha256),
            ("layout", f"{self.layout.name}: {self.layout.source}" if self.layout else "unknown"),
            ("network", f"{self.builder}({options})" if self.builder else "unknown"),
            ("kept", f"{len(self.kept)} tensors, {numbers:,} numbers ({', '.join(types)})"),
            ("dropped", ", ".join(f"{k} ({n})" for k, n in self.dropped.items()) or "nothing"),
            ("normalization", str(self.normalization)),
            *(("note", note) for note in self.notes),
            *(("problem", problem) for problem in self.problems),
        ]
        verdict = "cannot be converted like this" if self.problems else "can be converted"
        # What the file says cannot begin a line of its own.
        return "\n".join([*(f"{key:14} {words.line(text)}" for key, text in lines), verdict])


@dataclasses.dataclass
class Report:
    """What is met on the way: what one should know, and what stands in the way."""

    notes: list[str]
    problems: list[str] = dataclasses.field(default_factory=list)

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Goes on after an error, so that one look tells all there is to name."""
        try:
            yield
        except ValueError as error:
            first, *lines = str(error).splitlines()
            # `mapping.join` lists all that does not fit; each line becomes a problem of its own.
            listed = first.endswith("problems:")
            self.problems += [line.strip() for line in lines] if listed else [str(error)]

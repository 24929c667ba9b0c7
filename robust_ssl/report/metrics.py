"""What the stages of a run log, read from outside while it runs or long after."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from robust_ssl.workdir.metrics import lines

# A stage by itself, those of a run, its recipes, and the runs of a zoo.
_PLACES = (
    *("manifest.json", "*/manifest.json", "recipes/*/manifest.json"),
    "runs/*/pretrain/manifest.json",
)


def stage_directories(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the directories in a run that have a manifest, whosoever it is."""
    for pattern in _PLACES:
        for file in sorted(folder.glob(pattern)):
            yield file.parent


def read_metrics(file: pathlib.Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yields number and entry of each line of ``metrics.jsonl``; None for a line that is none.

    A last line without an end is left out: it is being written now, or was cut short by a sudden
    end.  Nothing is yielded where there is no file.
    """
    if file.is_file():
        for number, (line, entry) in enumerate(lines(file), 1):
            if line.endswith(b"\n"):
                yield number, entry


def numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a line by name, those in lists and mappings among them.

    Words, such as the attack that a line is about, become a part of the names.

    Example:
      >>> numbers({"step": 3, "loss": 0.5, "probe": {"knn": 1.0}, "gone": None})
      {'loss': 0.5, 'probe/knn': 1.0}
      >>> numbers({"step": 0, "attack": "ssp", "objective": [1.0, 2.0]})
      {'ssp/objective/0': 1.0, 'ssp/objective/1': 2.0}
    """
    words = [value for value in entry.values() if isinstance(value, str)]
    rest = {name: value for name, value in entry.items() if name != "step"}
    return dict(_leaves(rest, "".join(f"{word}/" for word in words)))


def _leaves(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _leaves(entry, f"{name}{key}/")
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _leaves(entry, f"{name}{index}/")
    elif isinstance(value, int | float) and math.isfinite(value):
        yield name.removesuffix("/"), float(value)

"""``robust-ssl show``: where a run is, also while it runs; nothing is written."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from robust_ssl import disk, settings, words
from robust_ssl.cli.flags import DONE, add_command, add_debug
from robust_ssl.progress import duration

_EXAMPLES = """\
examples:
  robust-ssl show runs/quickstart
      its stages, how far each is, its table and verdict

  robust-ssl show zoo
      the table of a zoo, and the runs behind it"""

_SHOWN = 4  # metrics of the last line


class Stage(NamedTuple):
    """What is known of a stage from its files.

    Attributes:
      name: Its directory, from the run's.
      status: ``done``, ``unfinished``, or why its manifest cannot be read.
      seconds: How long it has been worked on.
      started: When it began, ISO 8601.
      place: The step of how many, as far as that is known.
      news: The last line of its metrics, and how old that is.
    """

    name: str
    status: str
    seconds: float = 0.0
    started: str = ""
    place: str = ""
    news: str = ""


def add_parser(commands: Any) -> None:
    """Adds the command to argparse's `commands`."""
    text = "say where a run is: its stages, its last metrics, its table and verdict"
    command = add_command(commands, "show", text, _EXAMPLES)
    command.add_argument("run", metavar="RUN", help="the --workdir of a run, or a zoo's --out")
    add_debug(command)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Prints where a run is and returns the exit code.

    Raises:
      SettingsError: If the directory is not one of a run.
      WorkdirError: If a version of before wrote it.
    """
    folder = disk.expanded(arguments.run)
    check_run(folder)
    found = sorted(stages(folder), key=lambda stage: (stage.started, stage.name))
    for line in lines(found):
        words.say(line, sys.stdout)
    _print_results(folder)
    return DONE


def check_run(folder: pathlib.Path) -> None:
    """Raises SettingsError unless a directory is a run's or a zoo's, naming those that are near.

    One of an older version is a WorkdirError.
    """
    from robust_ssl.workdir import check_layout

    if not folder.is_dir():
        raise settings.SettingsError(f"there is no directory {folder}{_runs_in(folder.parent)}")
    check_layout(folder)
    if not any(True for _ in stages(folder)) and not (folder / "results.json").is_file():
        raise settings.SettingsError(
            f"{folder} is not the directory of a run: no stage was begun there{_runs_in(folder)}"
        )


def _runs_in(folder: pathlib.Path) -> str:
    if not folder.is_dir():
        return ""
    places = [place for place in sorted(folder.iterdir()) if any(place.glob("*/manifest.json"))]
    return f"; runs near: {', '.join(map(str, places[:8]))}" if places else ""


def stages(folder: pathlib.Path) -> Iterator[Stage]:
    """Yields the stages in a directory, as far as their files can be read."""
    from robust_ssl.report import metrics

    for path in metrics.stage_directories(folder):
        yield from read_stage(folder, path)


def read_stage(folder: pathlib.Path, path: pathlib.Path) -> Iterator[Stage]:
    """Yields what is known of a stage, and of the recipes that failed in it.

    Nothing where the manifest is another program's.
    """
    from robust_ssl.report import metrics
    from robust_ssl.workdir import WorkdirError, read_manifest

    name = path.relative_to(folder).as_posix() if path != folder else path.resolve().name
    try:
        manifest = read_manifest(path)
    except WorkdirError as error:
        if _is_ours(path):
            yield Stage(name, f"cannot be read: {error}")
        return
    file = path / "metrics.jsonl"
    entries = [entry for _, entry in metrics.read_metrics(file) if entry is not None]
    done = manifest["status"] == "done"
    yield Stage(
        name,
        "done" if done else "unfinished",
        manifest["seconds"],
        manifest["started"],
        "" if done else _place(manifest, entries),
        "" if done else _news(entries, file),
    )
    failed = (manifest.get("results") or {}).get("failed") or {}
    for model, why in failed.items() if name == "train" else ():
        yield Stage(f"recipes/{model}", f"failed: {why}", started=manifest["started"])


def _is_ours(path: pathlib.Path) -> bool:
    """Whether a directory with an unreadable manifest is nonetheless a stage's."""
    return any((path / name).exists() for name in ("metrics.jsonl", "checkpoints", "classifier"))


def _place(manifest: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    """Returns ``step 57 of 160``; without a finished epoch nobody has said of how many."""
    if not entries:
        return ""
    done = entries[-1]["step"] + 1
    config = manifest["config"]
    epochs = config.get("recipe", config).get("epochs")
    ends = [entry for entry in entries if isinstance(entry.get("epoch"), int) and entry["epoch"]]
    if not ends or not isinstance(epochs, int):
        return f"step {done:,}"
    per_epoch = (ends[0]["step"] + 1) // ends[0]["epoch"]
    return f"step {done:,} of {epochs * per_epoch:,}"


def _news(entries: Sequence[Mapping[str, Any]], file: pathlib.Path) -> str:
    if not entries:
        return ""
    # Losses come first: they say at once whether something is wrong.
    numbers = {k: v for k, v in entries[-1].items() if isinstance(v, float)}
    names = sorted(numbers, key=lambda name: (name != "loss", "accuracy" not in name))
    shown = [f"{name} {numbers[name]:.4g}" for name in names[:_SHOWN]]
    age = duration(max(0.0, time.time() - os.path.getmtime(file)))
    return ", ".join([*shown, f"written {age} ago"])


def lines(found: Sequence[Stage]) -> list[str]:
    """Returns a line for each stage."""
    width = max((len(stage.name) for stage in found), default=0)
    return [
        "  ".join(
            filter(
                None,
                [
                    stage.name.ljust(width),
                    stage.status.ljust(10),
                    duration(stage.seconds).rjust(8) if stage.seconds else "",
                    stage.place,
                    stage.news,
                ],
            )
        ).rstrip()
        for stage in found
    ]


def _print_results(folder: pathlib.Path) -> None:
    """Prints what a run has concluded; what cannot be read is said and does not hide the rest."""
    from robust_ssl import report

    file = folder / "results.json"
    if file.is_file():
        try:
            document = report.results.read(file)
        except (OSError, ValueError) as error:
            words.say(f"robust-ssl: {file} cannot be read: {error}")
        else:
            report.print_summary(document)
    # A sweep's page and a zoo's table are read as they are.
    pages = ["sweep.md", *(["README.md"] if any(folder.glob("*/encoder.json")) else [])]
    for page in pages:
        if (folder / page).is_file():
            text = (folder / page).read_text(encoding="utf-8").rstrip()
            words.say(f"\n{text}", sys.stdout, margin="")
    for page in ("report.md", "analysis/analysis.md"):
        if (folder / page).is_file():
            words.say(f"everything else: {folder / page}", sys.stdout)

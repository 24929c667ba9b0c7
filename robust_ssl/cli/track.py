"""``robust-ssl track``: metrics of a run to an experiment tracker, now or as they come."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import pathlib
import sys
import time
from typing import Any

from robust_ssl import disk, settings
from robust_ssl.cli.flags import DONE, add_command, add_debug
from robust_ssl.cli.show import check_run

_EXAMPLES = """\
examples:
  robust-ssl track runs/quickstart --to=tensorboard
      then: tensorboard --logdir=runs/quickstart/tensorboard

  robust-ssl track runs/quickstart --to=wandb --project=robustness --follow
      beside a run that goes on, until its stages are done or Ctrl-C

  WANDB_MODE=offline robust-ssl track runs/old --to=wandb
      trackers are told where to write by their own variables

Reads files only, so it works on finished runs and harms none.  What was sent is remembered in
RUN/tracked/, and is not sent twice."""

# Tracker: the sets of packages of which one is needed, whole.
_PACKAGES: dict[str, tuple[tuple[str, ...], ...]] = {
    "wandb": (("wandb",),),
    "trackio": (("trackio",),),
    "mlflow": (("mlflow",),),
    # PyTorch has the module also where the package that it imports is not installed.
    "tensorboard": (("tensorboardX",), ("tensorboard", "torch.utils.tensorboard")),
}
_LONGEST = 86_400  # seconds between two looks
_QUIET = 10  # looks without news after which a run whose stages are done is taken to be over


def add_parser(commands: Any) -> None:
    """Adds the command to argparse's `commands`."""
    text = "send metrics, config and results of a run to an experiment tracker"
    command = add_command(commands, "track", text, _EXAMPLES)
    command.add_argument("run", metavar="RUN", help="the --workdir of a run, or a zoo's --out")
    command.add_argument("--to", required=True, choices=tuple(_PACKAGES), help="which tracker")
    command.add_argument(
        "--project",
        metavar="P",
        help="the tracker's name for a set of runs (default: robust-ssl); for TensorBoard a folder "
        "(default: RUN/tensorboard)",
    )
    command.add_argument("--follow", action="store_true", help="go on while the run goes on")
    command.add_argument(
        "--every",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="how often --follow looks (default: 30)",
    )
    add_debug(command)


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) <= _LONGEST:
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0, at most a day")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Sends what is new, once or until the run is over; returns the exit code.

    Raises:
      SettingsError: If the directory is no run's, or the tracker is not installed.
    """
    folder = disk.expanded(arguments.run)
    check_run(folder)
    _check_installed(arguments.to)
    from robust_ssl.report import trackers

    project = arguments.project or "robust-ssl"
    if arguments.to == "tensorboard":  # however its folder is written, it is one
        project = str(pathlib.Path(arguments.project or folder / "tensorboard").resolve())
    sender = trackers.Sender(folder, arguments.to, project)
    sender.send()
    try:
        if arguments.follow:
            _follow(sender, arguments.every)
    except KeyboardInterrupt:
        print("no longer following; the same command goes on", file=sys.stderr)
    print(f"sent to {arguments.to}: {sender.sent:,} lines", file=sys.stderr)
    return DONE


def _check_installed(tracker: str) -> None:
    if not any(all(map(_is_there, packages)) for packages in _PACKAGES[tracker]):
        raise settings.SettingsError(
            f"{_PACKAGES[tracker][0][0]} is not installed: pip install 'robust-ssl[{tracker}]'"
        )


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ModuleNotFoundError, ValueError):  # of its parent; without a spec, as a test's fake
        return package in sys.modules


def _follow(sender: Any, seconds: float) -> None:
    quiet = 0
    while sender.unfinished() or quiet < _QUIET:
        time.sleep(seconds)
        quiet = 0 if sender.send() else quiet + 1

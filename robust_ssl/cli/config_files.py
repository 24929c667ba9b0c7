"""``robust-ssl config copy``: a shipped config as a file of yours, to be changed."""

from __future__ import annotations

import argparse
import os
import pathlib
from typing import Any

from robust_ssl import disk, settings, shipped, words
from robust_ssl.cli.flags import DONE, add_command, add_debug

_EXAMPLES = """\
examples:
  robust-ssl config copy gen_af
      gen_af.py and what it loads, common.py, in this folder

  robust-ssl config copy gen_af configs/mine.py
      configs/mine.py, and common.py beside it; then `robust-ssl run configs/mine.py --workdir=...`

Nothing is overwritten."""


def add_parser(commands: Any) -> None:
    """Adds the command to argparse's `commands`."""
    command = add_command(commands, "config", "copy a shipped config, to change it", _EXAMPLES)
    actions = command.add_subparsers(dest="action", required=True, metavar="copy")
    text = "write a shipped config, and what it loads, as files of yours"
    copy = add_command(actions, "copy", text, _EXAMPLES)
    copy.add_argument("name", metavar="NAME", help="`robust-ssl list configs` says which")
    copy.add_argument(
        "target",
        nargs="?",
        default=".",
        metavar="DEST",
        help="a folder, or a file that ends in .py (default: this folder)",
    )
    add_debug(copy)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Copies a config and returns the exit code.

    Raises:
      SettingsError: If there is no such config, or a file is in the way.  Nothing is overwritten.
    """
    known = shipped.configs()
    if arguments.name not in known:
        raise settings.SettingsError(
            f"there is no shipped config {arguments.name!r}{settings.near(arguments.name, known)}"
        )
    target = disk.expanded(arguments.target)
    for file in copy(known[arguments.name], target):
        words.say(f"written: {file}")
    return DONE


def copy(source: pathlib.Path, target: pathlib.Path) -> list[pathlib.Path]:
    """Copies a config and what it loads beside it; returns the files that are new.

    Args:
      source: A shipped config.
      target: A folder, or the copy's own name, which ends in ``.py``.

    Raises:
      SettingsError: If a file of another content is in the way, or one cannot be written.
    """
    folder, name = (target.parent, target.name) if target.suffix == ".py" else (target, source.name)
    texts = {folder / name: source.read_bytes()}
    for other in shipped.loaded_beside(source):
        # Its loader asks for it by this name: a copy called so would load itself.
        if folder / other.name in texts:
            raise settings.SettingsError(f"{name} is what {source.stem} loads; take another name")
        texts[folder / other.name] = other.read_bytes()
    # All are looked at before one is written.  A common.py that is the same may be shared.
    new = {file: text for file, text in texts.items() if not _is_there(file, text)}
    if folder / name not in new:
        raise settings.SettingsError(f"{folder / name} is there already; it was left as it is")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in new.items():
            with open(file, "xb") as stream:
                stream.write(text)
    except OSError as error:
        reason = error.strerror or error
        raise settings.SettingsError(f"cannot write to {folder}: {reason}") from error
    return list(new)


def _is_there(file: pathlib.Path, text: bytes) -> bool:
    """Returns whether a file is there with this content; with another it is in the way."""
    if not os.path.lexists(file):
        return False
    if file.is_file() and file.read_bytes() == text:
        return True
    raise settings.SettingsError(
        f"{file} is there already and differs from the shipped one; name another DEST"
    )

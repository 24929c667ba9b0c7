"""What the commands share: how one is added to the command line, and a flag of all."""

from __future__ import annotations

import argparse
from typing import Any


def add_command(commands: Any, name: str, text: str, examples: str) -> argparse.ArgumentParser:
    """Adds a command to argparse's `commands`, with what it does and examples below its flags."""
    return commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_debug(command: argparse.ArgumentParser) -> None:
    """Adds ``--debug``."""
    command.add_argument("--debug", action="store_true", help="show where an error came from")

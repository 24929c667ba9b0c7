"""What the commands share: how one is added to the command line, and a flag of all."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from robust_ssl import words


class Parser(argparse.ArgumentParser):
    """As argparse has it, but what it repeats of the arguments cannot write to the terminal."""

    def error(self, message: str) -> NoReturn:
        """Exits with the message as one line."""
        super().error(words.line(message))

    def _print_message(self, message: str, file: Any = None) -> None:
        # A shell's * gives the names of files, which may hold escape sequences.
        if message:
            words.say(message.rstrip("\n"), file or sys.stderr, margin="")


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

"""What the commands share: exit codes, how one is added, the config and the settings over it."""

from __future__ import annotations

import argparse
import errno
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from robust_ssl import settings, words

DONE, FAILED, USAGE, STOPPED = 0, 1, 2, 75  # 75 is EX_TEMPFAIL of sysexits.h: try again
MISSING = 3  # of what judges: there is not the evidence to say yes or no

# What stands before the "=" of a setting: names, dots, and keys in brackets.  A config with
# arguments, `gen_af:epochs=5`, has a colon there and a file, `a/b=c.py`, a slash.
_KEY = re.compile(r"[A-Za-z_]\w*(?:\.\w[\w-]*|\[[^\]]*\])*=")

NO_PATH = (errno.ENAMETOOLONG, errno.ELOOP)  # nothing can be there, whatever a command looks for


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
    command = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(parser=command)  # whose usage is shown with an error
    return command


def reason(error: Exception) -> str:
    """Returns what an error says, in place of the system's "[Errno 36]" what to do."""
    if isinstance(error, OSError) and error.errno in NO_PATH:
        return f"{error.strerror}: {error.filename}; give a path that can be there"
    return str(error)


def add_debug(command: argparse.ArgumentParser) -> None:
    """Adds ``--debug``."""
    command.add_argument("--debug", action="store_true", help="show where an error came from")


_OWN = ("builder", "preprocess", "head")


def fraction(text: str) -> float:
    """Reads a number or a fraction; for argparse, which keeps no other error's words."""
    try:
        return settings.parse_fraction(text)
    except settings.SettingsError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_own(command: argparse.ArgumentParser) -> None:
    """Adds the flags that name code of somebody's own."""
    own = command.add_argument_group("code of your own", "needed where a card names it")
    for name in _OWN:
        own.add_argument(f"--{name}", metavar="MODULE:NAME", help=f"the {name} that a card names")


def own_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns what these flags were given."""
    named = {name: getattr(arguments, name) for name in _OWN}
    return {name: value for name, value in named.items() if value is not None}


def add_config(command: argparse.ArgumentParser, *, many: bool = False) -> None:
    """Adds the same words for all that read a config; a stage's own settings are in its file.

    Args:
      command: What they are added to.
      many: Whether it takes more than one config.
    """
    command.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG | KEY=VALUE",
        help="a shipped config (`robust-ssl list configs`) or a file, with arguments of its "
        "get_config() after a colon: gen_af:downstream=cifar10; and settings over it: seed=1"
        + ("; more than one config may be given" if many else ""),
    )
    command.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="NAME_OR_FILE[:NAME=VALUE,...]",
        help="the same as the word CONFIG",
    )
    # argparse leaves --config.KEY=VALUE alone; the line below is there to be read.
    command.add_argument_group(
        "settings",
        "KEY=VALUE or --config.KEY=VALUE  replaces one setting of the config, for example "
        "suite.epsilon=8/255; `describe` lists them",
    )
    command.set_defaults(many=many)
    add_debug(command)


def take_settings(
    arguments: argparse.Namespace, unknown: Sequence[str], argv: Sequence[str]
) -> list[str]:
    """Tells settings from configs among what was typed, in place, and refuses the rest.

    Args:
      arguments: What argparse understood.  Where the command reads a config, ``config`` becomes
        its name, or the list of names where it takes many.
      unknown: What argparse left over.
      argv: All that was typed: the last of two settings of one key counts.

    Returns:
      The settings, each as ``--config.KEY=VALUE``.

    Raises:
      SettingsError: If there are settings and the command reads no config.
      SystemExit: With 2, from argparse, for what is neither and where a config is missing.
    """
    reads_config = hasattr(arguments, "words")
    # argparse takes a flag that it does not know for a word where its value has a space.
    left = [*getattr(arguments, "words", ()), *unknown]
    words = [text for text in left if not text.startswith("-")]
    flags = [text for text in left if text.startswith("-")]
    wrong = [text for text in flags if not text.startswith("--config.")]
    if not reads_config:
        wrong += words
    if wrong:
        _refuse(arguments.parser, wrong, reads_config)
    if not reads_config:
        if flags:
            raise settings.SettingsError(f"there is no config here: {' '.join(flags)}")
        return []
    bare = {text for text in words if _KEY.match(text)}
    configs = [*arguments.config, *(text for text in words if text not in bare)]
    arguments.config = _configs(arguments, configs)
    typed = [text for text in argv if text in bare or text in flags]
    # `describe` and errors call a setting `config.seed`, so it may be typed like that.
    return [f"--config.{text.removeprefix('config.')}" if text in bare else text for text in typed]


def _configs(arguments: argparse.Namespace, configs: list[str]) -> str | list[str]:
    if not configs:
        arguments.parser.error("which config? `robust-ssl list configs` says which there are")
    if arguments.many:
        return configs
    if len(configs) > 1:
        arguments.parser.error(
            f"one config, not {len(configs)}: {' '.join(configs)} (settings are KEY=VALUE, "
            "without spaces)"
        )
    return configs[0]


def _refuse(parser: argparse.ArgumentParser, wrong: list[str], reads_config: bool) -> None:
    known = [option for action in parser._actions for option in action.option_strings]
    first = wrong[0].partition("=")[0]
    near = settings.near(first, known) if first.startswith("-") else ""
    hint = " (settings are KEY=VALUE or --config.KEY=VALUE)" if reads_config else ""
    parser.error(f"unknown: {' '.join(wrong)}{near or hint}")

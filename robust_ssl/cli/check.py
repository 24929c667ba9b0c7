"""``robust-ssl describe``: what a config says, without running it."""

from __future__ import annotations

import argparse
from typing import Any

from robust_ssl import settings
from robust_ssl.cli.flags import DONE, add_command, add_config

_EXAMPLES = """\
examples:
  robust-ssl describe quickstart
      every setting and what the functions it names are for"""


def add_parser(commands: Any) -> None:
    """Adds the commands to argparse's `commands`."""
    text = "print a config's settings and what the functions in it do"
    add_config(add_command(commands, "describe", text, _EXAMPLES))


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Prints what was asked and returns the exit code."""
    config = settings.load_config(arguments.config, overrides)
    from robust_ssl import experiment

    print(experiment.describe(config))
    return DONE

"""``robust-ssl completion``: what a shell needs to complete this command line."""

from __future__ import annotations

import argparse
from typing import Any

from robust_ssl import settings, shipped
from robust_ssl.cli.flags import DONE, add_command, add_debug

_EXAMPLES = """\
examples:
  robust-ssl completion bash > ~/.local/share/bash-completion/completions/robust-ssl
  robust-ssl completion zsh > ~/.zfunc/_robust-ssl      (with ~/.zfunc in fpath)
  robust-ssl completion tcsh > ~/.robust-ssl.csh        (and `source` it in ~/.tcshrc)

New shells then complete commands, flags and what they choose from."""

_CONFIGS = """\
_robust_ssl_configs() {{
  compgen -W "{names}" -- $1
  _shtab_compgen_files $1
}}"""


def add_parser(commands: Any) -> None:
    """Adds the command to argparse's `commands`."""
    text = "print completion of commands and flags, for a shell to read"
    command = add_command(commands, "completion", text, _EXAMPLES)
    command.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="whose completion")
    add_debug(command)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Prints the completion of a shell and returns the exit code.

    Raises:
      SettingsError: If shtab, which writes it, is not installed.
    """
    try:
        import shtab
    except ModuleNotFoundError:
        raise settings.SettingsError(
            "completion is written by shtab, which is not installed: "
            "pip install 'robust-ssl[completion]'"
        ) from None
    _mark_paths(arguments.root, shtab)
    preamble = {"bash": _CONFIGS.format(names=" ".join(shipped.configs()))}
    print(shtab.complete(arguments.root, arguments.shell, preamble=preamble))
    return DONE


def _mark_paths(parser: argparse.ArgumentParser, shtab: Any) -> None:
    """Says which words are files, folders or configs, by what they are called in the usage."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _mark_paths(command, shtab)
        elif "CONFIG" in str(action.metavar) or action.dest == "config":
            action.complete = {**shtab.FILE, "bash": "_robust_ssl_configs"}
        elif action.metavar in ("DIR", "RUN", "DEST"):
            action.complete = shtab.DIRECTORY
        elif action.metavar in ("FILE", "NAME_OR_DIR"):
            action.complete = shtab.FILE

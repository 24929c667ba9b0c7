"""The command line: one module beside this one for each group of commands.

JAX is imported only once the arguments are understood, so that help and mistakes are answered at
once, and so that devices are set up before JAX first looks for them.
"""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Sequence

import robust_ssl
from robust_ssl import settings, stopping
from robust_ssl.cli import check, config_files, encoder, run
from robust_ssl.cli.flags import FAILED, STOPPED, USAGE, take_settings

_COMMANDS = {
    "run": run,
    "sweep": run,
    "zoo": run,
    "describe": check,
    "config": config_files,
    "encoder": encoder,
}

_EXAMPLES = """\
examples:
  robust-ssl run quickstart --workdir=runs/quickstart
      the whole job on handwritten digits, offline, without an accelerator

  robust-ssl describe quickstart
      every setting and what the functions it names are for

  robust-ssl COMMAND --help
      more of them

Exit codes: 0 done, 1 failed, 2 wrong usage, 75 stopped by SIGTERM or Ctrl-C (run the same command
again to go on)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
      argv: Arguments without the program's name; None for those of this process.

    Returns:
      0 done, 1 failed, 2 wrong usage, 75 stopped and resumable.

    Raises:
      SystemExit: From argparse, with 2 for flags it does not know and 0 for ``--help``.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments, unknown = _parser().parse_known_args(argv)
    _log_to_stderr()
    try:
        overrides = take_settings(arguments, unknown, argv)
        return _COMMANDS[arguments.command].run(arguments, overrides)
    except KeyboardInterrupt:
        return _say_stopped("interrupted; the last checkpoint is kept")
    except stopping.Stopped as stopped:
        return _say_stopped(str(stopped))
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        return _say_failed(error, _is_usage(error), arguments.debug)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="robust-ssl",
        description="Attacks a pre-trained image encoder, secures a classifier built on it, and "
        "leaves the evidence.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    version = f"robust-ssl {robust_ssl.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in dict.fromkeys(_COMMANDS.values()):
        module.add_parser(commands)
    return parser


def _is_usage(error: Exception) -> bool:
    """Whether the command, the config or the data is wrong, and not the run."""
    if isinstance(error, settings.SettingsError):
        return True
    # Only what has been imported can have raised: asking for more here would cost a second.
    for module, names in (
        ("robust_ssl.experiment.plan", ("UsageError",)),
        ("robust_ssl.workdir", ("ConfigChangedError", "WorkdirError")),
    ):
        loaded = sys.modules.get(module)
        if loaded and isinstance(error, tuple(getattr(loaded, name) for name in names)):
            return True
    return False


def _say_stopped(message: str) -> int:
    print(f"robust-ssl: {message}; run the same command again to go on", file=sys.stderr)
    return STOPPED


def _say_failed(error: Exception, is_usage: bool, debug: bool) -> int:
    kind = "" if is_usage else f"{type(error).__name__}: "
    print(f"robust-ssl: error: {kind}{error}", file=sys.stderr)
    for note in () if is_usage else getattr(error, "__notes__", ()):
        print(note, file=sys.stderr)
    if not (is_usage or debug):
        print("add --debug to see where it came from", file=sys.stderr)
    return USAGE if is_usage else FAILED


class _StderrHandler(logging.Handler):
    """Writes to what `sys.stderr` is now: a progress bar replaces it to stay below the lines."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def _log_to_stderr() -> None:
    logger = logging.getLogger("robust_ssl")
    logger.setLevel(logging.INFO)
    logger.propagate = False  # libraries that set up the root logger would show a line twice
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        logger.addHandler(_StderrHandler())


if __name__ == "__main__":
    sys.exit(main())

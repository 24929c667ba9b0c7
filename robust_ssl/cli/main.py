"""The command line: one module beside this one for each group of commands.

JAX is imported only once the arguments are understood, so that help and mistakes are answered at
once, and so that devices are set up before JAX first looks for them.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import traceback
from collections.abc import Sequence

import robust_ssl
from robust_ssl import settings, stopping, words
from robust_ssl.cli import (
    audit,
    check,
    completion,
    config_files,
    data,
    encoder,
    inspect,
    listing,
    run,
    show,
    streams,
    track,
)
from robust_ssl.cli.flags import (
    DONE,
    FAILED,
    NO_PATH,
    STOPPED,
    USAGE,
    Parser,
    reason,
    take_settings,
)

_COMMANDS = {
    "run": run,
    "sweep": run,
    "zoo": run,
    "describe": check,
    "check": check,
    "show": show,
    "track": track,
    "list": listing,
    "config": config_files,
    "data": data,
    "encoder": encoder,
    "inspect": inspect,
    "audit": audit,
    "completion": completion,
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
      0 done, 1 failed, 2 wrong usage, 3 an audit is not decidable, 75 stopped and resumable.

    Raises:
      SystemExit: From argparse where `argv` is given, with 2 for flags it does not know and 0 for
        ``--help``.
    """
    streams.open_closed()
    if argv is not None:
        return _answer(list(argv), ends_process=False)
    stopping.interrupt_on_sigterm()
    out, log = streams.make_lenient()
    try:
        code = _answer(sys.argv[1:], ends_process=True)
    except SystemExit as end:  # of argparse
        code = end.code
    trains = len(sys.argv) > 1 and _COMMANDS.get(sys.argv[1]) is run
    try:
        out.flush()
        streams.say_lost(out, log, either=trains)  # what others print may be for a program
    except BrokenPipeError:
        streams.silence()
    return FAILED if code == DONE and out.error is not None else code


def _answer(argv: list[str], ends_process: bool) -> int:
    _print_what_can_be()
    try:
        arguments, unknown = _parser().parse_known_args(argv)
    except BrokenPipeError:  # of the help, or of a message
        return _reader_left(DONE)
    arguments.ends_process = ends_process
    trains = getattr(arguments, "trains", False)
    # What trains is not done where its reader leaves: its next call goes on.  Nor may 0 be the
    # answer of a command that answers by its exit code.
    code = STOPPED if trains or getattr(arguments, "decides", False) else DONE
    _log_to_stderr()
    try:
        overrides = take_settings(arguments, unknown, argv)
        code = _COMMANDS[arguments.command].run(arguments, overrides)
        sys.stdout.flush()  # here, where a closed pipe is no error yet
        return code
    except BrokenPipeError:
        return _reader_left(code)
    except KeyboardInterrupt as interrupt:
        where = " ".join(["interrupted", *getattr(interrupt, "__notes__", ())])
        if trains:
            return _say_stopped(f"{where}; the last checkpoint is kept")
        words.say(f"robust-ssl: {where}")
        return STOPPED
    except stopping.Stopped as stopped:
        return _say_stopped(str(stopped))
    except Exception as error:
        _tell_others(error)
        if arguments.debug:
            words.say(traceback.format_exc())
        return _say_failed(error, _is_usage(error), arguments.debug)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
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
    parser.set_defaults(root=parser)  # for what describes the whole command line
    return parser


def _tell_others(error: Exception) -> None:
    """Has other processes end too, in place of waiting for this one."""
    processes = sys.modules.get("robust_ssl.parallel.processes")
    if processes is not None:
        with contextlib.suppress(Exception):  # they may be gone themselves
            processes.say_failed(f"{type(error).__name__}: {error}")


def _is_usage(error: Exception) -> bool:
    """Whether the command, the config or the data is wrong, and not the run."""
    if isinstance(error, settings.SettingsError):
        return True
    if isinstance(error, OSError) and error.errno in NO_PATH:
        return True
    # Only what has been imported can have raised: asking for more here would cost a second.
    for module, names in (
        ("robust_ssl.experiment.plan", ("UsageError",)),
        ("robust_ssl.workdir", ("ConfigChangedError", "WorkdirError")),
        ("robust_ssl.data.pictures", ("UnreadableError",)),
        ("robust_ssl.disk", ("PlaceError", "HomeError")),
    ):
        loaded = sys.modules.get(module)
        if loaded and isinstance(error, tuple(getattr(loaded, name) for name in names)):
            return True
    return False


def _print_what_can_be() -> None:
    """Has a question mark printed for what the terminal's encoding lacks, and no error."""
    for stream in (sys.stdout, sys.stderr):
        # A notebook's streams have neither.
        encoding = getattr(stream, "encoding", None) or "utf-8"
        if hasattr(stream, "reconfigure") and not encoding.lower().startswith("utf"):
            stream.reconfigure(errors="replace")


def _reader_left(code: int) -> int:
    """Ends quietly where who read the output has seen enough, as `head` has."""
    streams.silence()
    return code


def _say_stopped(message: str) -> int:
    words.say(f"robust-ssl: {message}; run the same command again to go on")
    return STOPPED


def _say_failed(error: Exception, is_usage: bool, debug: bool) -> int:
    kind = "" if is_usage else f"{type(error).__name__}: "
    words.say(f"robust-ssl: error: {kind}{reason(error) if is_usage else error}")
    for note in () if is_usage else getattr(error, "__notes__", ()):
        words.say(note)
    if not (is_usage or debug):
        words.say("add --debug to see where it came from")
    return USAGE if is_usage else FAILED


class _StderrHandler(logging.Handler):
    """Writes to what `sys.stderr` is now: a progress bar replaces it to stay below the lines."""

    def emit(self, record: logging.LogRecord) -> None:
        words.say(self.format(record))


def _log_to_stderr() -> None:
    logger = logging.getLogger("robust_ssl")
    logger.setLevel(logging.INFO)
    logger.propagate = False  # libraries that set up the root logger would show a line twice
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        logger.addHandler(_StderrHandler())


if __name__ == "__main__":
    sys.exit(main())

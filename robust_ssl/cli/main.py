"""The command line: ``robust-ssl run``, ``sweep``, ``describe``, ``encoder`` and ``zoo``.

JAX is imported only once the arguments are understood, so that help and mistakes are answered at
once, and so that devices are set up before JAX first looks for them.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import pathlib
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from robust_ssl import progress, settings, stopping
from robust_ssl.cli import encoder
from robust_ssl.cli.flags import add_command, add_debug

DONE, FAILED, USAGE, STOPPED = 0, 1, 2, 75  # 75 is EX_TEMPFAIL of sysexits.h: try again

_EXAMPLES = """\
examples:
  robust-ssl run --config=configs/quickstart.py --workdir=runs/quickstart
      the whole job on handwritten digits, offline, without an accelerator

  robust-ssl run --config=configs/gen_af.py:downstream=cifar10,epsilon=10/255 \\
      --config.recipes.gen_af_stage1.adv_ratio=0.5 --workdir=runs/cifar10
      arguments of the config file after the colon, single settings after --config.

  robust-ssl sweep --config=configs/compare.py:downstream=gtsrb32 --workdir=runs/sweep
      a grid over a recipe's settings: one table, the trade-off, and what to take

  robust-ssl describe --config=configs/quickstart.py
      every setting and what the functions it names are for

  robust-ssl encoder --help
      other people's weights in, secured encoders out

  robust-ssl zoo build --out=zoo --config=configs/pretrain.py:method={byol,dino,swav}
      an encoder from each config, with its log, its card and a table of all (the shell repeats
      --config for each of the names in braces)

The same command again goes on where the last one ended.  Exit codes: 0 done, 1 failed, 2 wrong
usage, 75 stopped by SIGTERM or Ctrl-C (run the same command again to go on)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
      argv: Arguments without the program's name; None for those of this process.

    Returns:
      0 done, 1 failed, 2 wrong usage, 75 stopped and resumable.

    Raises:
      SystemExit: From argparse, with 2 for flags it does not know and 0 for ``--help``.
    """
    parser = _parser()
    arguments, overrides = parser.parse_known_args(argv)
    unknown = [text for text in overrides if not text.startswith("--config.")]
    if unknown:
        parser.error(f"unknown: {' '.join(unknown)} (settings are --config.KEY=VALUE)")
    _log_to_stderr()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a locale may not have every sign
    # As `python -m` does: "my_losses:tilted" means my_losses.py of the working directory.
    sys.path.insert(0, os.getcwd())
    try:
        return _COMMANDS[arguments.command](arguments, overrides)
    except KeyboardInterrupt:
        return _say_stopped("interrupted; the last checkpoint is kept")
    except stopping.Stopped as stopped:
        return _say_stopped(str(stopped))
    except Exception as error:
        _tell_others(error)
        if arguments.debug:
            traceback.print_exc()
        return _say_failed(error, _is_usage(error), arguments.debug)
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(os.getcwd())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="robust-ssl",
        description="Attacks a pre-trained image encoder, secures a classifier built on it, and "
        "leaves the evidence.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="run | sweep | describe | encoder | zoo"
    )
    text = "run a config's stages: finished ones are skipped, an interrupted one goes on"
    _add_run(commands, "run", text)
    text = (
        "train and score every point of config.sweep.grid on validation images; finished points "
        "are kept, impossible ones are named and left out"
    )
    _add_run(commands, "sweep", text)
    text = "print a config's settings and what the functions in it do"
    _add_config(add_command(commands, "describe", text, _EXAMPLES))
    encoder.add_parser(commands)
    zoo = add_command(
        commands, "zoo", "pre-train a list of encoders, each with its card", _EXAMPLES
    )
    actions = zoo.add_subparsers(dest="action", required=True, metavar="build")
    text = (
        "pre-train an encoder for each config; finished ones are kept, an interrupted one goes on"
    )
    build = add_command(actions, "build", text, _EXAMPLES)
    _add_config(build, action="append")
    build.add_argument(
        "--out", required=True, metavar="DIR", help="gets a folder for each encoder, and a table"
    )
    _add_run_flags(build)
    return parser


def _add_run(commands, name: str, text: str) -> None:
    command = add_command(commands, name, text, _EXAMPLES)
    _add_config(command)
    command.add_argument(
        "--workdir", required=True, metavar="DIR", help="where everything is written; made if new"
    )
    _add_run_flags(command)


def _add_config(command: argparse.ArgumentParser, action: str = "store") -> None:
    """The same flags for all that read a config; a stage's own settings are in its file."""
    command.add_argument(
        "--config",
        required=True,
        action=action,
        metavar="FILE[:NAME=VALUE,...]",
        help="the config file; what follows the colon goes to its get_config()"
        + ("; may be given many times" if action == "append" else ""),
    )
    # argparse leaves --config.KEY=VALUE alone; the line below is there to be read.
    command.add_argument_group(
        "settings",
        "--config.KEY=VALUE  replaces one setting of the config, for example "
        "--config.suite.epsilon=8/255; `describe` lists them",
    )
    add_debug(command)


def _add_run_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--devices", type=int, metavar="N", help="how many devices to use (default: all)"
    )
    command.add_argument(
        "--parallel",
        choices=("pmap", "shard_map", "jit"),
        default="pmap",
        help="how a step is spread over devices; results agree (default: pmap)",
    )
    command.add_argument("--no-progress", action="store_true", help="show no progress")
    command.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="where compiled programs are kept for the next run; empty for nowhere "
        "(default: ~/.cache/robust_ssl/xla)",
    )
    cluster = command.add_argument_group(
        "several hosts", "start the same command on every host, with a workdir they all see"
    )
    cluster.add_argument(
        "--distributed",
        action="store_true",
        help="under SLURM, Open MPI, GKE or on Cloud TPU, which say the rest themselves",
    )
    cluster.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    cluster.add_argument("--num-processes", type=int, metavar="N", help="how many processes")
    cluster.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0")


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    several = _check_cluster(arguments)
    with stopping.stop_on_signals(several) as install:
        return _run_config(arguments, overrides, several, install)


def _run_config(
    arguments: argparse.Namespace,
    overrides: list[str],
    several: bool,
    install: Callable[[], None],
) -> int:
    config = settings.load_config(arguments.config, overrides)
    if arguments.command == "sweep":
        if config.get("sweep") is None:
            raise settings.SettingsError(
                f"{arguments.config} has no config.sweep; see configs/compare.py"
            )
        config.stages = ("attack", "sweep")
    layout = _started(arguments, several, install)
    from robust_ssl import experiment

    experiment.run(config, arguments.workdir, parallel=layout)
    print(f"done: {arguments.workdir}", file=sys.stderr)
    return DONE


def _zoo(arguments: argparse.Namespace, overrides: list[str]) -> int:
    several = _check_cluster(arguments)
    configs = [settings.load_config(file, overrides) for file in arguments.config]
    with stopping.stop_on_signals(several) as install:
        layout = _started(arguments, several, install)
        from robust_ssl.cli import zoo

        failures = zoo.build(configs, arguments.out, parallel=layout)
    for name, failure in failures.items():
        print(f"robust-ssl: {name} was not made: {failure}", file=sys.stderr)
    print(pathlib.Path(arguments.out, "README.md").read_text(encoding="utf-8"), end="")
    return FAILED if failures else DONE


def _started(arguments: argparse.Namespace, several: bool, install: Callable[[], None]) -> Any:
    """Starts JAX and progress as the flags say; returns the devices."""
    _start_jax(arguments, several)
    install()  # joining the others has put JAX's handler in place of ours

    import jax

    from robust_ssl import parallel

    try:
        layout = parallel.Parallel.create(num_devices=arguments.devices, kind=arguments.parallel)
    except ValueError as error:
        raise settings.SettingsError(f"--devices: {error}") from None
    quiet = arguments.no_progress or jax.process_index() > 0
    progress.set_mode("quiet" if quiet else "auto")
    return layout


def _describe(arguments: argparse.Namespace, overrides: list[str]) -> int:
    config = settings.load_config(arguments.config, overrides)
    from robust_ssl import experiment

    print(experiment.describe(config))
    return DONE


_COMMANDS = {
    "run": _run,
    "sweep": _run,
    "describe": _describe,
    "encoder": encoder.run,
    "zoo": _zoo,
}


def _check_cluster(arguments: argparse.Namespace) -> bool:
    """Returns whether this is one of several processes; half a set of flags is an error."""
    given = [arguments.coordinator, arguments.num_processes, arguments.process_id]
    some = any(value is not None for value in given)
    if some and None in given:
        raise settings.SettingsError(
            "--coordinator, --num-processes and --process-id belong together: give all three"
        )
    several = some or arguments.distributed
    if several and arguments.devices is not None:
        raise settings.SettingsError("--devices is for one process; several use all they have")
    return several


def _start_jax(arguments: argparse.Namespace, several: bool) -> None:
    """Joins the other processes, gives each core a device and turns the compilation cache on."""
    import jax

    if several:  # first of all: it must come before anything asks for devices
        jax.distributed.initialize(
            arguments.coordinator, arguments.num_processes, arguments.process_id
        )
    from robust_ssl import xla

    xla.use_every_core()
    cache = _cache_directory(arguments.cache_dir)
    if cache:
        xla.use_cache(cache)


def _cache_directory(flag: str | None) -> str | None:
    """Returns where compiled programs are kept, or None where they cannot or shall not be."""
    if flag == "":
        return None
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    named = flag or os.environ.get("JAX_COMPILATION_CACHE_DIR") or f"{home}/robust_ssl/xla"
    try:
        path = pathlib.Path(named).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # it may be there and not be ours
            pass
    except (OSError, RuntimeError) as error:  # no home either; it only costs time
        logging.getLogger(__name__).warning("no compilation cache: %s", error)
        return None
    return str(path)


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
    print(f"robust-ssl: {message}\nrun the same command again to go on", file=sys.stderr)
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

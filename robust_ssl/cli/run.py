"""``robust-ssl run``, ``sweep`` and ``zoo build``: what trains, on all devices.

JAX is imported only once the arguments are understood, so that devices are set up before it first
looks for them.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from robust_ssl import disk, progress, settings, stopping, words
from robust_ssl.cli.flags import DONE, FAILED, add_command, add_config

_EXAMPLES = """\
examples:
  robust-ssl run quickstart --workdir=runs/quickstart
      the whole job on handwritten digits, offline, without an accelerator

  robust-ssl run gen_af:downstream=cifar10,epsilon=10/255 \\
      recipes.gen_af_stage1.adv_ratio=0.5 --workdir=runs/cifar10
      arguments of the config after the colon, single settings as words of their own

  robust-ssl run mine.py seed=1 --workdir=runs/mine
      a file of yours (`robust-ssl config copy gen_af mine.py` to begin with)

  robust-ssl sweep compare:downstream=gtsrb32 --workdir=runs/sweep
      a grid over a recipe's settings: one table, the trade-off, and what to take

  robust-ssl zoo build --out=zoo pretrain:method={byol,dino,swav}
      an encoder from each config, with its log, its card and a table of all (the shell makes
      three words of the names in braces)

The same command again goes on where the last one ended.  Exit codes: 0 done, 1 failed, 2 wrong
usage, 75 stopped by SIGTERM or Ctrl-C (run the same command again to go on)."""


def add_parser(commands: Any) -> None:
    """Adds the commands to argparse's `commands`."""
    text = "run a config's stages: finished ones are skipped, an interrupted one goes on"
    _add_run(commands, "run", text)
    text = (
        "train and score every point of config.sweep.grid on validation images; finished points "
        "are kept, impossible ones are named and left out"
    )
    _add_run(commands, "sweep", text)
    zoo = add_command(
        commands, "zoo", "pre-train a list of encoders, each with its card", _EXAMPLES
    )
    actions = zoo.add_subparsers(dest="action", required=True, metavar="build")
    text = (
        "pre-train an encoder for each config; finished ones are kept, an interrupted one goes on"
    )
    build = add_command(actions, "build", text, _EXAMPLES)
    add_config(build, many=True)
    build.add_argument(
        "--out", required=True, metavar="DIR", help="gets a folder for each encoder, and a table"
    )
    add_run_flags(build)


def _add_run(commands: Any, name: str, text: str) -> None:
    command = add_command(commands, name, text, _EXAMPLES)
    add_config(command)
    command.add_argument(
        "--workdir", required=True, metavar="DIR", help="where everything is written; made if new"
    )
    add_run_flags(command)


def add_run_flags(command: argparse.ArgumentParser) -> None:
    """Adds the flags of everything that trains, and says that it does."""
    command.set_defaults(trains=True)
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


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Runs a config, or the list of them for a zoo, and returns the exit code."""
    several = check_cluster(arguments)
    command = _build_zoo if arguments.command == "zoo" else _run_config
    with stopping.stop_on_signals(several, arguments.ends_process) as install:
        return command(arguments, overrides, lambda: started(arguments, several, install))


def _run_config(
    arguments: argparse.Namespace, overrides: list[str], start: Callable[[], Any]
) -> int:
    workdir = _rooted(arguments, "workdir")
    config = settings.load_config(arguments.config, overrides)
    if arguments.command == "sweep":
        if config.get("sweep") is None:
            raise settings.SettingsError(
                f"{arguments.config} has no config.sweep; the shipped config `compare` has one"
            )
        config.stages = ("attack", "sweep")
    layout = start()
    from robust_ssl import experiment

    experiment.run(config, workdir, parallel=layout)
    words.say(f"done: {arguments.workdir}")
    return DONE


def _build_zoo(
    arguments: argparse.Namespace, overrides: list[str], start: Callable[[], Any]
) -> int:
    out = _rooted(arguments, "out")
    configs = [settings.load_config(file, overrides) for file in arguments.config]
    layout = start()
    from robust_ssl.cli import zoo

    failures = zoo.build(configs, out, parallel=layout)
    for name, failure in failures.items():
        words.say(f"robust-ssl: {name} was not made: {failure}")
    table = (disk.expanded(out) / "README.md").read_text(encoding="utf-8")
    words.say(table.rstrip("\n"), sys.stdout, margin="")
    return FAILED if failures else DONE


def _rooted(arguments: argparse.Namespace, name: str) -> str:
    """Returns the place that a flag names, before a config may change the process's directory."""
    if arguments.cache_dir:
        arguments.cache_dir = disk.rooted(arguments.cache_dir)
    return disk.rooted(getattr(arguments, name))


def started(arguments: argparse.Namespace, several: bool, install: Callable[[], None]) -> Any:
    """Starts JAX and progress as the flags say; returns the devices."""
    _start_jax(arguments, several)
    install()  # joining the others has put JAX's handler in place of ours
    layout = _layout(arguments.devices, arguments.parallel)

    import jax

    quiet = arguments.no_progress or jax.process_index() > 0
    progress.set_mode("quiet" if quiet else "auto")
    return layout


def devices(count: int | None) -> Any:
    """Returns the devices for a command that runs nothing, of which it uses so many; None is all.

    Raises:
      SettingsError: If there are not so many.
    """
    from robust_ssl import xla

    xla.use_every_core()
    return _layout(count)


def _layout(count: int | None, kind: str = "pmap") -> Any:
    from robust_ssl import parallel

    _check_platforms()
    try:
        return parallel.Parallel.create(num_devices=count, kind=kind)
    except ValueError as error:
        raise settings.SettingsError(f"--devices: {error}") from None


def _check_platforms() -> None:
    """Raises if the devices that ``JAX_PLATFORMS`` names are not there; JAX has no words for it."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms, reason = os.environ.get("JAX_PLATFORMS"), str(error).partition("\n")[0]
        # Other errors are of processes that do not find each other, whatever the platform.
        if not platforms or (reason and "Unable to initialize backend" not in reason):
            raise
        way_out = "install '.[cuda12]', or unset it"
        if not {"cuda", "gpu"} & set(platforms.split(",")):
            way_out = "unset it to take what there is"
        raise settings.SettingsError(
            f"JAX_PLATFORMS={platforms}, but JAX finds no such device here: {way_out}"
            + (f" ({reason})" if reason else "")
        ) from error


def check_cluster(arguments: argparse.Namespace) -> bool:
    """Returns whether this is one of several processes; half a set of flags is an error."""
    given = [arguments.coordinator, arguments.num_processes, arguments.process_id]
    some = any(value is not None for value in given)
    if some and None in given:
        raise settings.SettingsError(
            "--coordinator, --num-processes and --process-id belong together: give all three"
        )
    if some:
        _check_place(*given)
    several = some or arguments.distributed
    if several and arguments.devices is not None:
        raise settings.SettingsError("--devices is for one process; several use all they have")
    return several


def _check_place(coordinator: str, processes: int, process: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise settings.SettingsError(
            f"--coordinator={coordinator}: write HOST:PORT, the same for every process"
        )
    if processes < 1 or not 0 <= process < processes:
        raise settings.SettingsError(
            f"--process-id={process} of --num-processes={processes}: processes count from 0 to "
            "one less than their number"
        )


def _start_jax(arguments: argparse.Namespace, several: bool) -> None:
    """Joins the other processes, gives each core a device and turns the compilation cache on."""
    import jax

    if several:  # first of all: it must come before anything asks for devices
        place = (arguments.coordinator, arguments.num_processes, arguments.process_id)
        try:
            jax.distributed.initialize(*place)
        except ValueError as error:
            raise settings.SettingsError(
                "this cluster was not recognized: give --coordinator, --num-processes and "
                f"--process-id ({error})"
            ) from error
    from robust_ssl import xla

    xla.use_every_core()
    # None too: JAX would take what JAX_COMPILATION_CACHE_DIR says, refused or not.
    xla.use_cache(_cache_directory(arguments.cache_dir))


def _cache_directory(flag: str | None) -> str | None:
    """Returns where compiled programs are kept, or None where they cannot or shall not be."""
    if flag == "":
        return None
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    named = flag or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    from robust_ssl import xla

    try:
        path = xla.private_directory(named or f"{home}/robust_ssl/xla", tighten=not named)
        with tempfile.TemporaryFile(dir=path):  # it may be there and not be ours to write
            return path
    except (OSError, RuntimeError) as error:  # no home either; it only costs time
        logging.getLogger(__name__).warning("no compilation cache: %s", error)
        return None

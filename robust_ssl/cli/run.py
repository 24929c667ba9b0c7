"""``robust-ssl run``, ``sweep`` and ``zoo build``: what trains, on all devices.

JAX is imported only once the arguments are understood, so that devices are set up before it first
looks for them.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from robust_ssl import progress, settings, stopping
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
    _add_run_flags(build)


def _add_run(commands: Any, name: str, text: str) -> None:
    command = add_command(commands, name, text, _EXAMPLES)
    add_config(command)
    command.add_argument(
        "--workdir", required=True, metavar="DIR", help="where everything is written; made if new"
    )
    _add_run_flags(command)


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


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Runs a config, or the list of them for a zoo, and returns the exit code."""
    several = _check_cluster(arguments)
    if arguments.command == "zoo":
        return _build_zoo(arguments, overrides, several)
    config = settings.load_config(arguments.config, overrides)
    if arguments.command == "sweep":
        if config.get("sweep") is None:
            raise settings.SettingsError(
                f"{arguments.config} has no config.sweep; the shipped config `compare` has one"
            )
        config.stages = ("attack", "sweep")
    with _started(arguments, several) as layout:
        from robust_ssl import experiment

        experiment.run(config, arguments.workdir, parallel=layout)
    print(f"done: {arguments.workdir}", file=sys.stderr)
    return DONE


def _build_zoo(arguments: argparse.Namespace, overrides: list[str], several: bool) -> int:
    configs = [settings.load_config(file, overrides) for file in arguments.config]
    with _started(arguments, several) as layout:
        from robust_ssl.cli import zoo

        failures = zoo.build(configs, arguments.out, parallel=layout)
    for name, failure in failures.items():
        print(f"robust-ssl: {name} was not made: {failure}", file=sys.stderr)
    print(pathlib.Path(arguments.out, "README.md").read_text(encoding="utf-8"), end="")
    return FAILED if failures else DONE


@contextlib.contextmanager
def _started(arguments: argparse.Namespace, several: bool) -> Iterator[Any]:
    """JAX, progress and signals as the flags say; yields the devices."""
    _start_jax(arguments, several)

    import jax

    from robust_ssl import parallel

    try:
        layout = parallel.Parallel.create(num_devices=arguments.devices, kind=arguments.parallel)
    except ValueError as error:
        raise settings.SettingsError(f"--devices: {error}") from None
    quiet = arguments.no_progress or jax.process_index() > 0
    progress.set_mode("quiet" if quiet else "auto")
    # Among several processes JAX passes a signal on, so that all stop at the same step.
    with contextlib.nullcontext() if several else stopping.stop_on_signals():
        yield layout


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
    # None too: JAX would take what JAX_COMPILATION_CACHE_DIR says, refused or not.
    xla.use_cache(_cache_directory(arguments.cache_dir))


def _cache_directory(flag: str | None) -> str | None:
    """Returns where compiled programs are kept, or None where they cannot or shall not be."""
    if flag == "":
        return None
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    named = flag or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    path = named or pathlib.Path(home) / "robust_ssl" / "xla"
    from robust_ssl import xla

    try:
        return xla.private_directory(path, tighten=not named)
    except OSError as error:  # only costs time
        logging.getLogger(__name__).warning("no compilation cache: %s", error)
        return None

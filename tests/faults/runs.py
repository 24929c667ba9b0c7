"""A small run in a process of its own, which may be killed, stopped or starved, and run again.

Each is forked from a process that has imported everything and has not used JAX: a second or two.
"""

import atexit
import contextlib
import functools
import json
import os
import pathlib
import shutil
import signal
import socket
import sys
import time
import traceback

TESTS = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")

import jax  # noqa: E402 (the paths above come first)
import orbax.checkpoint  # noqa: E402,F401
import tiny_recipes  # noqa: E402,F401

from robust_ssl import experiment, xla  # noqa: E402,F401
from robust_ssl.cli import main  # noqa: E402

CONFIG = """
import tiny_recipes

def get_config():
    stages = {stages}
    config = tiny_recipes.config({{"baseline": tiny_recipes.FROZEN}}, *stages)
    config.suite.attacks = {{"random_noise": tiny_recipes.ATTACKS + "RandomNoise"}}
    config.scoring["adaptive"] = False
    del config.compare
    return config
"""
TRAIN, WHOLE = ("attack", "train"), ("attack", "train", "score")
RECIPE = "recipes/baseline-seed0"
PATIENCE = 300  # seconds after which a run counts as hanging


class Run:
    """A process of the command line.

    Attributes:
      output: The file with what it says.
    """

    def __init__(self, folder, workdir, *, stages=TRAIN, before=None, flags=(), devices=1):
        folder = pathlib.Path(folder)
        config = folder / f"{len(stages)}stages.py"
        if not config.exists():  # another process may be reading it
            config.write_text(CONFIG.format(stages=stages))
        self.output = folder / f"output-{time.monotonic_ns()}.txt"
        arguments = ["run", f"--config={config}", f"--workdir={workdir}", "--no-progress", *flags]
        self.process = os.fork()
        if self.process == 0:
            _child(self.output, before, devices, [*arguments, f"--cache-dir={folder / 'cache'}"])
        self.code = None

    def wait(self, seconds=PATIENCE):
        """Returns the exit code, negative for a signal; one that hangs is killed: None."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.ended():
                return self.code
            time.sleep(0.02)
        self.kill()
        self.code = None
        return None

    def ended(self):
        """Whether it has ended; then `code` is there."""
        if self.code is None:
            process, status = os.waitpid(self.process, os.WNOHANG)
            if process:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def signal(self, number):
        """Sends a signal, if it still runs."""
        if not self.ended():
            os.kill(self.process, number)

    def kill(self):
        """Ends it at once."""
        self.signal(signal.SIGKILL)
        while not self.ended():
            time.sleep(0.01)

    @property
    def said(self):
        """What it wrote."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""


def _child(output, before, devices, arguments):
    code = 1
    try:
        stream = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        xla.use_every_core = lambda: jax.config.update("jax_num_cpu_devices", devices)
        quick = {"initialization_timeout": 60, "heartbeat_timeout_seconds": 10}
        quick |= {"shutdown_timeout_seconds": 20}
        jax.distributed.initialize = functools.partial(jax.distributed.initialize, **quick)
        if before is not None:
            before()
        code = main.main(arguments)
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def pair(folder, workdir, *, before=(None, None), **options):
    """Starts two processes of one run."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    flags = (f"--coordinator={address}", "--num-processes=2")
    return [
        Run(folder, workdir, before=before[i], flags=(*flags, f"--process-id={i}"), **options)
        for i in range(2)
    ]


def result(workdir, stages=TRAIN):
    """What a finished run comes to: fingerprints, the log, the figures; not the time it took."""
    workdir = pathlib.Path(workdir)
    found = {}
    for stage in ("attack", RECIPE):
        manifest = json.loads((workdir / stage / "manifest.json").read_text())
        found[stage] = manifest["status"], manifest["fingerprint"]
    lines = (workdir / RECIPE / "metrics.jsonl").read_text().splitlines()
    found["metrics"] = [json.loads(line) for line in lines]
    if "score" in stages:
        document = json.loads((workdir / "results.json").read_text())
        for entry in document["results"]:
            entry.pop("seconds")
        found["results"] = document["results"]
        found["report"] = (workdir / "report.md").exists()
    return found


def finish(folder, workdir, expected, stages=TRAIN, tries=3, **options):
    """Runs the same command until it is done; returns what is wrong, None where nothing is."""
    for _ in range(tries):
        run = Run(folder, workdir, stages=stages, **options)
        if run.wait() == 0:
            break
    else:
        return f"exit code {run.code}: {run.said.strip()[-300:]}"
    with contextlib.suppress(OSError, ValueError, KeyError):
        if result(workdir, stages) == expected:
            return None
    return "the result is another one"


def copy(source, folder, name):
    """Returns a copy of a working directory."""
    target = pathlib.Path(folder) / name
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(source, target)

"""Two processes that talk over loopback: the answer of one, also after one of them was lost."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict

from robust_ssl import weights
from robust_ssl.workdir import read_tree

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
STAGES = (
    *("attack", "recipes/full-seed0", "recipes/gen_af_stage1-seed0"),
    "attack_gen_af_stage1-seed0",
)
SECONDS = 170  # what a run may take before it counts as hanging

CONFIG = """
import tiny

def get_config():
    config = tiny.config("attack", "train", "score")
    everything = {"rates": {"encoder/**": 1e-2, "head/**": 1e-2}, "scored": False}
    config.recipes = {"full": everything, "gen_af_stage1": config.recipes.gen_af_stage1.to_dict()}
    del config.suite.attacks.advencoder, config.compare
    config.suite.curve = ()
    del config.scoring.per_image.attacks.embed
    return config
"""

# The command line as it is, but for the number of devices, for time limits that suit a test, and
# for an accident: "ACT PROCESS MODULE:NAME COUNT" does ACT in PROCESS when MODULE:NAME is called
# for the COUNT-th time.
WORKER = """
import functools, importlib, os, signal, sys, time
import jax
from robust_ssl import xla
from robust_ssl.cli import main

def wrap(place, make):
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    setattr(owner, name, make(getattr(owner, name)))

def accident(act, place, count):
    calls = iter(range(1, 1_000_000))
    def make(function):
        def wrapped(*args, **kwargs):
            if act == "blind" and "/groups/" not in str(args[0]):
                return function(*args, **kwargs)
            call = next(calls)
            if act == "blind":  # an old view of a shared folder: the file is not there yet
                return None if call == count else function(*args, **kwargs)
            if act == "late":
                time.sleep(2)
            if call == count and act in ("SIGKILL", "SIGTERM"):
                os.kill(os.getpid(), getattr(signal, act))
            if act == "SIGTERM":
                time.sleep(1)  # the others hear of it between two steps
            return function(*args, **kwargs)
        return wrapped
    wrap(place, make)

devices = int(sys.argv[1])
xla.use_every_core = lambda: jax.config.update("jax_num_cpu_devices", devices)
jax.distributed.initialize = functools.partial(
    jax.distributed.initialize,
    initialization_timeout=60, heartbeat_timeout_seconds=10, shutdown_timeout_seconds=20,
)
if sys.argv[2]:
    act, place, count = sys.argv[2].split()
    accident(act, place, int(count))
sys.exit(main.main(sys.argv[3:]))
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(folder, workdir, *, devices, accident="", flags=(), config=CONFIG):
    """Starts one process of a run; its output goes to a file."""
    (folder / "tiny_run.py").write_text(config)
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "JAX_PLATFORMS": "cpu",
        "MPLBACKEND": "agg",
        "PYTHONWARNINGS": "default",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is most of it
    }
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES"):
        environment.pop(name, None)
    command = [sys.executable, "-c", WORKER, str(devices), accident, "run", "--debug"]
    command += [f"--config={folder / 'tiny_run.py'}", f"--workdir={workdir}", "--no-progress"]
    output = folder / f"output-{time.monotonic_ns()}.txt"
    with open(output, "w") as stream:
        process = subprocess.Popen(
            [*command, *flags], env=environment, cwd=folder, stdout=stream, stderr=stream
        )
    process.output = output
    return process


def finish(processes):
    """Waits for all; returns exit codes.  What hangs is killed and fails with what all wrote."""
    end = time.monotonic() + SECONDS
    try:
        for process in processes:
            process.wait(max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        pytest.fail(f"a process still ran after {SECONDS} s\n{outputs(processes)}")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [process.returncode for process in processes]


def outputs(processes):
    return "\n".join(
        f"--- process {number}, exit code {one.returncode}:\n{one.output.read_text()[-6000:]}"
        for number, one in enumerate(processes)
    )


def run_pair(folder, workdir, *, accidents=("", ""), devices=1, kind="pmap", config=CONFIG):
    """Runs two processes of `devices` devices each; returns them, ended."""
    address = f"127.0.0.1:{free_port()}"
    processes = [
        start(
            folder,
            workdir,
            devices=devices,
            accident=accidents[number],
            config=config,
            flags=(
                f"--coordinator={address}",
                "--num-processes=2",
                f"--process-id={number}",
                f"--parallel={kind}",
            ),
        )
        for number in range(2)
    ]
    finish(processes)
    return processes


def codes(processes):
    return [process.returncode for process in processes]


def run_one(folder, workdir, *, devices):
    process = start(folder, workdir, devices=devices)
    assert finish([process]) == [0], outputs([process])


def final(workdir, stage):
    """What a stage left, by path."""
    if not stage.startswith("recipes"):
        files = (workdir / stage / "fitted").glob("*.npz")
        return {f"{file.stem}/delta": np.load(file)["delta"] for file in files}
    classifier = weights.load_classifier(workdir / stage, builder=tiny.encoder)
    return flatten_dict(dict(classifier.variables), sep="/")


def results(workdir):
    """The entries and the verdicts of ``results.json``, without the time they took."""
    document = json.loads((workdir / "results.json").read_text())

    def timeless(entry):
        return {key: value for key, value in entry.items() if key != "seconds"}

    verdicts = {model: timeless(verdict) for model, verdict in document["verdicts"].items()}
    return [timeless(entry) for entry in document["results"]], verdicts


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run in one process with two devices."""
    folder = tmp_path_factory.mktemp("one")
    run_one(folder, folder / "run", devices=2)
    return folder / "run"


def assert_same(expected, ours):
    """Exact: a sum of two devices has only one order, so not even the last bit may differ."""
    for stage in STAGES:
        left, right = final(expected, stage), final(ours, stage)
        assert left.keys() == right.keys()
        for path, leaf in left.items():
            np.testing.assert_array_equal(right[path], leaf, err_msg=f"{stage}: {path}")
    assert results(ours) == results(expected)  # counts, accuracies, every check's numbers


def test_two_processes_and_one_agree(one, tmp_path):
    pair = run_pair(tmp_path, tmp_path / "run")
    assert codes(pair) == [0, 0], outputs(pair)
    assert_same(one, tmp_path / "run")
    lines = (tmp_path / "run" / STAGES[2] / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(6))  # one process writes


def test_a_run_survives_what_happens_to_its_processes(one, tmp_path):
    """Each accident in turn; the same command goes on, and the end is that of a quiet run."""
    workdir = tmp_path / "run"
    accidents = (
        # Process 1 dies in the first fine-tuning, at its checkpoint: process 0 must not wait on.
        ("", "SIGKILL robust_ssl.workdir:StageDirectory.save 1"),
        # A SIGTERM to process 1 only, after its second step: both stop, at the same later step.
        ("", "SIGTERM robust_ssl.experiment.loop:stop_requested 2"),
        # Process 0, which writes, dies before it keeps the second group of attacks.
        ("SIGKILL robust_ssl.experiment.groups:_keep 2", ""),
        # Process 1 does not see the group that was kept: both score it again.
        ("", "blind robust_ssl.workdir.arrays:_read_arrays 1"),
    )
    expected = ("lost", "stopped", "lost", "done")
    for accident, outcome in zip(accidents, expected, strict=True):
        pair = run_pair(tmp_path, workdir, accidents=accident)
        text = f"{accident}\n{outputs(pair)}"
        if outcome == "lost":
            assert -signal.SIGKILL in codes(pair), text
            assert 0 not in codes(pair), text
        else:
            assert codes(pair) == ([75, 75] if outcome == "stopped" else [0, 0]), text
    assert_same(one, workdir)


# --- A recipe whose perturbations are a part of the training state ------------------------------

POOL_CONFIG = """
import tiny_recipes

def get_config():
    return tiny_recipes.config({"universal": tiny_recipes.UNIVERSAL})
"""


def test_two_processes_train_against_the_pool_of_one(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    process = start(tmp_path / "one", tmp_path / "one" / "run", devices=2, config=POOL_CONFIG)
    assert finish([process]) == [0], outputs([process])
    pair = run_pair(tmp_path / "two", tmp_path / "two" / "run", config=POOL_CONFIG)
    assert codes(pair) == [0, 0], outputs(pair)
    stage = "recipes/universal-seed0"
    ours, expected = (tmp_path / name / "run" for name in ("two", "one"))
    left, right = final(expected, stage), final(ours, stage)
    assert left.keys() == right.keys()
    for path, leaf in left.items():
        np.testing.assert_array_equal(right[path], leaf, err_msg=path)

    def logged(workdir):
        lines = (workdir / stage / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    assert logged(ours) == logged(expected)  # with the accuracy under the pool's members
    assert [line["step"] for line in logged(ours)] == list(range(6))
    deltas = [
        read_tree(sorted((workdir / stage / "checkpoints").iterdir())[-1])
        for workdir in (ours, expected)
    ]
    ours, theirs = (np.asarray(tree["state"]["variables"]["attack"]["deltas"]) for tree in deltas)
    np.testing.assert_array_equal(ours, theirs)
    assert ours.shape == (4, 8, 8, 3) and 0 < np.abs(ours).max() < 0.04 + 1e-7

"""Two processes stop at one step whenever one is asked, and do not wait for one that has failed."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
PROCESS = """
import signal, sys, time, jax
number, port, workdir, act = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
jax.config.update("jax_num_cpu_devices", 1)
from robust_ssl import parallel, stopping
from robust_ssl.parallel import processes
from robust_ssl.workdir import lock, open_stage
lock._SHARED_WITHIN = 2
with stopping.stop_on_signals(several=True) as install:
    if act == "early" and number == 1:
        signal.raise_signal(signal.SIGTERM)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, number, heartbeat_timeout_seconds=10,
                               shutdown_timeout_seconds=20, initialization_timeout=60)
    if act != "jax":
        install()  # else JAX's own handler takes the signal, as in a program that has no other
    layout = parallel.Parallel.create()
    state = layout.replicate({"w": jax.numpy.zeros(3)})
    try:
        with open_stage(workdir, "s", {}, {}, seed=0) as stage:
            for step in range(1, 40):
                if stopping.stop_requested():
                    print("stopped at", step)
                    break
                if number == 1 and step == 4 and act == "fails":
                    raise ValueError("no such image")
                stage.save(10 * step, state)
                stage.wait()
                if number == 1 and step == 3 and act in ("once", "twice", "jax"):
                    signal.raise_signal(signal.SIGTERM)
                    if act == "twice":
                        signal.raise_signal(signal.SIGTERM)
                time.sleep(0.2 + 0.1 * number)
                parallel.everywhere(True)
    except Exception as error:
        processes.say_failed(str(error))
        print(type(error).__name__, error)
"""


def run(act, *workdirs):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(number), port, str(workdir), act],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, workdir in enumerate(workdirs)
    ]
    try:
        texts = [process.communicate(timeout=300) for process in both]
    finally:
        for process in both:
            process.send_signal(signal.SIGKILL)
    # Gloo writes to standard output too.
    return [out.strip().splitlines()[-1] for out, _ in texts], [err for _, err in texts]


@pytest.mark.parametrize("act", ["once", "twice", "early", "jax"])
def test_both_stop_at_one_step_whenever_one_is_asked(act, tmp_path):
    said, errors = run(act, tmp_path, tmp_path)
    assert said[0] == said[1] and said[0].startswith("stopped at"), (said, errors)


def test_who_does_not_share_the_directory_is_named(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    said, errors = run("", tmp_path / "a", tmp_path / "b")
    for text in said:
        assert text.startswith("WorkdirError process 1 does not see in"), (said, errors)


def test_nobody_waits_for_a_process_that_has_failed(tmp_path):
    said, errors = run("fails", tmp_path, tmp_path)
    assert "ValueError no such image" in said[1], (said, errors)
    assert said[0].startswith("LostProcessError process 1 has failed: no such image"), said

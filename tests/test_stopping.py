"""The first signal is a request, the second one is the usual end."""

import os
import signal
import subprocess
import sys

import pytest

from robust_ssl import stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_the_second_is_the_usual_one(number, capfd):
    before = signal.getsignal(number)
    with stopping.stop_on_signals():
        assert not stopping.stop_requested()
        os.kill(os.getpid(), number)
        assert stopping.stop_requested()
        assert signal.getsignal(number) is before
    assert "stopping after this step" in capfd.readouterr().err
    stopping.clear_stop()
    assert not stopping.stop_requested()


def test_a_log_that_is_full_or_closed_is_no_matter_of_a_signal():
    code = (
        "import os, signal\n"
        "from robust_ssl import stopping\n"
        "with stopping.stop_on_signals():\n"
        "    os.close(2)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert stopping.stop_requested()\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_request_stands_until_it_is_cleared():
    assert not stopping.stop_requested()
    stopping.request_stop()
    assert stopping.stop_requested() and stopping.stop_requested()
    stopping.clear_stop()
    assert not stopping.stop_requested()


def test_a_signal_after_the_end_changes_nothing():
    code = (
        "import atexit, os, signal\n"
        "from robust_ssl import stopping\n"
        "with stopping.stop_on_signals(ends=True): pass\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGTERM)\n"
        "os.kill(os.getpid(), signal.SIGTERM)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0

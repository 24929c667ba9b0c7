"""A short campaign of faults; ``python -m tests.faults --nightly`` is the long one."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_a_short_campaign_is_survived():
    # In a process of its own: it forks, which a process that has used JAX must not.
    command = [sys.executable, "-m", "tests.faults", "--minutes", "0.5"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert "| kill -9 at a random moment | " in ended.stdout

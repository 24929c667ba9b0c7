"""Sudden ends: at random moments, at a file, at a call of the file system, by a signal."""

import os
import random
import signal
import sys
import time

from tests.faults.runs import TRAIN, Run, finish

EVENTS = ("open", "os.rename", "os.replace", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def killed_at_random(case, count):
    """`kill -9` at a random moment of the run."""
    for number in range(count):
        workdir = case.new()
        run = Run(case.folder, workdir)
        time.sleep(random.Random(number).uniform(0.2, 1.1) * case.seconds)
        run.kill()
        yield f"kill {number}", finish(case.folder, workdir, case.expected)


def killed_at_a_file(case, count):
    """`kill -9` before the k-th file gets its name."""
    for number in range(1, count + 1):
        workdir = case.new()

        def before(left=[number]):  # noqa: B006 (one list for one process)
            replace = os.replace

            def counts(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return replace(*args, **kwargs)

            os.replace = counts

        Run(case.folder, workdir, before=before).wait()
        yield f"file {number}", finish(case.folder, workdir, case.expected)


def _dies_at(workdir, number, report=None):
    """Ends the process at its n-th call that touches the working directory."""

    def before():
        calls = [0]

        def hook(event, args):
            if event in EVENTS and args and str(workdir) in str(args[0]):
                calls[0] += 1
                if calls[0] == number:
                    os._exit(9)
                if report is not None:
                    with open(report, "w") as stream:
                        stream.write(str(calls[0]))

        sys.addaudithook(hook)

    return before


def dead_at_a_call(case, every):
    """Death at every n-th call of the file system under the working directory."""
    report = case.folder / "calls.txt"
    workdir = case.new()
    Run(case.folder, workdir, before=_dies_at(workdir, -1, report)).wait()
    for number in range(1, int(report.read_text()) + 1, every):
        workdir = case.new()
        Run(case.folder, workdir, before=_dies_at(workdir, number)).wait()
        yield f"call {number}", finish(case.folder, workdir, case.expected)


def stopped(case, count, signals):
    """SIGTERM at a random moment, once or twice; the run says 75, or had ended."""
    for number in range(count):
        workdir = case.new()
        run = Run(case.folder, workdir)
        time.sleep(random.Random(number).uniform(0.1, 1.0) * case.seconds)
        for _ in range(signals):
            run.signal(signal.SIGTERM)
            time.sleep(0.05)
        code = run.wait()
        fine = (0, 75) if signals == 1 else (0, 75, -signal.SIGTERM)  # twice ends at once
        ended = "\ndone: " in run.said  # the signal came while the process went away
        wrong = None if code in fine or ended else f"exit code {code}: {run.said[-200:]}"
        yield f"signal {number}", wrong or finish(case.folder, workdir, case.expected, TRAIN)

"""``python -m tests.faults [--nightly]``: every kind of fault, a table of tried and survived."""

import argparse
import pathlib
import shutil
import sys
import tempfile
import time

from tests.faults import damage, deaths, machines
from tests.faults.runs import TRAIN, WHOLE, Run, pair, result


class Case:
    """What all trials share: a quiet run and its result.

    Attributes:
      folder: For everything.
      seconds: What a quiet run takes.
      expected: What one comes to.
    """

    def __init__(self, folder, two):
        self.folder, self._count = pathlib.Path(folder), 0
        self.whole = self.folder / "whole"
        self._quiet(self.whole, WHOLE)
        self.expected_whole = result(self.whole, WHOLE)
        begun, workdir = time.monotonic(), self.new()
        self._quiet(workdir, TRAIN)
        self.seconds, self.expected = time.monotonic() - begun, result(workdir)
        self.stopped = self.folder / "stopped"
        run = Run(self.folder, self.stopped, before=machines.stop_after(4))
        assert run.wait() == 75, run.said
        if two:
            begun, workdir = time.monotonic(), self.new()
            codes = [run.wait() for run in pair(self.folder, workdir)]
            assert codes == [0, 0], codes
            self.seconds_of_two = time.monotonic() - begun
            self.expected_of_two = result(workdir)

    def new(self):
        """Returns the path of a new working directory; the one before is removed."""
        shutil.rmtree(self.folder / f"run{self._count}", ignore_errors=True)
        self._count += 1
        return self.folder / f"run{self._count}"

    def _quiet(self, workdir, stages):
        run = Run(self.folder, workdir, stages=stages)
        assert run.wait() == 0, run.said


def campaign(case, nightly):
    """Yields names with their trials."""
    many, few = (200, None) if nightly else (3, 6)
    yield "kill -9 at a random moment", deaths.killed_at_random(case, many)
    yield "kill -9 at the k-th file", deaths.killed_at_a_file(case, 30 if nightly else 3)
    yield "death at a file-system call", deaths.dead_at_a_call(case, 1 if nightly else 40)
    yield "SIGTERM, once", deaths.stopped(case, 40 if nightly else 2, 1)
    yield "SIGTERM, twice", deaths.stopped(case, 20 if nightly else 1, 2)
    yield "a file of a finished run is damaged", damage.of_a_finished_run(case, few)
    yield "a file of a running stage is damaged", damage.of_a_running_one(case, few)
    sizes = (100, 1000, 4000, 8000, 16_000, 64_000) if nightly else (1000, 8000)
    yield "disk full", damage.full_disk(case, sizes)
    yield "compile cache cannot be written", damage.full_cache(case)
    yield "two runs at once", machines.two_at_once(case, (0, 0.5, 2) if nightly else (0.3,))
    yield "homes and locales", machines.homes(case)
    yield "the clock jumps", machines.clocks(case)
    yield "2, then 1, then 4 devices", machines.numbers_of_devices(case)
    if nightly:
        yield "SIGTERM to one of two processes", machines.signals_to_two(case, 20, 1)
        yield "SIGTERM twice to one of two", machines.signals_to_two(case, 10, 2)
        yield "kill -9 of one of two", machines.deaths_of_two(case, 10)
        yield "one of two stands still", machines.suspended(case, 8)
        yield "memory over 4,000 steps", machines.memory(case)
        yield "a log of 1,000,000 lines", machines.many_lines(case)
        yield "100,000 files beside the run", machines.many_files(case)


def run(nightly=False, only="", minutes=None):
    """Runs the campaign; returns rows of name, tried, survived, and what went wrong."""
    rows, failures = [], []
    folder = tempfile.mkdtemp()  # no context: a forked process would remove it when it ends
    try:
        case = Case(folder, nightly)
        kinds = list(campaign(case, nightly))
        for name, trials in kinds:
            if only not in name:
                continue
            tried = survived = 0
            begun = time.monotonic()
            for trial, wrong in trials:
                tried, survived = tried + 1, survived + (wrong is None)
                if wrong is not None:
                    failures.append(f"{name}, {trial}: {wrong}")
                    print("FAILED", failures[-1], file=sys.stderr, flush=True)
                if minutes is not None and time.monotonic() - begun > 60 * minutes / len(kinds):
                    break
            rows.append((name, tried, survived))
            spent = time.monotonic() - begun
            print(f"{name}: {survived} of {tried}, {spent:.0f} s", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return rows, failures


def main():
    """Prints the table; exit code 1 if something was not survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nightly", action="store_true", help="hours, in place of minutes")
    parser.add_argument("--only", default="", help="kinds of fault with this in their name")
    parser.add_argument("--minutes", type=float, help="shared evenly; each kind gets one trial")
    arguments = parser.parse_args()
    rows, failures = run(arguments.nightly, arguments.only, arguments.minutes)
    print("| fault | tried | survived |\n| --- | ---: | ---: |")
    for name, tried, survived in rows:
        print(f"| {name} | {tried} | {survived} |")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

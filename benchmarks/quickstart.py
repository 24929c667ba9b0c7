"""Times the quickstart by stage, compiling and running apart, cold and warm.

    python benchmarks/quickstart.py
    python benchmarks/quickstart.py --config quickstart:size=full --json quickstart.json

Cold has an empty cache of compiled programs, warm the cache that the cold run has left; each is a
process of its own.  Seconds are of the clock.  *Start* is Python, imports, and reading and tracing
the plan; *compile* is what XLA and LLVM take, or reading a program from the cache.  Run it on a
quiet machine: the load before each run is printed beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import pathlib
import subprocess
import sys
import tempfile
import time

COMPILED = "/jax/core/compile/backend_compile_duration"
COLUMNS = ("seconds", "compile", "programs")


class Stages(logging.Handler):
    """Notes when each stage says that it is done."""

    def __init__(self):
        super().__init__()
        self.ends: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Takes the stage's name from its line."""
        if record.msg.startswith("%s: done"):
            self.ends[record.args[0]] = time.time()


def once(config: str, cache: str, workdir: str, begun: float) -> dict[str, dict[str, float]]:
    """Runs the config in this process; returns seconds by stage.

    Args:
      config: As the command line takes it.
      cache: Where compiled programs are kept.
      workdir: Of the run.
      begun: When the process was started, seconds of the clock.
    """
    from robust_ssl import settings, xla

    xla.use_every_core()
    xla.use_cache(cache)
    import jax

    from robust_ssl import experiment, progress

    compiled: list[tuple[float, float]] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: (
            compiled.append((time.time(), seconds)) if name == COMPILED else None
        )
    )
    stages, logger = Stages(), logging.getLogger("robust_ssl")
    logger.setLevel(logging.INFO)
    logger.addHandler(stages)
    planned = experiment.plan(settings.load_config(config))
    ready = time.time()
    with contextlib.redirect_stdout(sys.stderr):
        experiment.run(planned, workdir, progress=progress.Progress("quiet"))
    ends = {"start": ready, **stages.ends, "report": time.time()}
    return by_stage(ends, compiled, begun)


def by_stage(
    ends: dict[str, float], compiled: list[tuple[float, float]], begun: float
) -> dict[str, dict[str, float]]:
    """Returns the seconds of each stage and those of its compilations.

    Example:
      >>> by_stage({"start": 2.0, "attack": 5.0}, [(4.0, 1.5)], 0.0)["attack"]
      {'seconds': 3.0, 'compile': 1.5, 'programs': 1}
    """
    table, last = {}, begun
    for name, end in ends.items():
        spent = [seconds for when, seconds in compiled if last < when <= end]
        table[name] = {"seconds": end - last, "compile": sum(spent), "programs": len(spent)}
        last = end
    return table


def main() -> None:
    """Runs the config cold and warm, each in a fresh process, and prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="quickstart", help="as for robust-ssl run")
    parser.add_argument("--json", metavar="FILE", help="write the tables there too")
    places = ("CACHE", "WORKDIR", "BEGUN")
    parser.add_argument("--once", nargs=3, metavar=places, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        cache, workdir, begun = options.once
        print(json.dumps(once(options.config, cache, workdir, float(begun))))
        return
    tables = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "warm"):
            load = os.getloadavg()[0]
            places = [f"{folder}/cache", f"{folder}/{name}", str(time.time())]
            command = [sys.executable, __file__, "--config", options.config, "--once", *places]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            tables[name] = json.loads(done.stdout)
            show(name, load, tables[name])
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(tables, indent=2), encoding="utf-8")


def show(name: str, load: float, table: dict[str, dict[str, float]]) -> None:
    """Prints a table of seconds."""
    print(f"\n{name} (load before: {load:.1f})\n")
    print("| stage | seconds | compile | rest | programs |\n| --- | ---: | ---: | ---: | ---: |")
    rows = [*table.items(), ("all", {k: sum(row[k] for row in table.values()) for k in COLUMNS})]
    for stage, row in rows:
        rest = row["seconds"] - row["compile"]
        print(
            f"| {stage} | {row['seconds']:.1f} | {row['compile']:.1f} | {rest:.1f} | "
            f"{row['programs']} |"
        )


if __name__ == "__main__":
    main()

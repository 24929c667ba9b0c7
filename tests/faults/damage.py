"""What is on disk is lost, cut or changed; the disk is full."""

import contextlib
import os
import random
import resource
import signal

from tests.faults.runs import TRAIN, WHOLE, Run, copy, finish, result

KINDS = ("deleted", "empty", "cut", "flipped")
_OWN = (".lock",)


def damage(file, kind, random):
    """Does to a file what disks and people do."""
    if kind == "deleted":
        file.unlink()
        return
    content = bytearray(file.read_bytes())
    if kind == "flipped" and content:
        content[random.randrange(len(content))] ^= 1 << random.randrange(7)
    file.write_bytes({"empty": b"", "cut": content[: len(content) // 2]}.get(kind, content))


def trials(source, count):
    """Returns files with a kind of damage: all of them, or `count` that are drawn."""
    files = sorted(f for f in source.rglob("*") if f.is_file() and f.name not in _OWN)
    every = [(file.relative_to(source), kind) for file in files for kind in KINDS]
    if count is None or count >= len(every):
        return every
    return random.Random(0).sample(every, count)


def _judge(case, workdir, name, stages, expected):
    """None where all is well: the result is the same, or the message has the name and a way out."""
    run = Run(case.folder, workdir, stages=stages)
    if run.wait() == 0:
        if name.name == "metrics.jsonl" and "lost, or not what was logged" in run.said:
            return None
        with contextlib.suppress(OSError, ValueError, KeyError):
            if result(workdir, stages) == expected:
                return None
        return "the result is another one, and nothing was said"
    lines = [line for line in run.said.splitlines() if "error:" in line or line.startswith("  ")]
    text = run.said
    named = name.name in text or str(name.parent) in text
    way_out = any(word in text for word in ("remove", "bring", "same command", "copy"))
    if run.code in (1, 2) and named and way_out and len(lines) <= 5:
        return None
    return f"exit code {run.code}: {text[-300:]}"


def of_a_finished_run(case, count):
    """A file of a finished run is deleted, empty, cut, or has another bit."""
    for name, kind in trials(case.whole, count):
        workdir = copy(case.whole, case.folder, "damaged")
        damage(workdir / name, kind, random.Random(str(name)))
        yield f"{name} {kind}", _judge(case, workdir, name, WHOLE, case.expected_whole)


def of_a_running_one(case, count):
    """The same, of a run that was stopped in its training."""
    for name, kind in trials(case.stopped, count):
        workdir = copy(case.stopped, case.folder, "damaged")
        damage(workdir / name, kind, random.Random(str(name)))
        yield f"{name} {kind}", _judge(case, workdir, name, TRAIN, case.expected)


def full_disk(case, sizes):
    """No file may get longer than so many bytes, from the start; later it may again."""
    for size in sizes:
        workdir = case.new()

        def before(size=size):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        run = Run(case.folder, workdir, stages=WHOLE, before=before)
        code, lines = run.wait(), run.said.strip().splitlines()
        last = [i for i, line in enumerate(lines) if "error:" in line][-1:]
        message = lines[last[0] :] if last else []
        wrong = None
        if code == 0:
            wrong = None
        elif code not in (1, 2) or not 0 < len(message) <= 5 or "cannot write /" not in message[0]:
            wrong = f"exit code {code}, {len(message)} lines: {run.said[-400:]}"
        again = finish(case.folder, workdir, case.expected_whole, WHOLE)
        yield f"{size} bytes", wrong or again


def full_cache(case):
    """The compile cache cannot be written: that only costs time."""
    workdir, before = case.new(), lambda: os.environ.update(HOME="/nonexistent")
    flags = ("--cache-dir=/proc/nowhere",)
    yield "cache", finish(case.folder, workdir, case.expected, before=before, flags=flags)

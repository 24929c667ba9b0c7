"""Machines: several processes, homes, clocks, numbers of devices, memory, large directories."""

import json
import os
import random
import signal
import tempfile
import time

from tests.faults.runs import TRAIN, Run, finish, pair, result


def two_at_once(case, gaps):
    """A second run in one working directory is refused while the first one runs."""
    for gap in gaps:
        workdir = case.new()
        first = Run(case.folder, workdir)
        time.sleep(gap)
        second = Run(case.folder, workdir)
        codes = sorted([first.wait(), second.wait()])
        refused = "in use by another run" in first.said + second.said
        wrong = None
        if codes != [0, 2] and codes != [0, 0]:
            wrong = f"exit codes {codes}"
        elif codes == [0, 2] and not refused:
            wrong = f"refused without a reason: {second.said[-200:]}"
        elif result(workdir) != case.expected:
            wrong = "the result is another one"
        yield f"{gap} s apart", wrong


def _moments(count):
    return [random.Random(7 * number).uniform(0.2, 0.9) for number in range(count)]


def signals_to_two(case, count, times):
    """SIGTERM to one of two processes: both stop at one step, and say 75."""
    for number, moment in enumerate(_moments(count)):
        workdir = case.new()
        runs = pair(case.folder, workdir)
        time.sleep(moment * case.seconds_of_two)
        for _ in range(times):
            runs[number % 2].signal(signal.SIGTERM)
            time.sleep(0.2)
        codes = [run.wait() for run in runs]
        # After "done" the work is on disk, and a signal ends a process that goes away anyway.
        ended = any("\ndone: " in run.said for run in runs)
        fine = ended or codes in ([75, 75], [0, 0])
        wrong = None if fine else f"exit codes {codes}: {runs[0].said[-200:]} {runs[1].said[-200:]}"
        yield f"process {number % 2}", wrong or _two_finish(case, workdir)


def deaths_of_two(case, count):
    """One of two processes is killed: the other ends too, and the run goes on later."""
    for number, moment in enumerate(_moments(count)):
        workdir = case.new()
        runs = pair(case.folder, workdir)
        time.sleep(moment * case.seconds_of_two)
        runs[number % 2].kill()
        codes = [run.wait(120) for run in runs]
        hangs = None in codes
        yield (
            f"process {number % 2}",
            (f"exit codes {codes}" if hangs else _two_finish(case, workdir)),
        )


def suspended(case, seconds):
    """One of two processes stands still for a while."""
    workdir = case.new()
    runs = pair(case.folder, workdir)
    time.sleep(0.5 * case.seconds_of_two)
    runs[1].signal(signal.SIGSTOP)
    time.sleep(seconds)
    runs[1].signal(signal.SIGCONT)
    codes = [run.wait() for run in runs]
    yield f"{seconds} s", None if codes == [0, 0] else f"exit codes {codes}: {runs[0].said[-300:]}"


def _two_finish(case, workdir):
    runs = pair(case.folder, workdir)
    codes = [run.wait() for run in runs]
    if codes != [0, 0]:
        return f"then exit codes {codes}: {runs[0].said[-300:]} {runs[1].said[-300:]}"
    return None if result(workdir) == case.expected_of_two else "the result is another one"


def homes(case):
    """No home, one that cannot be written, an old locale."""
    kinds = {
        "no home": {"HOME": None, "XDG_CACHE_HOME": None},
        "a home that is not there": {"HOME": "/proc/nobody", "XDG_CACHE_HOME": None},
        "an old locale": {"LC_ALL": "C", "LANG": "C", "PYTHONIOENCODING": "ascii"},
    }
    for name, changes in kinds.items():

        def before(changes=changes):
            for variable, value in changes.items():
                os.environ.pop(variable, None)
                if value is not None:
                    os.environ[variable] = value

        yield name, finish(case.folder, case.new(), case.expected, before=before)


def clocks(case):
    """The clock jumps a day with every look at it, forth and back, and then no more.

    A save that waits by that clock may fail, and says so; what comes after is as without.
    """

    def before():
        now, jump = time.time, [1]

        def jumps():
            jump[0] *= -1
            return now() + 86_400 * jump[0]

        time.time = jumps

    workdir = case.new()
    run = Run(case.folder, workdir, before=before)
    told = run.wait() == 0 or (run.code == 1 and "the clock was set" in run.said)
    wrong = None if told else f"exit code {run.code}: {run.said[-300:]}"
    yield "a day", wrong or finish(case.folder, workdir, case.expected)


def numbers_of_devices(case):
    """Stopped on two devices, on one again, finished on four."""
    workdir = case.new()
    for devices in (2, 1):
        run = Run(case.folder, workdir, devices=devices, before=stop_after(2))
        if run.wait() != 75:
            yield "2, 1, 4", f"exit code {run.code} on {devices}: {run.said[-300:]}"
            return
    run = Run(case.folder, workdir, devices=4)
    if run.wait() != 0 or "other versions or devices" not in run.said:
        yield "2, 1, 4", f"exit code {run.code}: {run.said[-300:]}"
        return
    steps = [line["step"] for line in result(workdir)["metrics"]]
    yield "2, 1, 4", None if steps == list(range(6)) else f"steps {steps}"


def stop_after(steps):
    """Asks a training to stop after so many steps."""

    def before():
        from robust_ssl.experiment import loop

        left = iter(range(steps - 1, -1, -1))
        loop.stop_requested = lambda: next(left, 0) == 0

    return before


def memory(case, steps=4000):
    """Thousands of steps: memory is flat, within 10 MB, once it is warm."""

    def before():
        import jax
        import jax.numpy as jnp
        import tiny

        from robust_ssl import data, parallel, progress, stopping
        from robust_ssl.experiment import loop
        from robust_ssl.optimizers.finite import no_skips, take_if_finite
        from robust_ssl.types import TrainState
        from robust_ssl.workdir import open_stage

        jax.config.update("jax_num_cpu_devices", 1)
        layout = parallel.Parallel.create()

        def step(state, batch):
            mean = parallel.average(jnp.mean(batch["images"] / 255.0), layout.axis_name)
            w = state.variables["params"]["w"] + mean
            return take_if_finite(
                state, {"params": {"w": w}}, (), {"loss": mean, "gradient_norm": mean}
            )

        pixels, labels = tiny.images(n=64)
        batches = data.Batches(
            data.from_arrays(pixels, labels), 8, seed=0, stage="m", parallel=layout
        )
        state = TrainState(
            jnp.zeros((), jnp.int32), {"params": {"w": jnp.zeros(2)}}, (), no_skips()
        )
        sizes = []

        def at_epoch_end(epoch, variables):
            if epoch % 25 == 0:
                sizes.append(_resident())
            return {}

        with (
            tempfile.TemporaryDirectory() as folder,
            stopping.stop_on_signals(),
            open_stage(folder, "m", {}, {}, seed=0) as stage,
        ):
            loop.train(
                *(stage, state, step, batches),
                epochs=steps // 8,
                parallel=layout,
                progress=progress.Progress("quiet"),
                checkpoint_every=400,
                at_epoch_end=at_epoch_end,
            )
        warm = sizes[len(sizes) // 2]
        print(json.dumps({"grew": (sizes[-1] - warm) / 1e6, "sizes": sizes}))
        os._exit(0 if sizes[-1] - warm < 10e6 else 3)

    run = Run(case.folder, case.new(), before=before)
    code = run.wait()
    yield f"{steps} steps", None if code == 0 else f"exit code {code}: {run.said[-300:]}"


def _resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def many_lines(case, count=1_000_000):
    """A log of a million lines: a resume takes seconds and no memory to speak of."""

    def before():
        from robust_ssl.workdir import open_stage

        with tempfile.TemporaryDirectory() as folder:
            with open_stage(folder, "s", {}, {}, seed=0) as stage:
                pass
            with open(stage.path / "metrics.jsonl", "w") as file:
                file.writelines(f'{{"step": {n}, "loss": 0.5}}\n' for n in range(count))
            size, begun = _resident(), time.monotonic()
            stage.keep_metrics_before(count - 10)
            seconds, grew = time.monotonic() - begun, _resident() - size
            print(seconds, grew)
            os._exit(0 if seconds < 60 and grew < 50e6 else 3)

    run = Run(case.folder, case.new(), before=before)
    yield f"{count:,}", None if run.wait() == 0 else run.said[-300:]


def many_files(case, count=100_000):
    """A working directory with so many files of somebody else's."""
    workdir = case.new()
    (workdir / "mine").mkdir(parents=True)
    for number in range(count):
        (workdir / "mine" / str(number)).touch()
    yield f"{count:,}", finish(case.folder, workdir, case.expected, TRAIN)

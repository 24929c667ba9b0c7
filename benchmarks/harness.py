"""Times the same training step in this package and in plain PyTorch, turn by turn.

Each side lives in a process of its own, compiles and warms up, and then waits.  The sides run in
turns, A B A B, the same number of steps each, so that whatever else the machine does hits both; a
waiting side uses no processor time.  The median round is reported.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

_AHEAD = 3  # steps in flight, as in this package's own training loop
_MEGABYTE = 2**20


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of a comparison, ready to run.

    Attributes:
      run: Goes that many steps further, waits until they are done, returns their seconds.
      images_per_step: Images of the batch (times perturbations, where several are fitted).
      facts: Device, number type and versions, for the report.
      device_memory: Returns the accelerator's peak in bytes; None on a CPU, whose peak is the
        process's own.
    """

    run: Callable[[int], float]
    images_per_step: int
    facts: dict[str, Any]
    device_memory: Callable[[], int | None]


def cores() -> int:
    """Returns how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ---------------------------------------------------------------------------------- the two sides


def start_jax(options: argparse.Namespace):
    """Returns the devices of the JAX side: one for each core on CPU, else one accelerator."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")  # the rest is for torch
    from robust_ssl import parallel, xla

    xla.use_every_core()
    import jax

    count = options.devices
    if count is None and jax.default_backend() != "cpu":
        count = 1
    return parallel.Parallel.create(num_devices=count, kind=options.parallel)


def jax_side(run: Callable[[int], float], images_per_step: int, parallel, options) -> Side:
    """Describes the JAX side."""
    import flax
    import jax
    import jaxlib
    import optax

    import robust_ssl

    device = parallel.devices[0]

    def device_memory():
        return (device.memory_stats() or {}).get("peak_bytes_in_use")

    facts = {
        "platform": "cpu" if device.platform == "cpu" else "accelerator",
        "device": _processor() if device.platform == "cpu" else device.device_kind,
        "devices": len(parallel.devices),
        "method": parallel.kind,
        "dtype": options.dtype,
        "versions": {
            "robust_ssl": robust_ssl.__version__,
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "flax": flax.__version__,
            "optax": optax.__version__,
        },
    }
    return Side(run, images_per_step, facts, device_memory)


def jax_loop(step: Callable, state: Any, batch: Any) -> Callable[[int], float]:
    """Returns the `run` of a compiled ``step(state, batch) -> (state, metrics)``."""
    import jax

    def run(steps: int) -> float:
        nonlocal state
        in_flight: collections.deque = collections.deque()
        begun = time.perf_counter()
        for _ in range(steps):
            state, metrics = step(state, batch)
            in_flight.append(metrics["loss"])
            if len(in_flight) > _AHEAD:
                jax.block_until_ready(in_flight.popleft())
        jax.block_until_ready(state)
        return time.perf_counter() - begun

    return run


@dataclasses.dataclass(frozen=True)
class Torch:
    """Where and how the torch side computes.

    Attributes:
      device: The torch device.
      tuned: `torch.compile`, and on a GPU bfloat16 autocast.
    """

    device: Any
    tuned: bool

    @classmethod
    def start(cls, tuned: bool) -> Torch:
        """Takes the GPU if there is one, and torch's fastest float32 settings."""
        import torch

        torch.manual_seed(0)
        if not torch.cuda.is_available():
            torch.set_num_threads(cores())
            return cls(torch.device("cpu"), tuned)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TensorFloat-32, which is JAX's default
        return cls(torch.device("cuda"), tuned)

    @property
    def dtype(self) -> str:
        """What the networks compute in."""
        return "bfloat16" if self.tuned and self.device.type == "cuda" else "float32"

    def network(self, module):
        """Moves a module to the device, channels last."""
        import torch

        return module.to(self.device, memory_format=torch.channels_last)

    def compiled(self, function):
        """Compiles a module or function on the tuned side; else returns it as it is."""
        import torch

        return torch.compile(function) if self.tuned else function

    def autocast(self):
        """The context of forward passes."""
        import torch

        half = self.dtype == "bfloat16"
        return (
            torch.autocast(self.device.type, torch.bfloat16) if half else contextlib.nullcontext()
        )

    def images(self, array):
        """Puts ``[batch, H, W, 3]`` on the device as ``[batch, 3, H, W]`` with channels last."""
        import torch

        return torch.from_numpy(array).to(self.device).permute(0, 3, 1, 2)

    def side(self, step: Callable[[], Any], images_per_step: int) -> Side:
        """Describes the torch side; `step` makes one update and returns nothing to the host."""
        import torch

        gpu = self.device.type == "cuda"

        def run(steps: int) -> float:
            begun = time.perf_counter()
            for _ in range(steps):
                step()
            if gpu:
                torch.cuda.synchronize()
            return time.perf_counter() - begun

        facts = {
            "platform": "accelerator" if gpu else "cpu",
            "device": torch.cuda.get_device_name() if gpu else _processor(),
            "devices": 1,
            "method": "compile" if self.tuned else "eager",
            "dtype": self.dtype,
            "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        }
        return Side(run, images_per_step, facts, torch.cuda.max_memory_allocated if gpu else _none)


def _none() -> None:
    return None


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------- the processes


def _work(pipe, make: Callable[[Any], Side], options: argparse.Namespace) -> None:
    """What a side's process does: build, warm up, then run whenever it is told to."""
    side = make(options)
    first, second = _wall(side.run), _wall(side.run)
    facts = {**side.facts, "compile_seconds": max(first - second, 0.0)}
    pipe.send(facts | {"images_per_step": side.images_per_step})
    while steps := pipe.recv():
        pipe.send(side.run(steps))
    device = side.device_memory()
    pipe.send(
        {
            "peak_memory_bytes": _process_memory() if device is None else device,
            "peak_memory_of": "process" if device is None else "device",
        }
    )


def _wall(run: Callable[[int], float]) -> float:
    begun = time.perf_counter()
    run(1)
    return time.perf_counter() - begun


def _process_memory() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in KiB


class _Process:
    """A side in a process of its own, seen from outside."""

    def __init__(self, name: str, make: Callable[[Any], Side], options: argparse.Namespace):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other, make, options), daemon=True)
        self._process.start()
        other.close()  # so that a dead process reads as the end of the pipe
        self.facts = self._receive()  # waits until it is warm
        self.seconds: list[float] = []

    def run(self, steps: int) -> None:
        """Runs one round."""
        self._pipe.send(steps)
        self.seconds.append(self._receive() / steps)

    def finish(self) -> dict[str, Any]:
        """Ends the process; returns all that is known about the side."""
        self._pipe.send(0)
        memory = self._receive()
        self._process.join()
        images = self.facts["images_per_step"]
        return {
            **self.facts,
            **memory,
            "seconds_per_step": statistics.median(self.seconds),
            "images_per_second": images / statistics.median(self.seconds),
            "rounds": [images / seconds for seconds in self.seconds],
        }

    def _receive(self):
        try:
            return self._pipe.recv()
        except EOFError:
            raise SystemExit(f"the {self.name} side failed; its messages stand above") from None


# --------------------------------------------------------------------------------- the comparison


def options_of(doc: str, add: Callable[[argparse.ArgumentParser], None] | None = None):
    """Reads the command line: the options of all benchmarks, and those that `add` brings."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    number = functools.partial(parser.add_argument, type=int)
    number("--width", default=64, help="channels of the ResNet-18's first stage (64)")
    parser.add_argument("--stem", default="cifar", choices=("cifar", "cifar_half", "imagenet"))
    number("--batch", default=64, help="images of a step (64)")
    number("--image-size", default=32, help="height and width, pixels (32)")
    number("--steps", default=2, help="steps of a round (2; take 50 on a GPU)")
    number("--rounds", default=5, help="rounds of each side (5)")
    parser.add_argument("--parallel", default="pmap", choices=("pmap", "shard_map", "jit"))
    number("--devices", help="JAX devices (every core on CPU, one accelerator)")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="what the JAX side's encoder computes in",
    )
    parser.add_argument(
        "--tuned",
        action="store_true",
        help="also time torch.compile (with bfloat16 autocast on a GPU)",
    )
    parser.add_argument(
        "--alone", action="store_true", help="time this package's side alone, without torch"
    )
    parser.add_argument("--json", metavar="FILE", help="also write everything measured as JSON")
    if add is not None:
        add(parser)
    options = parser.parse_args()
    if options.alone and options.tuned:
        parser.error("--tuned is of the torch side, which --alone leaves out")
    for name in ("width", "batch", "image_size", "steps", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return options


def compare(
    name: str,
    options: argparse.Namespace,
    make_jax: Callable[[argparse.Namespace], Side],
    make_torch: Callable[..., Side],
) -> dict[str, Any]:
    """Times both sides in turns, prints the table and writes the JSON file.

    Args:
      name: Of the benchmark.
      options: From `options_of`.
      make_jax: ``make_jax(options)`` builds the JAX side, in its own process.
      make_torch: ``make_torch(options, tuned=...)`` builds a torch side, likewise.

    Returns:
      What the JSON file holds.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    makers = {"jax": make_jax}
    if not options.alone:
        makers["torch"] = functools.partial(make_torch, tuned=False)
    if options.tuned:
        makers["torch_tuned"] = functools.partial(make_torch, tuned=True)
    processes = [_Process(side, make, options) for side, make in makers.items()]
    _check_same_kind(processes)
    for _ in range(options.rounds):
        for process in processes:
            process.run(options.steps)
    sides = {process.name: process.finish() for process in processes}
    speed = {side: found["images_per_second"] for side, found in sides.items()}
    report = {
        "benchmark": name,
        "options": {key: value for key, value in vars(options).items() if key != "json"},
        "machine": {
            "system": platform.platform(),
            "python": platform.python_version(),
            "processor": _processor(),
            "cores": cores(),
            "load_before": load,
            "compilation_cache": "JAX_COMPILATION_CACHE_DIR" in os.environ,
        },
        "sides": sides,
        "ratio": {side: speed["jax"] / speed[side] for side in sides if side != "jax"},
    }
    print(_table(report))
    if options.json:
        text = json.dumps(report, indent=2, allow_nan=False) + "\n"
        pathlib.Path(options.json).write_text(text, encoding="utf-8")
    return report


def _check_same_kind(processes: list[_Process]) -> None:
    kinds = {process.name: process.facts["platform"] for process in processes}
    if len(set(kinds.values())) > 1:
        raise SystemExit(
            f"the sides found different machines ({kinds}): install jax and torch for the same "
            "accelerator, or hide it from both with CUDA_VISIBLE_DEVICES= JAX_PLATFORMS=cpu"
        )


def _table(report: dict[str, Any]) -> str:
    options, machine = report["options"], report["machine"]
    lines = [
        f"{report['benchmark']}: " + ", ".join(f"{key} {value}" for key, value in options.items()),
        f"{'side':<12}{'images/s':>10}{'lowest':>10}{'highest':>10}{'s/step':>9}"
        f"{'compile s':>11}{'peak MB':>9}  how",
    ]
    for name, side in report["sides"].items():
        lines.append(
            f"{name:<12}{side['images_per_second']:>10.2f}{min(side['rounds']):>10.2f}"
            f"{max(side['rounds']):>10.2f}{side['seconds_per_step']:>9.3f}"
            f"{side['compile_seconds']:>11.1f}{side['peak_memory_bytes'] / _MEGABYTE:>9.0f}"
            f"  {side['devices']} x {side['device']}, {side['method']}, {side['dtype']}"
        )
    for name, ratio in report["ratio"].items():
        lines.append(f"ratio jax / {name}: {ratio:.2f}")
    versions = {k: v for side in report["sides"].values() for k, v in side["versions"].items()}
    lines.append(", ".join(f"{key} {value}" for key, value in versions.items() if value))
    lines.append(f"{machine['cores']} cores, Python {machine['python']}, {machine['system']}")
    if machine["load_before"] > 0.5 * machine["cores"]:
        lines.append(
            f"the load was {machine['load_before']:.1f} on {machine['cores']} cores before the "
            "start: the machine was busy, and these numbers mean little"
        )
    return "\n".join(lines)

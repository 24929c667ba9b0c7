"""Reading a file of weights: this package's safe reader against torch.load, turn by turn.

Both sides read the same file, a ResNet-50's state dict of random float32 (98 MB), from the page
cache into memory:

- this package: `read_weights`, with its SHA-256, and the checksums that a zip has;
- torch: ``torch.load(weights_only=True)``, or safetensors' own ``load_file``; neither compares
  any sum.

Every round is a fresh process, so that the peak memory is that of one reading.  What counts is from
after the imports until every tensor's numbers are there; peak memory is what comes on top of what
the process had used before.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import tempfile
import time

import harness

FORMATS = ("zip", "legacy", "safetensors")
SIDES = ("robust_ssl", "torch")


def resnet50_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes as torchvision has them, without its counters: 25.6 million numbers."""
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(conv, norm, inputs, outputs, size):
        shapes[f"{conv}.weight"] = (outputs, inputs, size, size)
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{leaf}"] = (outputs,)

    convolution("conv1", "bn1", 3, 64, 7)
    inputs = 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        inner, outer = 64 * 2**stage, 256 * 2**stage
        for block in range(depth):
            name = f"layer{stage + 1}.{block}"
            convolution(f"{name}.conv1", f"{name}.bn1", inputs, inner, 1)
            convolution(f"{name}.conv2", f"{name}.bn2", inner, inner, 3)
            convolution(f"{name}.conv3", f"{name}.bn3", inner, outer, 1)
            if block == 0:
                convolution(f"{name}.downsample.0", f"{name}.downsample.1", inputs, outer, 1)
            inputs = outer
    return shapes | {"fc.weight": (1000, 2048), "fc.bias": (1000,)}


def write_files(folder: pathlib.Path) -> None:
    """Writes one state dict in every format."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    state = {name: torch.randn(shape) for name, shape in resnet50_shapes().items()}
    torch.save(state, folder / "zip")
    torch.save(state, folder / "legacy", _use_new_zipfile_serialization=False)
    save_file(state, folder / "safetensors")


def measure(side: str, file: pathlib.Path, pipe) -> None:
    """Reads a file once, in a process of its own; sends seconds and bytes."""
    read = _robust_ssl() if side == "robust_ssl" else _torch(file.name)
    before, begun = harness._process_memory(), time.perf_counter()
    tensors = read(file)
    for tensor in tensors.values():
        tensor.reshape(-1)[::1024].sum()  # every page is really there, mapped files included
    seconds = time.perf_counter() - begun
    pipe.send({"seconds": seconds, "bytes": harness._process_memory() - before})


def _robust_ssl():
    from robust_ssl.weights.files import read_weights

    return lambda file: read_weights(file).tensors


def _torch(kind: str):
    import torch
    from safetensors.torch import load_file

    if kind == "safetensors":
        return load_file
    return lambda file: torch.load(file, weights_only=True)


def in_a_process(target, *arguments):
    """Runs a function in a fresh process; returns what it sends, if it takes a pipe."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    extra = (theirs,) if target is measure else ()
    process = context.Process(target=target, args=(*arguments, *extra))
    process.start()
    theirs.close()
    sent = ours.recv() if extra else None
    process.join()
    if process.exitcode:
        raise SystemExit(f"{target.__name__} failed; its messages stand above")
    return sent


def compare(folder: pathlib.Path, rounds: int) -> dict:
    """Reads every format `rounds` times on both sides, in turns."""
    report = {}
    for kind in FORMATS:
        found = {side: [] for side in SIDES}
        for _ in range(rounds):
            for side in SIDES:
                found[side].append(in_a_process(measure, side, folder / kind))
        row = {
            side: {
                "seconds": statistics.median(one["seconds"] for one in ones),
                "rounds": [one["seconds"] for one in ones],
                "peak_memory_bytes": statistics.median(one["bytes"] for one in ones),
            }
            for side, ones in found.items()
        }
        ours, theirs = (row[side] for side in SIDES)
        ratio = {key: ours[key] / theirs[key] for key in ("seconds", "peak_memory_bytes")}
        report[kind] = {"file_bytes": (folder / kind).stat().st_size, **row, "ratio": ratio}
    return report


def table(report: dict) -> str:
    """The figures as lines of text."""
    lines = [f"{'file':<14}{'side':<12}{'s':>8}{'lowest':>8}{'highest':>8}{'peak MB':>9}"]
    for kind, row in report.items():
        for side in SIDES:
            figures = row[side]
            lines.append(
                f"{kind:<14}{side:<12}{figures['seconds']:>8.3f}{min(figures['rounds']):>8.3f}"
                f"{max(figures['rounds']):>8.3f}{figures['peak_memory_bytes'] / 2**20:>9.0f}"
            )
        lines.append(
            f"ratio robust_ssl / torch, {kind} of {row['file_bytes'] / 2**20:.0f} MB: "
            f"time {row['ratio']['seconds']:.2f}, "
            f"memory {row['ratio']['peak_memory_bytes']:.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Writes the files, compares, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="readings of each side (5)")
    parser.add_argument("--json", metavar="FILE", help="also write everything measured as JSON")
    options = parser.parse_args()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        in_a_process(write_files, folder)
        report = compare(folder, options.rounds)
    print(table(report))
    print(f"{harness.cores()} cores, load {load:.1f}, {platform.platform()}")
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(report, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()

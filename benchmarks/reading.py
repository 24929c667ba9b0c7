"""Times reading and decoding photographs for training: threads of one process against workers.

    python benchmarks/reading.py
    python benchmarks/reading.py --workers 0 2 8 --images 1024

JPEG files of 500 x 375 pixels, made here, become batches of 64 at 224 x 224, as training reads a
folder that does not fit into memory.  Each kind is timed in turn, three rounds; starting the
processes is not counted.  Nothing else is done with the batches, so a step that takes longer than
a batch never waits.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time

BATCH = 64


def make_pictures(folder: pathlib.Path, count: int) -> None:
    """Writes photographs: the package's own, cut and scaled, so that they compress as such do."""
    from PIL import Image

    from robust_ssl import data

    for i, image in enumerate(data.photo_crops("train", n=count, image_size=128).images):
        file = folder / "train" / str(i % 2) / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize((500, 375), Image.Resampling.LANCZOS).save(file, quality=90)


def rounds_of(folder: pathlib.Path, workers: list[int], rounds: int) -> dict[int, list[float]]:
    """Returns images/s by number of workers, of each round."""
    from robust_ssl import data
    from robust_ssl.parallel import Parallel

    speeds: dict[int, list[float]] = {count: [] for count in workers}
    for _ in range(rounds):
        for count in workers:
            examples = data.load(str(folder), image_size=224, memory_limit=1, workers=count)
            batches = data.Batches(
                *(examples, BATCH),
                seed=0,
                stage="reading",
                parallel=Parallel.create(num_devices=1),
                resident=False,
            )
            first = 2 + 2 * max(count, 1)  # what is prepared while the processes start
            for step in range(first):
                batches(step)
            begun = time.perf_counter()
            steps = 2 * len(examples) // BATCH
            for step in range(first, first + steps):
                batches(step)
            speeds[count].append(steps * BATCH / (time.perf_counter() - begun))
            batches.close()
    return speeds


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        make_pictures(pathlib.Path(folder), arguments.images)
        speeds = rounds_of(pathlib.Path(folder), arguments.workers, arguments.rounds)
    print("| workers | images/s | lowest to highest |\n| ---: | ---: | ---: |")
    for count, found in speeds.items():
        name = count or "threads"
        print(f"| {name} | {statistics.median(found):.0f} | {min(found):.0f} to {max(found):.0f} |")
    print(f"load before the start: {load:.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(speeds))


if __name__ == "__main__":
    main()

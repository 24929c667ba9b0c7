"""Times scoring against the sum of its parts: forward passes, and nothing else.

    python benchmarks/scoring.py
    python benchmarks/scoring.py --width 24 --stem cifar_half --images 2000 --perturbations 8

Under fitted perturbations an image costs one forward pass each, and one without any.  `score` is
timed beside as many bare compiled passes over the same batches, in turn.  Compiling is not counted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np


def sides(options: argparse.Namespace):
    """Returns two functions without arguments: bare passes, and `score`, on the same images."""
    from robust_ssl import attacks, data, evaluation, models, threats
    from robust_ssl.parallel import Parallel

    parallel = Parallel.create()
    encoder = models.resnet18(
        jax.random.key(0), width=options.width, stem=options.stem, image_size=32
    )
    classifier = models.classifier(jax.random.key(1), encoder, 10)
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (options.images, 32, 32, 3), np.uint8)
    examples = data.from_arrays(pixels, random.integers(0, 10, options.images))
    threat = threats.Linf(8 / 255)
    signs = random.choice([-1.0, 1.0], (options.perturbations, 32, 32, 3))
    suite = {
        f"p{i}": attacks.UniversalPerturbation(jnp.float32(8 / 255 * sign), threat)
        for i, sign in enumerate(signs)
    }
    forward = parallel.map(lambda model, batch: model(evaluation.to_pixels(batch["images"])).logits)
    constants = parallel.replicate(classifier)

    def bare():
        for batch in data.epoch_batches(examples, options.batch):
            for _ in range(1 + options.perturbations):
                forward(constants, {"images": batch["images"]})

    def score():
        batches = data.epoch_batches(examples, options.batch)
        evaluation.score(classifier, batches, suite, key=jax.random.key(0), parallel=parallel)

    return bare, score


def main() -> None:
    """Prints images/s of both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=24)
    parser.add_argument("--stem", default="cifar_half")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--perturbations", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    from robust_ssl import xla

    xla.use_every_core()
    both = dict(zip(("bare passes", "score"), sides(options), strict=True))
    for run in both.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in both}
    for _ in range(options.rounds):
        for name, run in both.items():
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    passes = options.images * (1 + options.perturbations)
    for name, found in seconds.items():
        print(f"{name}: {passes / statistics.median(found):.0f} forward passes/s")
    print(
        f"score / bare: {statistics.median(map(float.__truediv__, *seconds.values())):.2f}; "
        f"load before the start: {load:.1f}"
    )


if __name__ == "__main__":
    main()

"""Measures what fine-tuning at 224 pixels plans and takes, with and without its batch in parts.

    python benchmarks/large.py
    python benchmarks/large.py --network vit --batch 8 --rounds 3

One update on clean images of ResNet-50 or ViT-S/16, on one device.  Memory is the compiler's plan
of what the step computes, without weights and images; it is the same in every run.  Images/s are of
the fastest round, each setting in turn; compiling is not counted.
"""

from __future__ import annotations

import argparse
import os
import time

import jax
import numpy as np
import optax

SETTINGS = {
    "neither": {},
    "accumulate 4": {"accumulate": 4},
    "remat": {"remat": True},
    "both": {"accumulate": 4, "remat": True},
}


def encoder(network: str):
    """Returns ResNet-50 or ViT-S/16 for 224 pixels, with random weights."""
    from robust_ssl import models

    if network == "vit":
        sizes = {"width": 384, "heads": 6, "depth": 12, "patch_size": 16}
        return models.vision_transformer(jax.random.key(0), **sizes, image_size=224)
    return models.resnet50(jax.random.key(0), image_size=224, stem="imagenet")


def compiled(network: str, batch: dict) -> dict[str, tuple]:
    """Returns the compiled step and its first state, by setting."""
    from robust_ssl import finetuning, models

    classifier = models.classifier(jax.random.key(1), encoder(network), 10, head="linear")
    tx = optax.sgd(0.01)
    # Batch norm in training mode is no function of one image: no parts of a batch.
    statistics = "clean" if network == "vit" else "frozen"
    steps = {}
    for name, setting in SETTINGS.items():
        step = finetuning.make_step(
            classifier,
            tx,
            losses=finetuning.mixed_losses(0.0),
            key=jax.random.key(2),
            batch_statistics=statistics,
            **setting,
        )
        state = finetuning.init_state(classifier, tx)
        steps[name] = jax.jit(step).lower(state, batch).compile(), state
    return steps


def seconds(step, state, batch) -> float:
    """Returns what one update takes."""
    start = time.perf_counter()
    jax.block_until_ready(step(state, batch))
    return time.perf_counter() - start


def main() -> None:
    """Prints a table: planned MiB and images/s by network and setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=("resnet50", "vit"), action="append")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    random = np.random.default_rng(0)
    places = np.arange(options.batch, dtype=np.int32)
    images = random.integers(0, 256, (options.batch, 224, 224, 3), dtype=np.uint8)
    batch = {"images": images, "labels": places % 10, "indices": places}
    print(f"load before the start: {os.getloadavg()[0]:.1f}")
    print("| network | setting | MiB | images/s |\n| --- | --- | ---: | ---: |")
    for network in options.network or ("resnet50", "vit"):
        steps = compiled(network, batch)
        rounds = [
            {name: seconds(*pair, batch) for name, pair in steps.items()}
            for _ in range(1 + options.rounds)
        ][1:]
        for name, (step, _) in steps.items():
            memory = step.memory_analysis().temp_size_in_bytes / 2**20
            fastest = min(one[name] for one in rounds)
            print(f"| {network} | {name} | {memory:.0f} | {options.batch / fastest:.2f} |")


if __name__ == "__main__":
    main()

"""Times every downstream-agnostic attack against a ResNet-18, one after the other.

    python benchmarks/dae_suite.py --width 16 --json dae_suite.json

One step is: of L4A, SSP and STD a sign step on one batch, up to the layer concerned; of FFF an Adam
step on one gray image; of UAP one visit to every image of the batch (10 gradients each); of UAP-PGD
20 momentum steps on one batch; of EmbedAttack and TDAA PGD-20 on every image.  Both sides do the
same arithmetic, from the same images, resident on the device; `torch_dae_suite.py` is the torch
side, eager and channels last.  AdvEncoder has a benchmark of its own.

The last column is what fitting ``--members`` budgets at once costs, in times of fitting one: both
are timed in turns, in the process of the JAX side, before the comparison.  Per-image attacks are
not fitted and have none.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import time

import harness
import numpy as np

EPSILON = 10 / 255
UNIVERSAL = ("l4a_base", "l4a_fuse", "l4a_ugs", "ssp", "fff", "std", "uap", "uap_pgd")
PER_IMAGE = ("embed", "tdaa")


def data(options):
    """Returns random images, float32 ``[batch, H, W, 3]`` in [0, 1]."""
    shape = (options.batch, options.image_size, options.image_size, 3)
    return np.random.default_rng(0).uniform(size=shape).astype(np.float32)


# --------------------------------------------------------------------------------------- JAX


def universal_attack(name: str):
    """Builds the package's attack with its defaults."""
    from robust_ssl.attacks import accumulated, layers

    found = {
        "l4a_base": layers.L4ABase,
        "l4a_fuse": layers.L4AFuse,
        "l4a_ugs": layers.L4AUGS,
        "ssp": layers.SSP,
        "fff": layers.FFF,
        "std": layers.STD,
        "uap": accumulated.UAP,
        "uap_pgd": layers.UAPPGD,
    }
    return found[name]()


def _fitting(name, encoder, batch, parallel, members):
    """Returns the `run` of the package's own fit, without its start and its end."""
    import jax.numpy as jnp

    from robust_ssl.attacks import universal

    epsilons = EPSILON * np.arange(members, 0, -1) / members
    keys, epsilons = universal.members((0,), epsilons)

    def run(steps):
        marks = []

        def on_step(number, value):
            if number in (0, steps):  # the first step only starts the clock
                value.block_until_ready()
                marks.append(time.perf_counter())

        universal.fit(
            universal_attack(name),
            encoder,
            [batch] * (steps + 1),
            keys=keys,
            epsilons=jnp.asarray(epsilons),
            image_shape=batch["images"].shape[1:],
            parallel=parallel,
            on_step=on_step,
        )
        return marks[1] - marks[0]

    return run


def _crafting(name, encoder, batch, parallel):
    """Returns the `run` of a per-image attack on the whole batch."""
    import jax

    from robust_ssl import threats
    from robust_ssl.attacks import per_image, targeted

    threat = threats.Linf(EPSILON)
    if name == "tdaa":
        attack = targeted.TDAA(threat, batch["images"][0])
    else:
        attack = per_image.EmbedAttack(threat)

    def function(constants, batch):
        attack, encoder, key = constants
        return per_image.attack_batch(
            attack, key, encoder, batch["images"], indices=batch["indices"]
        )

    craft = parallel.map(function)
    constants = parallel.replicate((attack, encoder, jax.random.key(0)))
    batch = {"images": np.asarray(batch["images"]), "indices": np.arange(len(batch["images"]))}

    def run(steps):
        begun = time.perf_counter()
        for _ in range(steps):
            craft(constants, batch)
        return time.perf_counter() - begun

    return run


def make_jax(options):
    """The package's side; its facts say what several members cost."""
    parallel = harness.start_jax(options)
    import jax

    from robust_ssl import models

    encoder = models.resnet18(
        jax.random.key(0),
        width=options.width,
        stem=options.stem,
        image_size=options.image_size,
        dtype=options.dtype,
    )
    name, images = options.attack, data(options)
    if name in PER_IMAGE:
        run = _crafting(name, encoder, {"images": images}, parallel)
        return harness.jax_side(run, options.batch, parallel, options)
    batch = parallel.put({"images": images})
    one, many = (_fitting(name, encoder, batch, parallel, n) for n in (1, options.members))
    side = harness.jax_side(one, options.batch, parallel, options)
    return dataclasses.replace(
        side, facts=side.facts | {"members": members_cost(one, many, options)}
    )


def members_cost(one, many, options) -> dict[str, float]:
    """Times both in turns after a warm-up; returns the median seconds a step and their ratio."""
    one(1), many(1)
    seconds = [(one(options.steps), many(options.steps)) for _ in range(options.rounds)]
    single, several = (statistics.median(s) / options.steps for s in zip(*seconds, strict=True))
    return {
        "one": single,
        "many": several,
        "ratio": statistics.median(many / one for one, many in seconds),
    }


# ------------------------------------------------------------------------------------- torch


def make_torch(options, *, tuned):
    """The same attack as a plain torch program."""
    import torch_dae_suite
    import torch_models

    here = harness.Torch.start(tuned)
    encoder = torch_models.ResNet18(options.width, options.stem).eval().requires_grad_(False)
    attack = torch_dae_suite.make(
        options.attack, here.network(encoder), here.images(data(options)), EPSILON
    )
    return here.side(attack.step, options.batch)


# ------------------------------------------------------------------------------------ the table


def add_options(parser):
    """Adds what only this benchmark knows."""
    names = (*UNIVERSAL, *PER_IMAGE)
    parser.add_argument("--members", type=int, default=8, help="budgets fitted at once (8)")
    parser.add_argument(
        "--attacks", nargs="+", choices=names, default=list(names), help="which ones (all)"
    )


def main():
    options = harness.options_of(__doc__, add_options)
    if options.tuned:
        raise SystemExit("dae_suite has no tuned torch side; leave --tuned out")
    reports = {}
    for name in options.attacks:
        chosen = argparse.Namespace(**{**vars(options), "attack": name, "json": None})
        reports[name] = harness.compare(f"dae_suite {name}", chosen, make_jax, make_torch)
        print(flush=True)
    print(table(reports))
    if options.json:
        found = {
            "benchmark": "dae_suite",
            "options": {key: value for key, value in vars(options).items() if key != "json"},
            "attacks": reports,
        }
        text = json.dumps(found, indent=2, allow_nan=False) + "\n"
        pathlib.Path(options.json).write_text(text, encoding="utf-8")


def table(reports) -> str:
    """Returns one line for each attack, and one for the whole suite."""
    lines = [f"{'attack':<12}{'jax s/step':>12}{'torch s/step':>14}{'ratio':>8}{'members':>9}"]
    totals = {"jax": 0.0, "torch": 0.0}
    for name, report in reports.items():
        seconds = {side: report["sides"][side]["seconds_per_step"] for side in totals}
        totals = {side: totals[side] + seconds[side] for side in totals}
        members = report["sides"]["jax"].get("members")
        cost = f"{members['ratio']:.2f}" if members else "-"
        lines.append(
            f"{name:<12}{seconds['jax']:>12.4f}{seconds['torch']:>14.4f}"
            f"{report['ratio']['torch']:>8.2f}{cost:>9}"
        )
    whole = totals["torch"] / totals["jax"]
    lines.append(f"{'all':<12}{totals['jax']:>12.4f}{totals['torch']:>14.4f}{whole:>8.2f}{'':>9}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

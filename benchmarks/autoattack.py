"""Compares AutoAttack with the authors' PyTorch code: the same weights, the same images.

    git clone https://github.com/fra31/auto-attack
    python benchmarks/autoattack.py --official auto-attack --data cifar10 --json autoattack.json

Two small convolutional networks, one trained plainly and one against PGD-7 at 8/255, are trained
with this package and carried over to torch; their logits must agree before anything is attacked.
Then every component alone and the ensemble ``standard`` run on both sides, in turns in this
process, with the full published settings, the same batch size and every core.  Nothing is rounded
to 8 bits, since the authors' code does not.  Robust accuracy is the share of all images, those
misclassified from the start included.  Before a component is timed the JAX side attacks one batch
with its first member; those seconds, compilation included, have a column of their own.

``--steps-scale`` below 1 multiplies every number of steps and queries on both sides: for trying the
script out, not for figures.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import sys
import time
import warnings

import harness
import numpy as np

COMPONENTS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square")
ENSEMBLE = "standard"
PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")  # of the ensemble, in this order
MODELS = ("plain", "adversarial")
BUDGETS = {"Linf": 8 / 255, "L2": 0.5}
CHANNELS, STRIDES = (16, 32, 32), (2, 2, 1)
MEAN, STD = 0.5, 0.25
RATE = 2e-3  # Adam's, falling along a cosine
TRAIN_BATCH = 100
LOGIT_TOLERANCE = 1e-5  # of the largest logit
STEPS, QUERIES = 100, 5000


# --------------------------------------------------------------------------------- the networks


@functools.cache
def network():
    """Returns the linen class: three convolutions; features are all pixels of the last one."""
    import flax.linen as nn

    from robust_ssl.models.convolution import conv_general_dilated

    class SmallNetwork(nn.Module):
        @nn.compact
        def __call__(self, x, *, train: bool = False):
            for index, (width, stride) in enumerate(zip(CHANNELS, STRIDES, strict=True)):
                x = nn.Conv(
                    width, (3, 3), (stride, stride), [(1, 1), (1, 1)],
                    conv_general_dilated_cls=lambda: conv_general_dilated, name=f"conv{index}",
                )(x)  # fmt: skip
                x = nn.relu(x)
            return x.reshape(len(x), -1), {}

    return SmallNetwork


def untrained(image_size: int, num_classes: int):
    """Returns a classifier of `network` with fresh weights."""
    import jax
    import jax.numpy as jnp

    from robust_ssl import models
    from robust_ssl.types import Encoder

    module = network()()
    variables = module.init(jax.random.key(0), jnp.zeros((1, image_size, image_size, 3)))
    dim = CHANNELS[-1] * (image_size // 4) ** 2
    encoder = Encoder(variables, module, (MEAN,) * 3, (STD,) * 3, image_size=image_size, dim=dim)
    return models.classifier(jax.random.key(1), encoder, num_classes, head="linear")


def train(classifier, examples, epochs: int, *, adversarial: bool, parallel):
    """Returns the classifier trained with Adam, plainly or against PGD-7 (Madry et al.)."""
    import jax
    import optax

    from robust_ssl import finetuning, losses, threats
    from robust_ssl.attacks import PGD

    per_epoch = len(examples.images) // TRAIN_BATCH
    tx = optax.adam(optax.cosine_decay_schedule(RATE, max(epochs * per_epoch, 1)))
    loss = losses.adversarial_cross_entropy if adversarial else losses.clean_cross_entropy
    attack = PGD(threats.Linf(BUDGETS["Linf"]), 2 / 255, num_steps=7, keep_best=False)
    step = finetuning.make_step(
        classifier,
        tx,
        losses={"cross_entropy": (loss, 1.0)},
        key=jax.random.key(2),
        attack=attack if adversarial else None,
        batch_statistics="frozen",
        axis_name=parallel.axis_name,
    )
    state = parallel.replicate(finetuning.init_state(classifier, tx))
    step = parallel.compile(step)
    random = np.random.default_rng(0)
    for _ in range(epochs):
        order = random.permutation(len(examples.images))[: per_epoch * TRAIN_BATCH]
        for rows in order.reshape(per_epoch, TRAIN_BATCH):
            batch = {
                "images": examples.images[rows],
                "labels": examples.labels[rows].astype(np.int32),
                "indices": np.arange(TRAIN_BATCH, dtype=np.int32),
            }
            state, _ = step(state, parallel.put(batch))
    return classifier.with_variables(jax.device_get(state.variables))


def to_torch(classifier):
    """Returns the torch module with the same weights; pixels ``[n, 3, H, W]`` to logits."""
    import torch
    from torch import nn

    class Torch(nn.Module):
        def __init__(self):
            super().__init__()
            inputs = (3, *CHANNELS[:-1])
            self.layers = nn.ModuleList(
                nn.Conv2d(i, o, 3, s, 1) for i, o, s in zip(inputs, CHANNELS, STRIDES, strict=True)
            )
            self.head = nn.Linear(classifier.encoder.dim, classifier.num_classes)

        def forward(self, x):
            x = (x - MEAN) / STD
            for layer in self.layers:
                x = torch.relu(layer(x))
            return self.head(x.permute(0, 2, 3, 1).flatten(1))

    def weights(layer, kernel, bias, axes):
        layer.weight.data = torch.from_numpy(np.array(kernel).transpose(axes).copy())
        layer.bias.data = torch.from_numpy(np.array(bias))

    module, params = Torch(), classifier.variables["params"]
    for index, layer in enumerate(module.layers):
        conv = params["encoder"][f"conv{index}"]
        weights(layer, conv["kernel"], conv["bias"], (3, 2, 0, 1))
    dense = params["head"]["linear"]
    weights(module.head, dense["kernel"], dense["bias"], (1, 0))
    return module.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------- our side


def our_attacks(name: str, norm: str, num_classes: int, scale: float):
    """Returns ``{name: attacks}`` of one component, or of the ensemble in its order."""
    from robust_ssl import objectives, threats
    from robust_ssl.attacks import apgd, autoattack

    threat = {"Linf": threats.Linf, "L2": threats.L2}[norm](BUDGETS[norm])
    parts = autoattack.standard(threat, num_classes)
    parts["apgd-dlr"] = [apgd.APGD(threat, objectives.labelled.dlr)]

    def scaled(attack):
        if hasattr(attack, "num_queries"):
            return attack.replace(num_queries=_scaled(QUERIES, scale))
        return attack.replace(num_steps=_scaled(STEPS, scale))

    names = PARTS if name == ENSEMBLE else (name,)
    return {part: [scaled(attack) for attack in parts[part]] for part in names}


def warm_up(classifier, examples, name: str, norm: str, options, parallel) -> float:
    """Attacks one batch of every part with its first member; returns the seconds."""
    import jax

    from robust_ssl.evaluation import in_turn

    attacks = our_attacks(name, norm, classifier.num_classes, options.steps_scale)
    split = in_turn.gathered([{"images": examples.images, "labels": examples.labels}])
    shared = {"key": jax.random.key(0), "parallel": parallel, "batch_size": options.batch}
    begun = time.perf_counter()
    in_turn.clean_correct(classifier, split, **shared)
    one = np.arange(len(split["labels"])) == 0
    for members in attacks.values():
        in_turn.strike(classifier, split, members[0], one, eight_bit=False, **shared)
    return time.perf_counter() - begun


def run_ours(classifier, examples, name: str, norm: str, options, parallel):
    """Returns which images stay right, bool ``[n]``, and the seconds."""
    import jax

    from robust_ssl.evaluation import in_turn

    attacks = our_attacks(name, norm, classifier.num_classes, options.steps_scale)
    batches = [{"images": examples.images, "labels": examples.labels}]
    begun = time.perf_counter()
    found = in_turn.score_in_turn(
        classifier, batches, attacks, key=jax.random.key(options.seed), parallel=parallel,
        batch_size=options.batch, eight_bit=False,
    )  # fmt: skip
    return found["worst"].robust_correct, time.perf_counter() - begun


# ------------------------------------------------------------------------------- the authors' side


def official_adversary(module, name: str, norm: str, num_classes: int, options, device):
    """Returns the authors' `AutoAttack`, set as its version ``standard`` sets it."""
    from autoattack import AutoAttack

    names = PARTS if name == ENSEMBLE else (name,)
    adversary = AutoAttack(
        module, norm=norm, eps=BUDGETS[norm], seed=options.seed, verbose=False, version="custom",
        attacks_to_run=list(names), device=device,
    )  # fmt: skip
    targets = min(9, num_classes - 1)
    adversary.apgd.n_restarts = adversary.fab.n_restarts = 1
    adversary.apgd_targeted.n_restarts = 1
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = targets
    adversary.square.n_queries = _scaled(QUERIES, options.steps_scale)
    steps = _scaled(STEPS, options.steps_scale)
    for attack in (adversary.apgd, adversary.apgd_targeted):
        attack.n_iter = attack.n_iter_orig = steps
        attack.n_iter_2, attack.n_iter_min = max(int(0.22 * steps), 1), max(int(0.06 * steps), 1)
        attack.size_decr = max(int(0.03 * steps), 1)
    adversary.fab.n_iter = steps
    return adversary


def run_official(module, examples, name: str, norm: str, num_classes: int, options):
    """Returns which images stay right, bool ``[n]``, and the seconds."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = module.to(device)
    pixels = torch.from_numpy(examples.images).permute(0, 3, 1, 2).contiguous().to(device) / 255
    labels = torch.from_numpy(examples.labels).long().to(device)
    adversary = official_adversary(module, name, norm, num_classes, options, device)
    begun = time.perf_counter()
    attacked = adversary.run_standard_evaluation(pixels, labels, bs=options.batch)
    seconds = time.perf_counter() - begun
    # An image that was wrong from the start comes back as it was.
    with torch.no_grad():
        return (module(attacked).argmax(1) == labels).cpu().numpy(), seconds


# ------------------------------------------------------------------------------------ comparison


def _scaled(number: int, scale: float) -> int:
    return max(int(number * scale), 1)


def agree(classifier, module, examples) -> float:
    """Returns the largest difference of logits over the largest logit; stops if it is too large."""
    import jax
    import torch

    pixels = examples.images.astype(np.float32) / 255
    ours = np.asarray(jax.jit(lambda net, x: net(x).logits)(classifier, pixels))
    with torch.no_grad():
        theirs = module.cpu()(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy()
    difference = float(np.abs(ours - theirs).max() / np.abs(ours).max())
    if difference > LOGIT_TOLERANCE:
        raise SystemExit(f"the networks differ: {difference:.1e} of the largest logit")
    return difference


def compare(classifier, module, examples, model: str, norm: str, name: str, options, parallel):
    """Runs both sides on one model, budget and attack; returns a row of the table."""
    classes = classifier.num_classes
    theirs, their_seconds = run_official(module, examples, name, norm, classes, options)
    first = warm_up(classifier, examples, name, norm, options, parallel)
    ours, our_seconds = run_ours(classifier, examples, name, norm, options, parallel)
    return {
        "model": model,
        "norm": norm,
        "epsilon": BUDGETS[norm],
        "attack": name,
        "official": float(theirs.mean()),
        "ours": float(ours.mean()),
        "points": 100 * float(ours.mean() - theirs.mean()),
        "only_official_breaks": int((ours & ~theirs).sum()),
        "only_ours_breaks": int((theirs & ~ours).sum()),
        "official_seconds": their_seconds,
        "our_seconds": our_seconds,
        "our_first_batch_seconds": first,
        "ratio": their_seconds / our_seconds,
    }


def markdown(row: dict) -> str:
    """Returns a row as a line of the Markdown table."""
    return (
        f"| {row['model']} | {row['norm']} | {row['attack']} | {100 * row['official']:.1f} "
        f"| {100 * row['ours']:.1f} | {row['points']:+.1f} | {row['official_seconds']:.1f} "
        f"| {row['our_seconds']:.1f} | {row['ratio']:.2f} | {row['our_first_batch_seconds']:.1f} |"
    )


HEADER = (
    "| model | budget | attack | official, % | ours, % | difference, points | official, s "
    "| ours, s | official / ours | first batch of ours, s |\n" + 10 * "| --- " + "|"
)


def options_of():
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--official", metavar="PATH", help="a clone of fra31/auto-attack (an installed package)")
    add("--data", default="digits", help="digits, or what robust_ssl.data.load takes (digits)")
    add("--image-size", type=int, default=32, help="height and width, pixels (32)")
    add("--images", type=int, default=500, help="test images (500; digits have 360)")
    add("--train-images", type=int, default=10000, help="at most so many (10000)")
    add("--epochs", type=int, default=8, help="of both networks (8)")
    add("--batch", type=int, default=125, help="images of a batch, both sides (125)")
    add("--steps-scale", type=float, default=1.0, help="share of all numbers of steps (1)")
    add("--seed", type=int, default=0, help="of both sides' attacks (0)")
    add("--attacks", nargs="+", default=[*COMPONENTS, ENSEMBLE], choices=[*COMPONENTS, ENSEMBLE])
    add("--norms", nargs="+", default=list(BUDGETS), choices=list(BUDGETS))
    add("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    add("--parallel", default="pmap", choices=("pmap", "shard_map", "jit"))
    add("--devices", type=int, help="JAX devices (every core on CPU, one accelerator)")
    add("--torch-threads", type=int, help="of the authors' code on a CPU (every core)")
    add("--json", metavar="FILE", help="also write everything as JSON")
    return parser.parse_args()


def load(options):
    """Returns the training and the test examples."""
    from robust_ssl import data

    if options.data == "digits":
        both = [data.digits(split, image_size=options.image_size) for split in ("train", "test")]
    else:
        both = [
            data.load(options.data, split=split, image_size=options.image_size, limit=limit)
            for split, limit in (("train", options.train_images), ("test", options.images))
        ]
    return both[0], both[1].take(np.arange(min(options.images, len(both[1]))))


def main():
    """Trains, compares, prints the table, writes the JSON file."""
    options = options_of()
    # The authors' package has this script's name: the script's own folder must not be searched.
    sys.path[:1] = [str(pathlib.Path(options.official).resolve())] if options.official else []
    parallel = harness.start_jax(options)
    harness.Torch.start(tuned=False)
    warnings.filterwarnings("ignore")  # the authors' code warns of what it is not asked here
    import jax
    import torch

    torch.set_num_threads(options.torch_threads or harness.cores())
    training, test = load(options)
    classes = int(max(training.labels.max(), test.labels.max())) + 1
    print(f"{len(test.images)} images of {options.data}, {options.image_size}x{options.image_size}")
    print(HEADER, flush=True)
    rows, clean, logits = [], {}, {}
    for model in options.models:
        fresh = untrained(options.image_size, classes)
        classifier = train(
            fresh, training, options.epochs, adversarial=model == "adversarial", parallel=parallel
        )
        module = to_torch(classifier)
        logits[model] = agree(classifier, module, test)
        with torch.no_grad():
            pixels = torch.from_numpy(test.images).permute(0, 3, 1, 2).float() / 255
            right = module(pixels).argmax(1).numpy() == test.labels
        clean[model] = float(right.mean())
        for norm in options.norms:
            for name in options.attacks:
                rows.append(compare(classifier, module, test, model, norm, name, options, parallel))
                print(markdown(rows[-1]), flush=True)
                _write(options, rows, clean, logits, jax.__version__, torch.__version__)
    print("clean accuracy: " + ", ".join(f"{m} {100 * a:.1f} %" for m, a in clean.items()))


def _write(options, rows, clean, logits, jax_version, torch_version):
    if options.json:
        found = {
            "benchmark": "autoattack",
            "options": vars(options),
            "versions": {"jax": jax_version, "torch": torch_version},
            "cores": harness.cores(),
            "clean_accuracy": clean,
            "logit_difference": logits,
            "rows": rows,
        }
        pathlib.Path(options.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

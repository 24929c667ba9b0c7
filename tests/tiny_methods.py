"""The config of the comparison with everything small, and the recipes that tests are made of."""

import json

import tiny
from flax.traverse_util import flatten_dict

from robust_ssl import settings, stages, trees
from robust_ssl.parallel import Parallel
from robust_ssl.progress import Progress

ATTACKS, LOSSES = "robust_ssl.attacks:", "robust_ssl.losses:"
FROZEN = {"rates": {"encoder/**": "freeze", "head/**": 5e-3}, "batch_statistics": "frozen"}
PGD = {"function": f"{ATTACKS}PGD", "epsilon": 8 / 255, "step_size": 2 / 255, "num_steps": 2}
ON_ADVERSARIAL = {
    "losses": {"adversarial_cross_entropy": (f"{LOSSES}adversarial_cross_entropy", 1.0)},
    "batch_statistics": "adversarial",
}
PGD_AT = {**ON_ADVERSARIAL, "attack": PGD}
POOL = {"function": "robust_ssl.finetuning:UniversalPool", "epsilon": 0.04}
UNIVERSAL = {**ON_ADVERSARIAL, "attack": POOL}
SMOOTH = {
    "start": "usual",
    "epochs": 0,
    "preprocess": {"function": "robust_ssl.models.preprocessing:Smooth"},
}
BROKEN = {"losses": {"nan": ("tiny_methods:not_a_number", 1.0)}, "epochs": 8}


def not_a_number(inputs):
    """A loss that has no value."""
    return inputs.clean.logits.sum(axis=-1) * float("nan")


def config(recipes, *steps):
    """`configs/compare.py` on `tiny.images`, with these recipes and stages; may be changed."""
    made = settings.load_config(f"{tiny.CONFIGS}/compare.py:scale=small,epochs=2").unlock()
    made.stages = steps or ("defend",)
    made.encoder = {"builder": "tiny:encoder"}
    made.surrogate = {"source": "tiny:unlabelled"}
    made.downstream = {"source": "tiny:images", "validation": 0.25}
    made.attack.methods = {
        "universal_pgd": {"function": f"{ATTACKS}UniversalPGD"},
        "random_noise": {"function": f"{ATTACKS}RandomNoise"},
    }
    made.attack.update(num_steps=2, batch_size=16)
    made.common = {"epochs": 2, "batch_size": 16, "head": "linear"}
    made.methods = recipes
    made.defend.update(seeds=(0,), batch_size=16, validation=PGD)
    made.protocol.update(batch_size=32, checks=False)
    made.protocol.per_image.methods = {"pgd": {"function": f"{ATTACKS}PGD", "num_steps": 2}}
    made.protocol.autoattack.threats = {}
    made.compare.update(rounds=1, steps_per_round=1, memory=False, order=("usual", "pgd_at"))
    return made


def a_run(made, workdir):
    """What the stages are called with."""
    return stages.Run(settings.to_json(made), workdir, layout(), Progress("quiet"))


def layout():
    return Parallel.create(num_devices=2)


def go(made, workdir):
    return stages.run(made, workdir, parallel=layout(), progress=Progress("quiet"))


def final(workdir, name, seed=0):
    """The variables that a recipe left, by path."""
    tree = trees.read(workdir / "methods" / f"{name}-seed{seed}" / "final")
    return flatten_dict(tree, sep="/")


def manifest(workdir, stage):
    return json.loads((workdir / stage / "manifest.json").read_text())


def snapshot(folder):
    """Every file with its time and content."""
    return {
        str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.read_bytes())
        for file in folder.rglob("*")
        if file.is_file()
    }

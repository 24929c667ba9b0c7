"""The config of the comparison with everything small, and the recipes that tests are made of."""

import json

import jax
import numpy as np
import tiny
from flax.traverse_util import flatten_dict

from robust_ssl import experiment, losses, settings, weights
from robust_ssl.parallel import Parallel
from robust_ssl.progress import Progress

ATTACKS, LOSSES = "robust_ssl.attacks:", "robust_ssl.losses:"
FROZEN = {"rates": {"encoder/**": "freeze", "head/**": 5e-3}, "batch_statistics": "frozen"}
PGD = {"function": f"{ATTACKS}PGD", "epsilon": 8 / 255, "step_size": 2 / 255, "num_steps": 2}
ON_ADVERSARIAL = {
    "losses": {"adversarial_cross_entropy": f"{LOSSES}adversarial_cross_entropy"},
    "batch_statistics": "adversarial",
}
PGD_AT = {**ON_ADVERSARIAL, "attack": PGD}
POOL = {"function": "robust_ssl.finetuning:UniversalPool", "epsilon": 0.04}
UNIVERSAL = {**ON_ADVERSARIAL, "attack": POOL}
SMOOTH = {
    "start": "baseline",
    "epochs": 0,
    "preprocess": "robust_ssl.models.preprocessing:Smooth",
}
BROKEN = {"losses": {"nan": "tiny_recipes:not_a_number"}, "epochs": 8}


def not_a_number(inputs):
    """A loss that has no value."""
    return inputs.clean.logits.sum(axis=-1) * float("nan")


def of_the_clean(inputs):
    """A loss on clean images, whatever there is."""
    return losses.clean_cross_entropy(inputs)


def held(inputs):
    """A loss whose gradient is stopped."""
    return jax.lax.stop_gradient(losses.clean_cross_entropy(inputs))


def ones(inputs):
    """A loss that reads nothing."""
    return np.ones(len(inputs.labels), np.float32)


def config(recipes, *stages):
    """`configs/compare.py` on `tiny.images`, with these recipes and stages; may be changed."""
    config = settings.load_config(f"{tiny.CONFIGS}/compare.py:scale=small,epochs=2").unlock()
    config.stages = stages or ("train",)
    config.encoder = {"function": "tiny:encoder"}
    config.surrogate = {"function": "tiny:unlabelled"}
    config.downstream = {"function": "tiny:images", "validation": 0.25}
    config.suite.attacks = {
        "universal_pgd": f"{ATTACKS}UniversalPGD",
        "random_noise": f"{ATTACKS}RandomNoise",
    }
    config.suite.update(num_steps=2, batch_size=16)
    config.common = {"epochs": 2, "batch_size": 16, "head": "linear"}
    config.recipes = recipes
    config.sweep = None  # its grid is for recipes that are not here
    config.training = {
        "seeds": (0,),
        "batch_size": 16,
        "validation": {**PGD, "keep_best": False},
    }
    config.scoring = {
        "batch_size": 32,
        "checks": False,
        "per_image": {"attacks": {"pgd": {"function": f"{ATTACKS}PGD", "num_steps": 2}}},
    }
    config.compare = {
        "claims": ({"order": ("baseline", "pgd_at"), "of": "us"},),
        **{"rounds": 1, "steps_per_round": 1, "memory": False},
    }
    return config


def put(config, change):
    """Sets entries of a config by their dotted paths."""
    for path, value in change.items():
        *parents, last = path.split(".")
        place = config
        for parent in parents:
            place = place[parent]
        place[last] = value


def context(config, workdir, num_devices=2):
    """What the stages are called with."""
    return experiment.Context(experiment.plan(config), workdir, layout(num_devices), QUIET)


QUIET = Progress("quiet")


def layout(num_devices=2):
    return Parallel.create(num_devices=num_devices)


def go(config, workdir):
    return experiment.run(config, workdir, parallel=layout(), progress=QUIET)


def final(workdir, name, seed=0):
    """The variables that a recipe left, by path."""
    folder = workdir / "recipes" / f"{name}-seed{seed}"
    classifier = weights.load_classifier(folder, builder=tiny.encoder)
    return flatten_dict(jax.device_get(dict(classifier.variables)), sep="/")


def manifest(workdir, stage):
    return json.loads((workdir / stage / "manifest.json").read_text())


def snapshot(folder):
    """Every file with its time and content."""
    return {
        str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.read_bytes())
        for file in folder.rglob("*")
        if file.is_file()
    }

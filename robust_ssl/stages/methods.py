"""Every baseline and every defence as a recipe for the one step; the `defend` stage makes them.

A recipe is plain values: what training starts from, which losses with which weights, which layer
learns how fast, what the inner attack is, whose batch statistics count.  No method has a trainer of
its own, so what differs between two of them is what their recipes say.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.errors import JaxRuntimeError

from robust_ssl import data, finetuning, manifests, models
from robust_ssl.build import resolve
from robust_ssl.checkpoints import StageDirectory
from robust_ssl.manifests import ConfigChangedError, WorkdirError, json_ready
from robust_ssl.parallel import everywhere
from robust_ssl.stages import finetune, fitting
from robust_ssl.stages.attack import function_of
from robust_ssl.stages.recipes import (
    SELECT,
    check_chain,
    check_values,
    complete,
    made_from,
)
from robust_ssl.stages.run import Run, check_names, check_seeds, load_or_import
from robust_ssl.trees import digest, fingerprint
from robust_ssl.types import Classifier, Encoder

_log = logging.getLogger(__name__)

# What building a recipe of wrong values raises.
WRONG = (ValueError, TypeError, KeyError, AttributeError, AssertionError)


FAILED = " (failed)"  # follows the name of a recipe among the inputs of `defend`


def _kept(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A recipe as its directory keeps it: whether it is scored has no part in what is made."""
    return {key: value for key, value in complete(config, name).items() if key != "scored"}


def model_name(name: str, seed: int) -> str:
    """Returns what a recipe with a seed is called among classifiers."""
    return f"{name}-seed{seed}"


def directory(name: str, seed: int) -> str:
    """Returns the stage name of a recipe with a seed."""
    return f"methods/{model_name(name, seed)}"


def check(run: Run) -> None:
    """Builds every recipe's step, without a step of it; what is made already has had one.

    Raises:
      ValueError: With which recipe is wrong, and what to do.
    """
    config = run.config
    check_names(config["methods"], "config.methods")
    check_seeds(config["defend"]["seeds"], "config.defend.seeds")
    check_validation(run)
    for name in config["methods"]:
        check_one(run, name, config["defend"]["seeds"])


def is_made(run: Run, name: str, seeds: Sequence[int]) -> bool:
    """Returns whether the workdir has a recipe, as the config has it, with all seeds.

    Raises:
      WorkdirError: If a manifest cannot be read.
    """
    for seed in seeds:
        found, asked = _begun(run, name, seed)
        if found is None or found["status"] != "done" or found["config"] != asked:
            return False
    return True


def _begun(run: Run, name: str, seed: int) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The manifest of a recipe, None where there is none, and the config it should have."""
    path, asked = run.workdir / directory(name, seed), json_ready(_kept(run.config, name))
    if not (path / "manifest.json").exists():
        return None, asked
    found = manifests.read(path)
    if asked["select"]:  # which layers move was found out on the way
        asked["rates"] = found["config"].get("rates")
    return found, asked


def _check_not_begun_otherwise(run: Run, name: str, seeds: Sequence[int]) -> None:
    """Raises ConfigChangedError, with what differs; what has failed may be changed."""
    failed = _collected(run)
    for seed in seeds:
        found, asked = _begun(run, name, seed)
        if found is not None and model_name(name, seed) + FAILED not in failed:
            path = run.workdir / directory(name, seed)
            manifests.check_unchanged(path, found, {"config": asked})


def _collected(run: Run) -> dict[str, str]:
    """What `defend` has collected so far: digests of recipes by name, those that failed marked."""
    path = run.workdir / "defend"
    return manifests.read(path)["inputs"] if (path / "manifest.json").exists() else {}


def check_validation(run: Run) -> None:
    """Raises ValueError unless every recipe's epochs can be judged by the same attack."""
    attack = fitting.build_attack(run, run.config["defend"]["validation"])
    if isinstance(attack, finetuning.Adversary) or not hasattr(attack, "num_steps"):
        raise ValueError(
            "config.defend.validation must be an attack on single images with num_steps, such as "
            '{"function": "robust_ssl.attacks:PGD", "epsilon": 8 / 255, "num_steps": 10}: all '
            f"recipes' epochs are judged by it; got {run.config['defend']['validation']}"
        )


def check_one(run: Run, name: str, seeds: Sequence[int]) -> None:
    """Raises ValueError, with the recipe's name, unless it can be made, or is with all seeds."""
    try:
        recipe = complete(run.config, name)
        check_values(recipe)
        check_chain(run.config, name)
        if is_made(run, name, seeds):
            return
        _check_not_begun_otherwise(run, name, seeds)
        classifier = untrained(run, name)
        if not recipe["epochs"] or recipe["members"]:
            return
        if recipe["select"] is not None:
            _check_select(run, recipe["select"])
            found = dict.fromkeys(finetuning.kernels(classifier.variables["params"]), 0.0)
            top = {option: recipe["select"][option] for option in ("top_k", "top_k_fraction")}
            finetuning.select_redundant(found, **top)
            recipe = {**recipe, "rates": {"**": 1e-3}}  # which layers move is found out later
        run.parallel.check_batch(recipe["batch_size"])
        encoder = other_encoder(run, name)
        attack = fitting.build_attack(run, recipe["attack"], encoder)
        losses = fitting.build_losses(recipe["losses"])
        steps = data.steps_per_epoch(len(run.downstream[0]), recipe["batch_size"])
        # On one device's part of a batch, where nothing is exchanged with others.
        alone = dataclasses.replace(run.parallel, method="jit")
        run = dataclasses.replace(run, parallel=alone)
        state, step = fitting.build_step(
            run, name, classifier, recipe, losses, attack, steps, encoder=encoder
        )
        part = recipe["batch_size"] // len(run.parallel.devices)
        jax.eval_shape(step.function, state, _shapes(part, classifier.image_size), step.settings)
    except WRONG as error:
        error.add_note(f"in config.methods.{name}")
        raise


def _shapes(images: int, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        "images": jax.ShapeDtypeStruct((images, size, size, 3), jnp.uint8),
        "labels": jax.ShapeDtypeStruct((images,), jnp.int32),
        "indices": jax.ShapeDtypeStruct((images,), jnp.int32),
    }


def _check_select(run: Run, options: Mapping[str, Any]) -> None:
    """What layer sensitivity is measured with."""
    if set(options) != set(SELECT):
        raise ValueError(f"select must have the entries {sorted(SELECT)}, got {sorted(options)}")
    images, devices = len(run.downstream[1]), len(run.parallel.devices)
    if min(options["images"], images) < devices:
        raise ValueError(
            f"select.images is {options['images']} and there are {images} validation images; at "
            f"least one per device ({devices}) is needed"
        )


def untrained(run: Run, name: str, seed: int = 0) -> Classifier:
    """Returns the classifier of a recipe's shape, with the weights before any training."""
    return _assemble(run, name, seed, lambda other: untrained(run, other, seed))


def _assemble(run: Run, name: str, seed: int, get) -> Classifier:
    """What training of a recipe starts from; `get` returns another recipe's classifier."""
    recipe = complete(run.config, name)
    if recipe["members"]:
        return models.confidence_ensemble([get(other) for other in recipe["members"]])
    if recipe["start"]:
        classifier = get(recipe["start"])
    else:
        classifier = run.classifier(recipe["head"], seed, other_encoder(run, name))
    if recipe["preprocess"]:
        first = _build_preprocess(name, recipe["preprocess"])
        classifier = classifier.replace(encoder=classifier.encoder.replace(preprocess=first))
    if recipe["prune"]:
        params = finetuning.prune(classifier.variables["params"], recipe["prune"])
        classifier = classifier.with_variables({**classifier.variables, "params": params})
    return classifier


def other_encoder(run: Run, name: str) -> Encoder | None:
    """Returns the public encoder that a recipe, or what it starts from, names; None: the run's.

    Raises:
      ValueError: If it cannot be read, or takes images of another size than the data have.
    """
    recipe = complete(run.config, name)
    while recipe["start"]:
        recipe = complete(run.config, recipe["start"])
    if not recipe["encoder"]:
        return None
    encoder = load_or_import(recipe["encoder"], {})
    if encoder.image_size != run.encoder.image_size:
        raise ValueError(
            f"its encoder, {encoder.name}, takes images of {encoder.image_size} pixels and the "
            f"run's, {run.encoder.name}, of {run.encoder.image_size}; take another one for it, or "
            "leave the recipe out"
        )
    return encoder


def _build_preprocess(name: str, options: Mapping[str, Any]):
    options = dict(options)
    function = function_of(name, options)
    try:
        return resolve(function)(**options)
    except TypeError as error:
        raise ValueError(f"{function} does not take that: {error}") from error


def method(run: Run, name: str, seed: int) -> StageDirectory:
    """Makes one recipe with one seed, and before it what it starts from.

    Args:
      run: The run; ``config.methods`` has the recipe.
      name: Of the recipe.
      seed: Of the head's first weights, the batches and the keys; the data are the run's.

    Returns:
      The stage's directory, ``methods/NAME-seedSEED``.

    Raises:
      FloatingPointError: If training ends in updates that are not finite, or had no other.
    """
    recipe = _kept(run.config, name)
    start = _assemble(run, name, seed, lambda other: load_method(run, other, seed))
    if recipe["members"] or not recipe["epochs"]:
        return _as_it_is(run, name, seed, recipe, start)
    encoder = other_encoder(run, name)
    attack = fitting.build_attack(run, recipe["attack"], encoder)
    against = fitting.build_attack(run, run.config["defend"]["validation"])
    afterwards, known = None, {}
    if recipe["select"] is not None:
        measured = finetune.measure_sensitivity(
            run, f"{directory(name, seed)}-layers", start, against, recipe["select"], seed
        )
        selected = measured.results["selected"]
        recipe = {**recipe, "rates": finetuning.rates_for(selected, recipe["select"]["rate"])}
        spent = measured.results["gradient_evaluations"] / len(run.downstream[0])
        known = {
            "selected": selected,
            "selection_seconds": measured.manifest["seconds"],
            "selection_gradient_evaluations_per_image": spent,
        }
    if recipe["tolerance"] is not None:
        afterwards = finetune.guarded(run, start, against, recipe["tolerance"])
    made = fitting.fit(
        run,
        directory(name, seed),
        start,
        recipe,
        fitting.build_losses(recipe["losses"]),
        attack=attack,
        against={"validation": against},
        seed=seed,
        encoder=encoder,
        best=recipe["best"],
        afterwards=afterwards,
        known=known,
    )
    steps = made.results["steps"]
    if made.results["skipped"] == steps > 0:
        raise FloatingPointError(
            f"all its {steps} updates were skipped, as none was finite; lower the learning rate"
        )
    return made


def _as_it_is(run: Run, name: str, seed: int, recipe, classifier: Classifier) -> StageDirectory:
    """A stage that trains nothing: an ensemble, an input transformation."""
    inputs = {"start": fingerprint(classifier.variables)}
    with run.open(directory(name, seed), recipe, inputs, seed) as stage:
        if not stage.done:
            results = {
                "epochs": 0,
                "steps": 0,
                "skipped": 0,
                "gradient_evaluations_per_image": 0,
            }
            encoder = other_encoder(run, name)
            fitting.keep_classifier(run, stage, classifier, results, encoder)
            stage.finish(fitting.without_attack(classifier.variables), results)
    return stage


def load_method(run: Run, name: str, seed: int) -> Classifier:
    """Returns the classifier of a recipe, which is made first where it is not there yet."""
    made = method(run, name, seed)
    template = untrained(run, name, seed)
    return template.with_variables(made.load_final(template.variables))


def defend(run: Run) -> StageDirectory:
    """Makes every recipe with every seed; one that fails is reported, and the others go on.

    Recipes and seeds may come to those of a finished stage.  What has failed is tried again when
    something comes, or when its recipe is changed: what it left is then set aside.

    Returns:
      The stage's directory; its results are ``{"made": {stage: results}, "failed": {stage: why}}``.
    """
    config = run.config["defend"]
    train, validation = (part.fingerprint() for part in run.downstream)
    data_and_encoder = {
        "encoder": fingerprint(run.encoder.variables),
        "train": train,
        "validation": validation,
    }
    before, asked = _collected(run), {}
    for name, seed in itertools.product(run.config["methods"], config["seeds"]):
        model, said = model_name(name, seed), digest(json_ready(_kept(run.config, name)))
        failed_before = before.get(model + FAILED)
        asked[model + FAILED if failed_before == said else model] = said
        if failed_before not in (None, said):
            _set_aside(run, name, seed)
    rules = {option: value for option, value in config.items() if option != "seeds"}
    with run.open("defend", rules, data_and_encoder | asked, collects=True) as stage:
        if not stage.done:
            made: dict[str, Any] = {}
            failed: dict[str, str] = {}
            for seed in config["seeds"]:
                for name in run.config["methods"]:
                    make(run, name, seed, made, failed)
            marked = {
                model + FAILED if f"methods/{model}" in failed else model: said
                for model, said in ((m.removesuffix(FAILED), said) for m, said in asked.items())
            }
            stage.manifest["inputs"] = data_and_encoder | marked
            stage.finish(None, {"made": made, "failed": failed})
    return stage


def _set_aside(run: Run, name: str, seed: int) -> None:
    """Renames what a recipe that failed has left, so that a changed one begins anew."""
    for stage in (directory(name, seed), f"{directory(name, seed)}-layers"):
        path = run.workdir / stage
        if path.exists() and jax.process_index() == 0:
            number = 1 + len(list(path.parent.glob(f"{path.name}-failed*")))
            path.rename(path.with_name(f"{path.name}-failed{number}"))
    everywhere(True)  # no process opens the directory before


def make(run: Run, name: str, seed: int, made: dict[str, Any], failed: dict[str, str]) -> None:
    """Makes a recipe, after what it starts from, unless that has been tried before.

    Args:
      run: The run.
      name: Of the recipe.
      seed: As for `method`.
      made: Gets the results of what succeeds, by the name of its stage.
      failed: Gets why what fails does.  A wish to stop, and a workdir that was made otherwise or
        cannot be used, are no failures of a recipe, and are raised.
    """
    stage = directory(name, seed)
    if stage in made or stage in failed:
        return
    recipe = complete(run.config, name)
    for other in made_from(recipe):
        make(run, other, seed, made, failed)
        if directory(other, seed) in failed:
            failed[stage] = f"it is made from {model_name(other, seed)}, which failed"
            return
    try:
        made[stage] = method(run, name, seed).results
    except (ConfigChangedError, WorkdirError):
        raise
    except (FloatingPointError, ValueError, TypeError, KeyError, JaxRuntimeError) as error:
        failed[stage] = str(error)
        _log.error("%s failed, the others go on: %s", stage, error)

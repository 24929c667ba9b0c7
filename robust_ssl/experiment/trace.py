"""Before the first step: every recipe's training step is built and traced, without being run."""

from __future__ import annotations

import tempfile
from typing import Any

import jax
import numpy as np

from robust_ssl import data, weights
from robust_ssl.build import inside
from robust_ssl.experiment import batch_parts, fitting, saving
from robust_ssl.experiment.context import Context, code_inputs
from robust_ssl.experiment.recipe import AUTO, Recipe
from robust_ssl.experiment.train import (
    FAILED,
    collected,
    directory,
    load_saved,
    model_name,
    public_encoder,
    untrained,
    untrained_teacher,
)
from robust_ssl.finetuning.images import clean_images
from robust_ssl.types import Classifier
from robust_ssl.workdir import check_unchanged, json_ready, read_manifest

# What building a recipe of wrong values raises.
WRONG = (ValueError, TypeError, KeyError, AttributeError, AssertionError)


def check(context: Context) -> None:
    """Builds and traces every recipe's training step without running it; skips finished recipes.

    Raises:
      ValueError: With which recipe is wrong, and what to do.
    """
    for recipe in context.plan.recipes.values():
        check_recipe(context, recipe)
    if context.plan.recipes and jax.process_index() == 0:
        _check_saving(context)


def check_recipe(context: Context, recipe: Recipe) -> None:
    """Raises ValueError, with the recipe's name, unless it can be made, or is with all seeds."""
    place = f"in config.recipes.{recipe.name}"
    try:
        if is_made(context, recipe):
            return
        _check_not_begun_otherwise(context, recipe)
        _trace(context, recipe)
    except WRONG as error:
        error.add_note(place)
        raise


def _trace(context: Context, recipe: Recipe) -> None:
    classifier = untrained(context, recipe)
    if not recipe.is_trained:
        return
    _check_augmentation(context, recipe)
    if recipe.accumulate == AUTO:
        batch_parts.limit(context, recipe)
    alone = recipe.select is not None or recipe.accumulate == AUTO  # the step is another one then
    run = batch_parts.alone(context) if alone else context
    state, step = step_of(run, recipe, classifier)
    batch = batch_parts.batch_shapes(context, recipe, classifier)
    if alone:
        jax.eval_shape(step.function, state, batch, step.settings)
        return
    # The very program that is trained with: it is not traced again.
    program = step.computation.program(context.parallel).bind(step.settings)
    program.lower(state, batch_parts.of_all(batch, len(context.parallel.devices)))


def _check_augmentation(context: Context, recipe: Recipe) -> None:
    """Raises ValueError unless a recipe's augmentation keeps the first images in [0, 1]."""
    if recipe.augment is None:
        return
    rows = np.arange(min(16, len(context.downstream[0])))
    batch = {"images": context.downstream[0].read(rows)["images"], "indices": rows}
    key = jax.random.key(context.plan.seed)
    augmented = clean_images(recipe.augment.bound, 0, batch, key, None)
    low, high = float(augmented.min()), float(augmented.max())
    if not (low >= 0 and high <= 1):  # not a number is neither
        raise ValueError(
            f"augment returns pixels from {low:.3g} to {high:.3g}; images are in [0, 1]: clip "
            "them, and leave normalization to the encoder, which has its own"
        )


def step_of(context: Context, recipe: Recipe, classifier: Classifier):
    """Returns ``(state, step)`` of a recipe; of one that chooses its layers, all move.

    Args:
      context: The run.
      recipe: One that is trained.
      classifier: What it starts from, or one of its shape.

    Raises:
      ValueError: If devices, batch or validation images do not fit each other.
    """
    rates = recipe.rates
    if recipe.select is not None:
        images, devices = len(context.downstream[1]), len(context.parallel.devices)
        if min(recipe.select.images, images) < devices:
            raise ValueError(
                f"select.images is {recipe.select.images} and there are {images} validation "
                f"images; at least one per device ({devices}) is needed"
            )
        rates = {"**": recipe.select.rate}  # which layers move will be known later
    context.parallel.check_batch(recipe.batch_size)
    encoder = public_encoder(context, recipe)
    steps = data.steps_per_epoch(len(context.downstream[0]), recipe.batch_size)
    replays = getattr(recipe.build_attack(encoder), "replays", 1)
    return fitting.build_step(
        *(context, recipe.name, recipe, classifier, encoder),
        rates=rates,
        steps_per_epoch=steps * replays,
        seed=context.plan.seed,
        teacher=untrained_teacher(context, recipe),
    )


def _check_saving(context: Context) -> None:
    """Writes and reads an untrained classifier of each kind, before hours are spent on one."""
    kinds = {}
    for recipe in context.plan.recipes.values():
        if recipe.is_trained and not is_made(context, recipe):
            first = recipe.first.text
            kinds[str((first["encoder"], first["head"], recipe.text["preprocess"]))] = recipe
    for recipe in kinds.values():
        classifier = untrained(context, recipe)
        builder, options = saving.builder_of(context, recipe)
        with tempfile.TemporaryDirectory() as folder, inside(f"config.recipes.{recipe.name}"):
            weights.save_classifier(classifier, folder, builder=builder, options=options or None)
            load_saved(context, recipe, folder)


def is_made(context: Context, recipe: Recipe) -> bool:
    """Returns whether the workdir has a recipe, as the plan has it, with all seeds.

    Raises:
      WorkdirError: If a manifest cannot be read.
    """
    code = code_inputs(fitting.settings_of(context, recipe))
    for seed in context.plan.training.seeds:
        manifest, expected = _begun(context, recipe, seed)
        if manifest is None or manifest["status"] != "done" or manifest["config"] != expected:
            return False
        if {n: v for n, v in manifest["inputs"].items() if n.startswith("code/")} != code:
            return False
    return True


def _begun(
    context: Context, recipe: Recipe, seed: int
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The manifest of a recipe, None where there is none, and the config it should have."""
    path = context.workdir / directory(recipe, seed)
    expected = json_ready(fitting.settings_of(context, recipe))
    if not (path / "manifest.json").exists():
        return None, expected
    manifest = read_manifest(path)
    if recipe.select is not None:  # which layers move was learned on the way
        expected["recipe"]["rates"] = manifest["config"].get("recipe", {}).get("rates")
    return manifest, expected


def _check_not_begun_otherwise(context: Context, recipe: Recipe) -> None:
    """Raises ConfigChangedError, with what differs; what has failed may be changed."""
    inputs = collected(context)
    for seed in context.plan.training.seeds:
        manifest, expected = _begun(context, recipe, seed)
        if manifest is not None and FAILED + model_name(recipe, seed) not in inputs:
            path = context.workdir / directory(recipe, seed)
            now = {"config": expected, "inputs": code_inputs(expected)}
            check_unchanged(path, manifest, now, collects=True)

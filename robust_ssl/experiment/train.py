"""The stage `train`: every recipe with every seed, each one training by the one step.

No recipe has a trainer of its own, so what differs between two is what they say.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Mapping, Set
from typing import Any, NamedTuple

import jax
from jax.errors import JaxRuntimeError

from robust_ssl import finetuning, models, optimizers, weights
from robust_ssl.build import Function
from robust_ssl.data.pictures import UnreadableError
from robust_ssl.experiment import fitting, saving, selection
from robust_ssl.experiment.context import Context, code_inputs, model_inputs
from robust_ssl.experiment.recipe import Recipe
from robust_ssl.parallel import everywhere
from robust_ssl.types import Classifier, Encoder
from robust_ssl.workdir import (
    ConfigChangedError,
    StageDirectory,
    WorkdirError,
    check_left,
    digest,
    fingerprint,
    json_ready,
    read_manifest,
)

_log = logging.getLogger(__name__)

FAILED = "failed/"  # before the name of a recipe that failed, among the inputs of `train`


class Trained(NamedTuple):
    """What `train` leaves.

    Attributes:
      results: Of each recipe with a seed, by `model_name`.
      failed: Why the others failed, likewise.
      passing: Those of `failed` that the device stopped, as when its memory is full; the next run
        tries them again.
    """

    results: Mapping[str, Mapping[str, Any]]
    failed: Mapping[str, str]
    passing: frozenset[str] = frozenset()


class _Failure(NamedTuple):
    why: str
    passing: bool


def model_name(recipe: Recipe, seed: int) -> str:
    """Returns what a recipe with a seed is called among classifiers."""
    return f"{recipe.name}-seed{seed}"


def directory(recipe: Recipe, seed: int) -> str:
    """Returns the stage name of a recipe with a seed."""
    return f"recipes/{model_name(recipe, seed)}"


def collected(context: Context) -> dict[str, str]:
    """The inputs of `train` so far: digests of recipes by name, those that failed marked."""
    path = context.workdir / "train"
    return read_manifest(path)["inputs"] if (path / "manifest.json").exists() else {}


# --- Classifiers --------------------------------------------------------------------------------


def public_encoder(context: Context, recipe: Recipe) -> Encoder:
    """Returns the public encoder that a recipe is built on."""
    source = recipe.public_encoder()
    return context.encoder if source is None else context.load_encoder(source)


def untrained(context: Context, recipe: Recipe, seed: int | None = None) -> Classifier:
    """Returns the classifier of a recipe's shape, with the weights before any training."""
    seed = context.plan.seed if seed is None else seed
    return _assemble(context, recipe, seed, lambda other: untrained(context, other, seed))


def untrained_teacher(context: Context, recipe: Recipe) -> Classifier | None:
    """Returns a classifier of the shape of a recipe's teacher; None where it has none."""
    return recipe.teacher and untrained(context, recipe.teacher)


def _assemble(context: Context, recipe: Recipe, seed: int, get) -> Classifier:
    """What training of a recipe starts from; `get` returns another recipe's classifier."""
    if recipe.members:
        return models.confidence_ensemble([get(other) for other in recipe.members])
    if recipe.start:
        classifier = get(recipe.start)
    else:
        head = recipe.build_head(context.num_classes)
        classifier = context.classifier(public_encoder(context, recipe), head, seed)
    if recipe.preprocess:
        if classifier.encoder.preprocess is not None:
            raise ValueError(
                f"preprocess of {recipe.name} would replace that of what it starts from, "
                f"{classifier.encoder.preprocess!r}; leave it out, or make one that does both"
            )
        encoder = classifier.encoder.replace(preprocess=recipe.preprocess())
        classifier = classifier.replace(encoder=encoder)
    if recipe.prune:
        params = optimizers.prune(classifier.variables["params"], recipe.prune)
        classifier = classifier.with_variables({**classifier.variables, "params": params})
    return classifier


def load_trained(context: Context, recipe: Recipe, seed: int) -> Classifier:
    """Returns the classifier of a recipe, which is made first where it is not there yet."""
    stage = train_recipe(context, recipe, seed)
    if not recipe.is_trained:  # it has no weights of its own
        return _assemble(context, recipe, seed, lambda r: load_trained(context, r, seed))
    try:
        classifier = load_saved(context, recipe, stage.path)
    except (OSError, ValueError) as error:  # no failure of the recipe
        raise WorkdirError(
            f"{stage.path / 'classifier'} cannot be read: {error}; bring it back from a copy, or "
            f"remove {stage.path / 'manifest.json'} to train it again from its last checkpoint"
        ) from error
    if fingerprint(classifier.variables) != stage.fingerprint:
        raise WorkdirError(
            f"{stage.path / 'classifier'} is not what was trained there; remove {stage.path} to "
            "train it again"
        )
    return classifier


def load_saved(context: Context, recipe: Recipe, folder: Any) -> Classifier:
    """Returns a classifier of a recipe from disk, with what only the recipe knows."""
    return weights.load_classifier(folder, **own_code(context, recipe))


def own_code(context: Context, recipe: Recipe) -> dict[str, Callable[..., Any]]:
    """Returns what `weights.load_classifier` has to be told of a recipe's classifier."""
    builder, _ = saving.builder_of(context, recipe)
    lineage = recipe.lineage()
    head = lineage[-1].head.bound if isinstance(lineage[-1].head, Function) else None
    steps = [other.preprocess for other in lineage if other.preprocess]
    preprocess = steps[0].function if steps else None
    code = {"builder": builder, "head": head, "preprocess": preprocess}
    return {name: function for name, function in code.items() if function is not None}


# --- Training -----------------------------------------------------------------------------------


def train_recipe(context: Context, recipe: Recipe, seed: int) -> StageDirectory:
    """Makes one recipe with one seed, and before it what it starts from.

    Args:
      context: The run.
      recipe: What is made.
      seed: Of the head's first weights, the batches and the keys; the data are the run's.

    Returns:
      The directory, ``recipes/NAME-seedSEED``; ``classifier/`` in it is the classifier.

    Raises:
      FloatingPointError: If training ends in updates that are not finite or had no other, or if
        none had a gradient.
    """
    start = _assemble(context, recipe, seed, lambda other: load_trained(context, other, seed))
    name = directory(recipe, seed)
    teacher = recipe.teacher and load_trained(context, recipe.teacher, seed)
    if not recipe.is_trained:
        return _as_it_is(context, recipe, seed, start)
    rates, extra, afterwards = recipe.rates, {}, None
    if recipe.select is not None:
        chosen = selection.choose_layers(context, f"{name}-layers", start, recipe.select, seed)
        rates = finetuning.rates_for(chosen.results["selected"], recipe.select.rate)
        spent = chosen.results["gradient_evaluations"] / len(context.downstream[0])
        extra = {
            "selected": chosen.results["selected"],
            "selection_seconds": chosen.manifest["seconds"],
            "selection_gradient_evaluations_per_image": spent,
        }
    _warn_if_still(recipe, start, rates)
    if recipe.tolerance is not None:
        afterwards = selection.guarded(context, start, recipe.tolerance)
    stage = fitting.fit(
        *(context, name, recipe, start, public_encoder(context, recipe)),
        rates=rates,
        seed=seed,
        teacher=teacher,
        afterwards=afterwards,
        extra=extra,
    )
    return stage


def _warn_if_still(recipe: Recipe, start: Classifier, rates: Mapping[str, Any]) -> None:
    """Warns of a new head that no rate moves: what it answers is random.

    It may be meant, as where batch statistics alone are adapted; a start has a trained head.
    """
    if recipe.start is None and not recipe.moves(start.variables["params"], rates):
        by_batch = recipe.batch_statistics != "frozen"
        _log.warning(
            "recipe %s: its rates freeze every parameter, and its head is new: its answers stay "
            "random, and %s. To train the head: rates {'head/**': 5e-3}",
            *(recipe.name, "only batch statistics change" if by_batch else "nothing is trained"),
        )


def _as_it_is(context: Context, recipe: Recipe, seed: int, classifier: Classifier):
    """A stage that trains nothing: an ensemble, an input transformation."""
    inputs = model_inputs("start", classifier)
    settings = fitting.settings_of(context, recipe)
    with context.open(directory(recipe, seed), settings, inputs, seed, redo=True) as stage:
        if not stage.done:
            counters = ("epochs", "steps", "skipped", "gradient_evaluations_per_image")
            results = dict.fromkeys(counters, 0)
            saving.save_classifier(context, stage, classifier, results, recipe)
            variables = fitting.classifier_variables(classifier.variables)
            stage.finish(results, identity=fingerprint(variables))
    return stage


def train(context: Context) -> StageDirectory:
    """Makes every recipe with every seed; one that fails is reported, and the others go on.

    Recipes and seeds may come to those of a finished stage.  What has failed is tried again when
    something comes, or when its recipe is changed: what it left is then set aside.  What the
    device stopped is tried again by the next run, from its last checkpoint.

    Returns:
      The stage's directory; its results are those of `Trained`.
    """
    recipes = list(context.plan.recipes.values())
    stopped = context.once("stopped by the device", set)  # a later stage does not try them again
    inputs = _inputs(context, stopped)
    settings = {"validation": context.plan.training.validation}
    with context.open("train", settings, inputs, collects=True) as stage:
        if not stage.done:
            trained = train_all(context, recipes)
            if not trained.results:
                reasons = "\n".join(f"  {model}: {why}" for model, why in trained.failed.items())
                raise FloatingPointError(f"every recipe failed:\n{reasons}")
            stopped |= trained.passing
            stage.manifest["inputs"] = _marked(stage.manifest["inputs"], trained)
            stage.finish({"trained": trained.results, "failed": trained.failed})
    _check_there(context, stage)
    return stage


def _inputs(context: Context, stopped: Set[str]) -> dict[str, str]:
    """Digests of what `train` reads and of its recipes; sets aside what changed ones have left."""
    train_set, validation = (part.fingerprint() for part in context.downstream)
    inputs = {
        **model_inputs("encoder", context.encoder),
        "train": train_set,
        "validation": validation,
    }
    before = collected(context)
    for recipe, seed in itertools.product(
        context.plan.recipes.values(), context.plan.training.seeds
    ):
        settings = fitting.settings_of(context, recipe)
        text = digest([json_ready(settings), code_inputs(settings)])
        model = model_name(recipe, seed)
        failed_with = before.get(FAILED + model)
        if model not in stopped:
            inputs[FAILED + model if failed_with == text else model] = text
        if failed_with not in (None, text):
            _set_aside(context, recipe, seed)
    return inputs


def _check_there(context: Context, stage: StageDirectory) -> None:
    """Makes again what is gone of a finished `train`; says what had failed."""
    for model, why in stage.results["failed"].items():
        again = f"changed, or without {stage.path / 'manifest.json'}, it is tried again"
        if FAILED + model not in stage.manifest["inputs"]:
            again = "the next run tries it again"
        message = f"{model} failed, and is left out: {why}; {again}"
        # Once in a run: every later stage asks for what was trained.
        context.once(("warned", message), functools.partial(_log.warning, "%s", message))
    for recipe, seed in itertools.product(
        context.plan.recipes.values(), context.plan.training.seeds
    ):
        if model_name(recipe, seed) not in stage.results["trained"]:
            continue
        path = context.workdir / directory(recipe, seed)
        there = (path / "manifest.json").exists()
        manifest = read_manifest(path) if there else None
        if everywhere(manifest is not None and manifest["status"] == "done"):
            check_left(path, manifest, made="trained", redo=not recipe.is_trained)
        else:
            _log.warning("%s is not there any more, and is made again", path)
            train_recipe(context, recipe, seed)


def _marked(inputs: Mapping[str, str], trained: Trained) -> dict[str, str]:
    """Inputs in which recipes are marked that failed this time, and no others.

    What the device stopped is not among them, so that it comes to the next run as a new one.
    """
    marked = {}
    for name, text in inputs.items():
        model = name.removeprefix(FAILED)
        if model not in trained.passing:
            marked[FAILED + model if model in trained.failed else model] = text
    return marked


def layers_of(context: Context, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Returns the ``scores`` and the ``selected`` layers of a finished recipe that chose some."""
    return read_manifest(context.workdir / f"{directory(recipe, seed)}-layers")["results"]


def trained(context: Context) -> Trained:
    """Returns what `train` leaves; nothing where the plan has no recipes."""
    if not context.plan.recipes:
        return Trained({}, {})
    stage = train(context)
    return Trained(stage.results["trained"], stage.results["failed"])


def scored(context: Context, done: Trained) -> list[tuple[Recipe, int]]:
    """Returns the scored recipes with each seed that they were made with."""
    pairs = itertools.product(context.plan.scored, context.plan.training.seeds)
    return [(recipe, seed) for recipe, seed in pairs if model_name(recipe, seed) in done.results]


def twins_of(context: Context, models: Mapping[str, Any]) -> dict[str, str]:
    """Returns the model of another seed for each recipe's, where that is asked for and made.

    It is that of the seed before, and of the last seed for the first, so each seed attacks one.
    Were one of them to attack all, seeds would not be independent.  A seed that comes later gives
    the first one another twin.
    """
    twins: dict[str, str] = {}
    if context.plan.scoring.twin and context.plan.scoring.adaptive:
        for recipe in context.plan.scored:
            names = [model_name(recipe, seed) for seed in context.plan.training.seeds]
            made = [name for name in names if name in models]
            twins |= dict(zip(made, [*made[-1:], *made[:-1]], strict=True))
    return {name: twin for name, twin in twins.items() if name != twin}


def train_all(context: Context, recipes: list[Recipe], seeds: Any = None) -> Trained:
    """Makes recipes with all seeds, each after what it is made from.

    A wish to stop, and a workdir that was made otherwise or cannot be used, are no failures of a
    recipe, and are raised.
    """
    results: dict[str, Any] = {}
    failed: dict[str, _Failure] = {}
    for seed in context.plan.training.seeds if seeds is None else seeds:
        for recipe in recipes:
            for other in reversed(recipe.chain()):
                _try(context, other, seed, results, failed)
    reasons = {model: failure.why for model, failure in failed.items()}
    passing = frozenset(model for model, failure in failed.items() if failure.passing)
    return Trained(results, reasons, passing)


def _try(context: Context, recipe: Recipe, seed: int, results: dict, failed: dict) -> None:
    model = model_name(recipe, seed)
    if model in results or model in failed:
        return
    for other in recipe.needs:
        _try(context, other, seed, results, failed)
        if model_name(other, seed) in failed:
            why = f"it is made from {model_name(other, seed)}, which failed"
            failed[model] = _Failure(why, failed[model_name(other, seed)].passing)
            return
    try:
        results[model] = train_recipe(context, recipe, seed).results
    except (ConfigChangedError, WorkdirError, UnreadableError):
        raise  # none of these is the recipe's fault
    except (FloatingPointError, ValueError, TypeError, KeyError, JaxRuntimeError) as error:
        if jax.process_count() > 1 and not isinstance(error, FloatingPointError):
            raise  # another process may be gone, which says nothing of the recipe
        failed[model] = _Failure(str(error), passing=isinstance(error, JaxRuntimeError))
        _log.error("%s failed, the others go on: %s", model, error)


def _set_aside(context: Context, recipe: Recipe, seed: int) -> None:
    """Renames what a recipe that failed has left, so that a changed one begins anew."""
    for stage in (directory(recipe, seed), f"{directory(recipe, seed)}-layers"):
        path = context.workdir / stage
        if path.exists() and jax.process_index() == 0:
            number = 1 + len(list(path.parent.glob(f"{path.name}-failed*")))
            path.rename(path.with_name(f"{path.name}-failed{number}"))
    everywhere(True)  # no process opens the directory before

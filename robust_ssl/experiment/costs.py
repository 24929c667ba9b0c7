"""What recipes cost, their steps timed in turn beside the one that all are held against."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from robust_ssl import data, finetuning
from robust_ssl.experiment import batch_parts, features, fitting, train
from robust_ssl.experiment.context import Context
from robust_ssl.experiment.recipe import Recipe
from robust_ssl.stopping import Stopped, stop_requested

# Of a recipe's own training, without that of what it starts from.
OWN = ("seconds_per_step", "seconds_per_image", "gradients_per_epoch", "peak_bytes")
_LONG_EPOCH = 10**6  # updates: none that is timed leaves the phase of a ramp that it began in


def check(context: Context, stages: str = "cost*") -> None:
    """Raises ConfigChangedError if the workdir has costs that were measured otherwise."""
    for path in sorted(context.workdir.glob(stages)):
        # Each has the seed of what it measured.
        context.check_unchanged(path.name, _timing(context), any_seed=True)


def _timing(context: Context) -> dict[str, Any]:
    names = ("reference", "memory", "rounds", "steps_per_round")
    return {name: getattr(context.plan.compare, name) for name in names}


def measure(
    context: Context, recipes: Sequence[Recipe], seed: int, stage: str = "cost"
) -> dict[str, Any]:
    """Returns what the training of finished recipes costs, relative to ``compare.reference``.

    Steps of all recipes are timed in turn in one process (`finetuning.measure`); a recipe's time is
    its steps', with those of all it starts from.  Choosing layers counts by its gradients, each of
    which takes what one in the reference's step takes: its own wall time has compiling in it.
    Nothing is trained here.

    Args:
      context: The run.
      recipes: Those that are finished; what they start from comes with them.  Where the reference
        is not among them, because it failed, there are no factors.
      seed: They were made with.
      stage: Where the measurement is kept.

    Returns:
      By recipe: ``factor`` (training time over the reference's; None without it), ``gradients``
      (gradient evaluations per image, over the reference's epochs), and the numbers `OWN`, None
      where nothing was trained.

    Raises:
      Stopped: If a stop was asked for, before the next step is compiled or timed.
    """
    reference = context.plan.recipes[context.plan.compare.reference]
    everything = list(dict.fromkeys(other for recipe in recipes for other in recipe.chain()))
    # Also of what others start from: who asks for one of those later finds it.
    chains = {recipe: recipe.chain() for recipe in everything}
    stages = {recipe: train.train_recipe(context, recipe, seed) for recipe in everything}
    inputs = {recipe.name: stage.fingerprint for recipe, stage in stages.items()}
    with context.open(stage, _timing(context), inputs, seed, collects=True) as directory:
        lacking = {recipe.name for recipe in recipes} - {*directory.results}
        if not directory.done or lacking:
            results = {recipe: stage.results for recipe, stage in stages.items()}
            trained = [recipe for recipe in everything if results[recipe]["epochs"]]
            stopping = functools.partial(_check_stop, stage)
            steps = _measure_steps(context, trained, results, stopping)
            own = {r: _own(r, results[r], steps.get(r)) for r in everything}
            epochs, whole = reference.epochs, {}
            if reference in chains:
                epochs = results[reference]["epochs"]
                whole = {
                    recipe: _seconds(context, chain, results, own)
                    for recipe, chain in chains.items()
                }
            directory.finish(
                {
                    recipe.name: {
                        "factor": whole[recipe] / whole[reference] if whole else None,
                        "gradients": total_gradients(results[r] for r in chain) / max(epochs, 1),
                        **own[recipe],
                    }
                    for recipe, chain in chains.items()
                },
            )
    return directory.results


def _check_stop(stage: str) -> None:
    if stop_requested():
        raise Stopped(f"{stage} stopped while it timed the steps of training")


def _own(recipe: Recipe, results: Mapping[str, Any], cost: finetuning.Cost | None) -> dict:
    """What a recipe's own training costs, without that of what it starts from."""
    if cost is None:
        return dict.fromkeys(OWN)
    # An epoch has as many times more steps as each batch is shown.
    replays = getattr(recipe.build_attack(None), "replays", 1)
    return {
        "seconds_per_step": cost.seconds_per_step,
        "seconds_per_image": cost.seconds_per_step * replays / recipe.batch_size,
        "gradients_per_epoch": results["gradient_evaluations_per_image"] / results["epochs"],
        "peak_bytes": cost.peak_bytes,
    }


def total_seconds(context: Context, recipe: Recipe, seed: int) -> float:
    """Returns what a finished recipe took with all it starts from, from start to end."""
    stages = [train.train_recipe(context, other, seed) for other in recipe.chain()]
    return sum(
        stage.manifest["seconds"] + stage.results.get("selection_seconds", 0) for stage in stages
    )


def total_gradients(results: Iterable[Mapping[str, Any]]) -> float:
    """Returns gradient evaluations per image of some finished recipes, choosing layers included."""
    return sum(
        one["gradient_evaluations_per_image"]
        + one.get("selection_gradient_evaluations_per_image", 0)
        for one in results
    )


def _seconds(
    context: Context,
    chain: Sequence[Recipe],
    results: Mapping[Recipe, Mapping[str, Any]],
    own: Mapping[Recipe, Mapping[str, Any]],
) -> float:
    """Training time of a chain of recipes by the measured steps, without validation."""
    reference = own[context.plan.recipes[context.plan.compare.reference]]
    per_gradient = reference["seconds_per_image"] / reference["gradients_per_epoch"]
    total = 0.0
    for recipe in chain:
        if results[recipe]["epochs"]:
            selecting = results[recipe].get("selection_gradient_evaluations_per_image", 0)
            if recipe.cache_features:  # the one pass, as if it had a gradient
                selecting += results[recipe]["gradient_evaluations_per_image"]
            total += results[recipe]["steps"] * own[recipe]["seconds_per_step"]
            total += selecting * len(context.downstream[0]) * per_gradient
    return total


def _measure_steps(
    context: Context,
    recipes: Sequence[Recipe],
    results: Mapping[Recipe, Mapping[str, Any]],
    check_stop: Callable[[], None],
) -> dict[Recipe, finetuning.Cost]:
    settings, compiled, states = context.plan.compare, {}, {}
    clean = {}  # of those recipes whose attack has no budget for a while: steps of that while
    for recipe in recipes:
        check_stop()
        rates = recipe.rates
        if recipe.select is not None:
            rates = finetuning.rates_for(results[recipe]["selected"], recipe.select.rate)
        decided = batch_parts.as_trained(recipe, results[recipe])
        state, step = fitting.build_step(
            *(context, recipe.name, decided, train.untrained(context, recipe)),
            train.public_encoder(context, recipe),
            rates=rates,
            steps_per_epoch=_steps_per_epoch(recipe, results[recipe]),
            seed=context.plan.seed,
            teacher=train.untrained_teacher(context, recipe),
        )
        compiled[recipe] = step.compiled(context.parallel)
        if recipe.cache_features:
            compiled[recipe] = _on_features(context, recipe, compiled[recipe])
        # At its end a ramp has the whole attack.
        end = 0 if recipe.ramp is None else recipe.epochs * _LONG_EPOCH
        states[recipe] = context.parallel.replicate(state.replace(step=state.step + end))
        if results[recipe].get("clean_epochs"):
            clean[recipe] = f"{recipe.name}, clean"
            compiled[clean[recipe]] = compiled[recipe]
            states[clean[recipe]] = context.parallel.replicate(state)
    batches = data.Batches(
        context.downstream[0],
        context.plan.recipes[settings.reference].batch_size,
        seed=context.plan.seed,
        stage="cost",
        parallel=context.parallel,
    )
    measured = finetuning.measure(
        compiled,
        states,
        batches(0),
        rounds=settings.rounds,
        steps_per_round=settings.steps_per_round,
        memory=settings.memory,
        before_each=check_stop,
    )
    return {
        recipe: _on_average(measured[recipe], measured.get(clean.get(recipe)), results[recipe])
        for recipe in recipes
    }


def _on_features(context: Context, recipe: Recipe, step: finetuning.Step) -> Any:
    """The step of a recipe that caches features, for a batch of images, in whose place some are."""
    shape = features.shapes(recipe.batch_size, train.public_encoder(context, recipe).dim)
    cached = context.parallel.put(np.zeros(shape.shape, shape.dtype))
    return lambda state, batch: step(state, {**batch, "images": cached})


def _steps_per_epoch(recipe: Recipe, results: Mapping[str, Any]) -> int:
    """As many as it was trained with, since others are another program; more under a ramp."""
    return results["steps"] // results["epochs"] if recipe.ramp is None else _LONG_EPOCH


def _on_average(
    attacked: finetuning.Cost, clean: finetuning.Cost | None, results: Mapping[str, Any]
) -> finetuning.Cost:
    """The cost of a step over a training of which a part is not attacked."""
    if clean is None:
        return attacked
    share = results["clean_epochs"] / results["epochs"]
    seconds = share * clean.seconds_per_step + (1 - share) * attacked.seconds_per_step
    return attacked._replace(seconds_per_step=seconds)

"""What a run will take, by attack and by recipe, from its plan and traced steps: nothing is run."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax

from robust_ssl import data, finetuning, optimizers
from robust_ssl.experiment import fitting, trace, train
from robust_ssl.experiment.context import Context
from robust_ssl.experiment.recipe import Recipe


class Forecast(NamedTuple):
    """What the training of a recipe takes, each seed alike.

    Attributes:
      name: The recipe's.
      start: What it starts from; None is the public encoder.
      epochs: Passes over the training images; patience may end it earlier.
      steps: Updates.
      parameters: Numbers in its parameters.
      trained: How many of them move; None where it chooses its layers on the way.
      gradients: Gradient evaluations per training image, the attack's and the updates'.  Time goes
        with it.
      state_bytes: Memory of parameters, optimizer and attack.
      step_bytes: Memory that the compiled step plans on a device; None where nobody asked.
    """

    name: str
    start: str | None
    epochs: int
    steps: int
    parameters: int
    trained: int | None
    gradients: int
    state_bytes: int
    step_bytes: int | None


class Fit(NamedTuple):
    """What fitting an attack of the suite takes.

    Attributes:
      name: The attack's.
      steps: Of the fit, which all members share.
      members: Perturbations, one for each seed and budget.
      gradients: Gradients with respect to an image, for each of them.
    """

    name: str
    steps: int
    members: int
    gradients: int


def fits(context: Context) -> list[Fit]:
    """Returns what each attack on the public encoder takes."""
    suite = context.plan.suite
    return [
        Fit(
            name,
            0 if attack.is_noise else attack.num_steps,
            len(suite.seeds) * len(attack.budgets_for(curve=True)),
            attack.gradients,
        )
        for name, attack in suite.attacks.items()
    ]


def forecasts(context: Context, *, memory: bool = False) -> list[Forecast]:
    """Returns what each recipe takes, in the order in which they are made.

    Args:
      context: The run, checked.
      memory: Whether each step is compiled, to ask how much memory it plans: some seconds each.
    """
    return [_forecast(context, recipe, memory) for recipe in context.plan.in_order()]


def _forecast(context: Context, recipe: Recipe, memory: bool) -> Forecast:
    classifier = train.untrained(context, recipe)
    start = "+".join(other.name for other in recipe.needs) or None
    params = classifier.variables["params"]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    if not recipe.is_trained:
        stored = 0 if recipe.members else _bytes(classifier.variables)
        return Forecast(recipe.name, start, 0, 0, parameters, 0, 0, stored, None)
    state, step, batch = trace.step_of(context, recipe, classifier)
    attack = recipe.build_attack(train.public_encoder(context, recipe))
    per_epoch = data.steps_per_epoch(len(context.downstream[0]), recipe.batch_size)
    per_epoch *= getattr(attack, "replays", 1)
    clean = fitting.clean_epochs(recipe, per_epoch, recipe.epochs)
    return Forecast(
        name=recipe.name,
        start=start,
        epochs=recipe.epochs,
        steps=recipe.epochs * per_epoch,
        parameters=parameters,
        trained=None if recipe.select else _trained(params, recipe.rates),
        gradients=round(fitting.gradients(attack, step.passes, recipe.epochs, clean)),
        state_bytes=_bytes(state),
        step_bytes=_planned(step, state, batch) if memory else None,
    )


def _trained(params: Any, rates: Any) -> int:
    table = optimizers.layer_table(params, optimizers.layer_rates(params, rates))
    return sum(row.size for row in table if row.rate != optimizers.FREEZE)


def _planned(step: Any, state: Any, batch: Any) -> int | None:
    function = jax.jit(functools.partial(step.function, settings=step.settings), donate_argnums=0)
    return finetuning.planned_bytes(function, state, batch)


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if hasattr(leaf, "nbytes"))

"""What a run will take, by attack and by recipe, from its plan and traced steps: nothing is run."""

from __future__ import annotations

import functools
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from robust_ssl import data, optimizers
from robust_ssl.experiment import batch_parts, fitting, trace, train
from robust_ssl.experiment.context import Context
from robust_ssl.experiment.recipe import AUTO, Recipe
from robust_ssl.experiment.scoring_section import Scoring
from robust_ssl.types import Classifier


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
    state, step = trace.step_of(batch_parts.alone(context), recipe, classifier)
    attack = recipe.build_attack(train.public_encoder(context, recipe))
    per_epoch = data.steps_per_epoch(len(context.downstream[0]), recipe.batch_size)
    per_epoch *= getattr(attack, "replays", 1)
    clean = fitting.clean_epochs(recipe, per_epoch, recipe.epochs)
    passes = (attack, step.passes, recipe.epochs, clean, recipe.cache_features)
    return Forecast(
        name=recipe.name,
        start=start,
        epochs=recipe.epochs,
        steps=recipe.epochs * per_epoch,
        parameters=parameters,
        trained=None if recipe.select else _trained(params, recipe),
        gradients=round(fitting.gradients(*passes)),
        state_bytes=_bytes(state),
        step_bytes=_planned(context, recipe, classifier) if memory else None,
    )


def _trained(params: Any, recipe: Recipe) -> int:
    table = optimizers.layer_table(params, recipe.layer_rates(params, recipe.rates))
    moving = sum(row.size for row in table if row.rate != optimizers.FREEZE)
    if recipe.lora is not None:
        adapters = recipe.lora.adapters(params, jax.random.key(0))["params"]
        moving += sum(leaf.size for leaf in jax.tree.leaves(adapters))
    return moving


def _planned(context: Context, recipe: Recipe, classifier: Classifier) -> int | None:
    def build(run: Context, decided: Recipe) -> tuple[Any, Any]:
        return trace.step_of(run, decided, classifier)

    if recipe.accumulate == AUTO:
        return batch_parts.choose(context, recipe, classifier, (), build)["step_bytes"]
    state, step = build(batch_parts.alone(context), recipe)
    return batch_parts.planned(step, state, batch_parts.batch_shapes(context, recipe, classifier))


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if hasattr(leaf, "nbytes"))


# --- Seconds ------------------------------------------------------------------------------------

# What convolutions reach of a large matrix product: measured on CPU, 16 to 32 channels.
_EFFICIENCY = 0.6
_EXAMINATION = 0.5  # of what the per-image attacks of a model take; small samples cost more


def image_gradients(context: Context) -> float:
    """Returns how many gradients with respect to one image the stages of a run take, about.

    A pass without a gradient counts a third.  Validation and the examination are in it, reading
    and drawing are not.
    """
    planned, stages = context.plan, {*context.plan.stages}
    total = 0.0
    scored = [r for r in planned.scored if stages & {"score", "compare"}]
    if planned.suite is not None and stages & {"attack", "score", "compare"}:
        fitted = fits(context)
        each = sum(fit.gradients * fit.members for fit in fitted)
        at_main = sum(fit.gradients * len(planned.suite.seeds) for fit in fitted)
        moved = [r for r in scored if planned.scoring.adaptive and not _is_frozen(r)]
        seeds = len(planned.training.seeds)
        total += each + at_main * len(moved) * (seeds + planned.scoring.half_twin)
    if stages & {"train", "score", "compare"}:
        seeds = len(planned.training.seeds)
        # What an attacker makes of half of the images costs half of a training.
        seeds += 0.5 * (planned.scoring.half_twin and bool(stages & {"score", "compare"}))
        total += seeds * sum(_of_training(context, recipe) for recipe in planned.in_order())
    if scored or (planned.classifiers and "score" in stages):
        models = len(scored) * len(planned.training.seeds) + len(planned.classifiers)
        total += models * (_of_scoring(context) + _with_labels(planned.scoring))
    return total


def _with_labels(scoring: Scoring) -> int:
    """The gradients of the attacks that know a model's head and labels."""
    if scoring.labelled is None:
        return 0
    return len(scoring.labelled.seeds) * sum(a.gradients for a in scoring.labelled.attacks.values())


def _is_frozen(recipe: Recipe) -> bool:
    return recipe.lora is None and all(
        rate == optimizers.FREEZE
        for path, rate in recipe.rates.items()
        if not path.startswith("head")
    )


def _of_training(context: Context, recipe: Recipe) -> float:
    train_set, validation = context.downstream
    if not recipe.is_trained:
        return 0.0
    attack = recipe.build_attack(context.encoder)
    spent = getattr(attack, "gradient_evaluations", 0)
    passes = 1 if attack is None else 2
    judge = context.plan.training.validation.build(context.encoder)
    judged = len(validation) * (judge.gradient_evaluations if spent else 1 / 3)
    gradients = fitting.gradients(attack, passes, recipe.epochs, cached=recipe.cache_features)
    total = len(train_set) * gradients
    total += (1 if recipe.cache_features else recipe.epochs) * judged
    if recipe.select is not None:
        images = min(recipe.select.images, len(validation))
        layers = len(jax.tree.leaves(context.encoder.variables["params"])) / 3  # kernels, about
        total += images * (judge.gradient_evaluations + layers * recipe.select.num_steps)
    return total


def _of_scoring(context: Context) -> float:
    scoring, images = context.plan.scoring, len(context.test)
    each = [
        getattr(attack, "gradient_evaluations", 0)
        for budget in scoring.per_image.scored
        for entry in scoring.per_image.at(budget).values()
        if entry.target is None
        for attack in [entry.build(budget.threat, None)]
    ]
    per_image = min(images, scoring.per_image.images or images) * sum(each) * len(scoring.seeds)
    # Some 100 steps of two APGDs and 5,000 queries, for those few that withstand the first one.
    some = min(images, scoring.autoattack.images or images)
    ensemble = len(scoring.autoattack.budgets) * some * 700.0
    perturbations = len(context.plan.suite.attacks) if context.plan.suite else 0
    examined = _EXAMINATION * per_image if scoring.checks else 0.0
    return per_image + ensemble + images * (perturbations + 2) / 3 + examined


def seconds(context: Context) -> float:
    """Returns what the steps of a run take on its devices, seconds, within a factor of two or so.

    From the arithmetic of the public encoder's forward pass and the speed of a matrix product,
    which is measured.  Compiling is not in it.
    """
    size = context.encoder.image_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    cost = jax.jit(lambda model, x: model(x).features).lower(context.encoder, image).cost_analysis()
    forward = float((cost or {}).get("flops", math.nan))
    rate = _EFFICIENCY * _flops_per_second() * len(context.parallel.devices)
    return 3 * forward * image_gradients(context) / rate


@functools.cache
def _flops_per_second(size: int = 768) -> float:
    """Returns the speed of one device in a matrix product, the best of five."""
    product = jax.jit(lambda x: x @ x)
    x = jax.block_until_ready(product(jnp.ones((size, size), jnp.float32)))
    best = math.inf
    for _ in range(5):
        begun = time.perf_counter()
        jax.block_until_ready(product(x))
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def can_be_told(context: Context) -> bool:
    """Whether there is an estimate: of pre-training and of the stages after it there is none."""
    stages = {*context.plan.stages}
    return "pretrain" not in stages and bool(stages & {"attack", "train", "score", "compare"})


def line(context: Context) -> str:
    """Returns a line for the start of a run: about how long its steps take."""
    count = len(context.parallel.devices)
    kind = context.parallel.devices[0].platform
    return (
        f"about {_duration(seconds(context))} of steps on {count} {kind} device"
        f"{'s' if count > 1 else ''}, an estimate; less what is done, and with compiling on top "
        "the first time"
    )


def _duration(amount: float) -> str:
    """Says a time as people do.

    Example:
      >>> [_duration(x) for x in (3, 75, 500, 9000)]
      ['3 s', '80 s', '8 min', '2.5 h']
    """
    if amount < 100:
        return f"{amount:.0f} s" if amount < 10 else f"{round(amount, -1):.0f} s"
    return f"{amount / 60:.0f} min" if amount < 5400 else f"{amount / 3600:.1f} h"

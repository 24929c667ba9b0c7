"""One fit: a classifier, a recipe's values and the data in, the kept epoch's classifier out."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax

from robust_ssl import data, evaluation, finetuning, optimizers
from robust_ssl.build import text_of
from robust_ssl.experiment import alarm, batch_parts, features, saving
from robust_ssl.experiment.context import Context, model_inputs
from robust_ssl.experiment.loop import Best, check_gradient, stage_key, train
from robust_ssl.experiment.recipe import Recipe
from robust_ssl.finetuning import UniversalPool
from robust_ssl.types import Classifier, Encoder, TrainState, Variables
from robust_ssl.workdir import StageDirectory, fingerprint

_log = logging.getLogger(__name__)

Afterwards = Callable[[Variables], tuple[Variables, dict[str, Any]]]


def build_step(
    context: Context,
    name: str,
    recipe: Recipe,
    classifier: Classifier,
    encoder: Encoder,
    *,
    rates: Mapping[str, Any],
    steps_per_epoch: int,
    seed: int,
    teacher: Classifier | None = None,
    show: bool = False,
):
    """Returns ``(state, step)`` of a fit, before its first step.

    Whatever the seed, the steps of a recipe are one computation, traced and compiled once.

    Args:
      context: The run.
      name: The directory's, from which keys are made.
      recipe: Losses, attack, optimization, batch statistics, augmentation.
      classifier: What it starts from.
      encoder: The public encoder that losses and attacks compare with.
      rates: Path pattern to learning rate: the recipe's, or those of the layers it has chosen.
      steps_per_epoch: Updates per epoch.
      seed: Of the keys.
      teacher: The classifier of the recipe's teacher.
      show: Whether the table of learning rates is logged.

    Raises:
      ValueError: If the recipe has an attack, and nothing reads what it makes.
    """
    attack = recipe.build_attack(encoder)
    total = recipe.epochs * steps_per_epoch
    budget = recipe.budget(total)
    # Rates decay by the pass over the data, however often each batch is replayed.
    passed = max(1, steps_per_epoch // getattr(attack, "replays", 1))
    params = classifier.variables["params"]
    key = stage_key(seed, name)
    by_path, adapters = recipe.layer_rates(params, rates), None
    if recipe.lora is not None:
        params, by_path, adapters = _adapted(recipe.lora, params, by_path, key)
    if show:
        table = optimizers.render_table(optimizers.layer_table(params, by_path))
        _log.info("%s: learning rates\n%s", name, table)
    if recipe.cache_features:
        features.check(recipe, classifier, by_path)
        classifier = features.on_features(classifier)
    tx, frozen = optimizers.fine_tuning_optimizer(
        params,
        by_path,
        weight_decay=recipe.weight_decay,
        decay=recipe.decay,
        steps_per_epoch=passed,
        total_steps=total,
        l2_sp=recipe.l2_sp,
        hold_zeros=recipe.prune > 0,
    )
    step = finetuning.make_step(
        classifier,
        tx,
        losses=recipe.weighted_losses,
        key=key,
        attack=attack,
        budget=budget,
        frozen=frozen,
        axis_name=context.parallel.axis_name,
        pretrained=encoder if recipe.compare_with_pretrained else None,
        teacher=teacher,
        ema=recipe.ema or None,
        accumulate=recipe.parts,
        remat=recipe.remat,
        batch_statistics=recipe.batch_statistics,
        augment=None if recipe.augment is None else recipe.augment.bound,
    )
    _check_attack_is_read(recipe, step)
    step = _shared(context, recipe, classifier, step, (by_path, passed, total))
    first = attack if budget is None else finetuning.scaled(attack, budget(0))
    state = finetuning.init_state(
        # Far above any step, so that no step has this key.
        *(classifier, tx, first),
        key=jax.random.fold_in(key, 2**31),
        batch_size=recipe.batch_size,
        num_images=len(context.downstream[0]),
        average=recipe.ema > 0,
        adapters=adapters,
    )
    return state, step


def _adapted(lora: Any, params: Any, by_path: Mapping[str, Any], key: jax.Array) -> tuple:
    """Returns parameters with those of adapters, the rate of each, and the adapters."""
    # Far above any step, so that no step has this key.
    adapters = lora.adapters(params, jax.random.fold_in(key, 2**31 + 1))
    more = optimizers.layer_rates(adapters["params"], {"**": lora.rate})
    return {**params, **adapters["params"]}, {**by_path, **more}, adapters


def _check_attack_is_read(recipe: Recipe, step: finetuning.Step) -> None:
    """Raises ValueError for an attack that changes nothing: training would be on clean images."""
    by_statistics = recipe.batch_statistics in ("adversarial", "both", "twins")
    # An adv_ratio of 0 says that adversarial images weigh nothing, as the end of a sweep does.
    if recipe.attack is None or by_statistics or recipe.adv_ratio == 0:
        return
    if "adversarial" not in step.read:
        raise ValueError(
            f"recipe {recipe.name} has an attack, and none of its losses "
            f"({', '.join(recipe.losses)}) reads inputs.adversarial: it would be trained on clean "
            "images; let a loss read that, or leave out the attack"
        )


def _shared(
    context: Context, recipe: Recipe, classifier: Classifier, step: finetuning.Step, schedule: Any
) -> finetuning.Step:
    """The step with the computation of one that was built like it before in this run."""
    if recipe.l2_sp or recipe.prune:  # their first weights are in the program
        return step
    kind = jax.tree.map(lambda x: (x.shape, str(x.dtype)), classifier.variables)
    made_of = repr((recipe.text, schedule, recipe.parts, kind, step.passes))
    key = ("step", made_of, jax.tree.structure(classifier), context.parallel)
    return dataclasses.replace(step, computation=context.once(key, lambda: step.computation))


def settings_of(context: Context, recipe: Recipe) -> dict[str, Any]:
    """Returns what a recipe's directory keeps as its config."""
    if not recipe.is_trained:
        return {"recipe": recipe.text}
    return {"recipe": dict(recipe.text), "validation": text_of(context.plan.training.validation)}


def fit(
    context: Context,
    name: str,
    recipe: Recipe,
    classifier: Classifier,
    encoder: Encoder,
    *,
    rates: Mapping[str, Any],
    seed: int,
    teacher: Classifier | None = None,
    afterwards: Afterwards | None = None,
    extra: Mapping[str, Any] | None = None,
) -> StageDirectory:
    """Trains a classifier by a recipe and leaves the best epoch's, or the last one's.

    Args:
      context: The run.
      name: The directory's.
      recipe: What to do.
      classifier: What it starts from.
      encoder: The public encoder that it is built on.
      rates: As for `build_step`.
      seed: Of batches and keys.
      teacher: The classifier of the recipe's teacher.
      afterwards: What is done to the best variables; returns them and more results.
      extra: Results that are there before.

    Raises:
      FloatingPointError: If training had no finite update, or none with a gradient.
    """
    train_set, validation = context.downstream
    inputs = {
        **model_inputs("start", classifier),
        **model_inputs("encoder", encoder),
        **(model_inputs("teacher", teacher) if teacher else {}),
        "train": train_set.fingerprint(),
        "validation": validation.fingerprint(),
    }
    settings = settings_of(context, recipe)
    settings["recipe"]["rates"] = dict(rates)  # of a recipe that chooses its layers, those it chose
    with context.open(name, settings, inputs, seed, made="trained") as stage:
        if stage.done:
            return stage
        attack = recipe.build_attack(encoder)
        batches, validation = _batches(context, name, recipe, classifier, attack, seed)
        epoch = batches.steps_per_epoch
        schedule = {"rates": rates, "steps_per_epoch": epoch, "seed": seed, "teacher": teacher}
        recipe, divided = batch_parts.with_parts(
            *(context, stage, recipe, classifier, jax.tree.leaves(batches.resident_set)),
            lambda run, tried: build_step(run, name, tried, classifier, encoder, **schedule),
        )
        state, step = build_step(context, name, recipe, classifier, encoder, show=True, **schedule)
        state, best = train(
            stage,
            state,
            step,
            batches,
            epochs=recipe.epochs,
            parallel=context.parallel,
            progress=context.progress,
            **_selection(context, stage, recipe, classifier, attack, validation, epoch),
        )
        if recipe.moves(classifier.variables["params"], rates):
            check_gradient(stage)
        variables = classifier_variables((best or state).variables)
        variables, more = afterwards(variables) if afterwards else (variables, {})
        overfitted = alarm.overfitted(stage.metrics(), len(alarm.looked_at(recipe, validation)))
        overfitting = {"catastrophic_overfitting": overfitted}
        summary = _summary(state, best, epoch, recipe, attack, step.passes)
        results = {**(extra or {}), **summary, **divided, **overfitting, **more}
        trained = classifier.with_variables(variables)
        saving.save_classifier(context, stage, trained, results, recipe)
        stage.finish(results, identity=fingerprint(variables))
    return stage


def _batches(
    context: Context, name: str, recipe: Recipe, classifier: Classifier, attack: Any, seed: int
) -> tuple[data.Batches, Any]:
    """Returns the training batches and the validation images; features where those are cached."""
    (train_set, validation), resident = context.downstream, None
    if recipe.cache_features:
        train_set, validation = features.cached(
            *(context.downstream, classifier.encoder, context.parallel),
            context.plan.training.batch_size,
        )
        resident = train_set.resident
    how = {"parallel": context.parallel, "resident": resident}
    how["replays"] = getattr(attack, "replays", 1)
    return data.Batches(train_set, recipe.batch_size, seed=seed, stage=name, **how), validation


def _selection(
    context: Context,
    stage: StageDirectory,
    recipe: Recipe,
    classifier: Classifier,
    attack: Any,
    validation: Any,
    steps_per_epoch: int,
) -> dict[str, Any]:
    """How `train` finds the epoch to keep; where the last one is taken, what rings of one step."""
    best = recipe.best
    if best == "last" and not alarm.takes_one_step(attack):
        return {}
    # The last epoch is looked at in any case.
    first = min(clean_epochs(recipe, steps_per_epoch, recipe.epochs), recipe.epochs - 1)
    template = features.on_features(classifier) if recipe.cache_features else classifier
    images = alarm.looked_at(recipe, validation)

    def at_epoch_end(epoch: int, variables: Variables) -> dict[str, float]:
        if epoch <= first:  # nothing has been attacked yet, so it is no best epoch either
            return {}
        scores = validate(context, template, attack, variables, images)
        if "validation_one_step_accuracy" in scores:
            line = {**scores, "epoch": epoch}
            alarm.overfitted([*stage.metrics(), line], len(images), stage.path.name)
        return scores

    if best == "last":
        return {"at_epoch_end": at_epoch_end}
    judged_by = best if best in ("clean", "robust") else "clean" if attack is None else "robust"
    return {
        "at_epoch_end": at_epoch_end,
        "score": f"validation_{judged_by}_accuracy",
        "images": None if best == "highest" else len(images),
        "patience": recipe.patience,
        # A budget that grows lowers accuracy, which is no reason to stop.
        "patience_from": _whole_budget(recipe, steps_per_epoch),
    }


def _summary(
    state: TrainState,
    best: Best | None,
    steps_per_epoch: int,
    recipe: Recipe,
    attack: Any,
    passes: int,
) -> dict:
    """The numbers of a finished training; without a best epoch the last one was taken."""
    epochs = int(state.step) // steps_per_epoch
    clean = clean_epochs(recipe, steps_per_epoch, epochs)
    return {
        "best_epoch": int(best.epoch) if best else epochs,
        "epochs": epochs,
        "steps": int(state.step),
        "validation_score": float(best.score) if best else None,
        "skipped": int(state.counters["skipped"]),
        "gradient_evaluations_per_image": gradients(
            attack, passes, epochs, clean, recipe.cache_features
        ),
        **({"clean_epochs": clean} if recipe.ramp else {}),
    }


def clean_epochs(recipe: Recipe, steps_per_epoch: int, epochs: int) -> float:
    """Returns for how many of its epochs a recipe's attack has no budget, and takes no time."""
    if recipe.ramp is None:
        return 0
    first = int(recipe.budget(recipe.epochs * steps_per_epoch).first)
    return min(first / steps_per_epoch, epochs)


def _whole_budget(recipe: Recipe, steps_per_epoch: int) -> float:
    """Returns the epoch from which on a recipe's attack has its whole budget."""
    if recipe.ramp is None:
        return 0
    return int(recipe.budget(recipe.epochs * steps_per_epoch).full) / steps_per_epoch


def gradients(
    attack: Any, passes: int, epochs: int, clean: float = 0, cached: bool = False
) -> float:
    """Returns gradient evaluations per image: the attack's and the update's passes.

    Args:
      attack: Of training, or None.
      passes: Of the update; see `finetuning.Step`.
      epochs: Of the training.
      clean: How many of them the attack has no part in.
      cached: Whether an image passes the encoder once in all; that counts as one.
    """
    if cached:
        return min(epochs, 1)
    attacked = getattr(attack, "gradient_evaluations", 0) * (epochs - clean)
    return (passes * epochs + attacked) * getattr(attack, "replays", 1)


def classifier_variables(variables: Variables) -> Variables:
    """Returns a classifier's variables on the host: the average of weights where there is one."""
    return jax.device_get(finetuning.served(variables))


def validate(
    context: Context,
    template: Classifier,
    attack: Any,
    variables: Variables,
    examples: Any = None,
) -> dict[str, float]:
    """Scores variables on the validation images.

    Args:
      context: The run; ``training.validation`` is the attack that all recipes are judged by.
      template: Whose variables they are.
      attack: Of training.  A `UniversalPool` is measured under its own members; without an attack
        nothing but clean accuracy is.
      variables: What is scored.
      examples: Other images than the validation images, or their features.

    Returns:
      ``validation_clean_accuracy``; with an attack ``validation_robust_accuracy``; for an attack of
      one step also ``validation_one_step_accuracy``, under itself, by which catastrophic
      overfitting is seen.
    """
    strongest: dict[str, Any] = {}
    one_step = {}
    if isinstance(attack, UniversalPool):
        deltas = jax.device_get(variables[finetuning.COLLECTION]["deltas"])
        strongest = {f"member{i}": m for i, m in enumerate(attack.members(deltas))}
    elif attack is not None:
        strongest = {"validation": context.plan.training.validation.build(context.encoder)}
        one_step = {"one step": attack} if alarm.takes_one_step(attack) else {}
    examples = context.downstream[1] if examples is None else examples
    # On the devices once, and not again with every batch.
    model = context.parallel.replicate(template.with_variables(classifier_variables(variables)))
    size = min(context.plan.training.batch_size, len(examples))
    batches = data.epoch_batches(examples, size)
    how = {"key": stage_key(context.plan.seed, "validation"), "parallel": context.parallel}
    if not strongest:
        right = 0
        for batch in batches:
            part = evaluation.gathered([batch])
            right += evaluation.clean_correct(model, part, batch_size=size, **how).sum()
        return {"validation_clean_accuracy": int(right) / len(examples)}
    results = evaluation.score(model, batches, {**strongest, **one_step}, **how)
    metrics = {"validation_clean_accuracy": next(iter(results.values())).counts.clean_accuracy}
    worst = evaluation.worst_case(results[name] for name in strongest)
    metrics["validation_robust_accuracy"] = worst.counts.robust_accuracy
    for name in one_step:
        metrics["validation_one_step_accuracy"] = results[name].counts.robust_accuracy
    return metrics

"""What fine-tuning stages and recipes share: one fit, from config values to a directory."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import optax

from robust_ssl import data, evaluation, finetuning, manifests, struct, threats, weights
from robust_ssl.attacks.perturbation import check_fits_gray
from robust_ssl.build import resolve
from robust_ssl.checkpoints import StageDirectory
from robust_ssl.finetuning import UniversalPool
from robust_ssl.stages.attack import build_threat, function_of
from robust_ssl.stages.run import Run
from robust_ssl.stages.training import Best, stage_key, train
from robust_ssl.trees import fingerprint
from robust_ssl.types import Classifier, Encoder, TrainState, Variables

_log = logging.getLogger(__name__)

Losses = Mapping[str, tuple[Any, float]]
Afterwards = Callable[[Variables], tuple[Variables, dict[str, Any]]]


def build_losses(entries: Mapping[str, Any]) -> dict[str, tuple[Any, float]]:
    """Builds the losses of a config.

    Args:
      entries: ``{name: ("module:function", weight)}``, or with a third member, the function's
        options.

    Raises:
      ValueError: If an entry is of another form, or a function is not known.

    Example:
      >>> entries = {"drift": ("robust_ssl.losses:feature_preservation", 2.0, {"of": "clean"})}
      >>> build_losses(entries)["drift"][1]
      2.0
    """
    built = {}
    for name, entry in entries.items():
        if not isinstance(entry, list | tuple) or len(entry) not in (2, 3):
            raise ValueError(
                f'the loss {name!r} must be ("module:function", weight) or ("module:function", '
                f"weight, {{options}}), got {entry!r}"
            )
        function, weight, *options = entry
        function = resolve(function)
        if options and options[0]:
            function = functools.partial(function, **options[0])
        built[name] = (function, weight)
    return built


def build_attack(
    run: Run, options: Mapping[str, Any] | None, encoder: Encoder | None = None
) -> Any:
    """Builds the attack of training: per image, or an `finetuning.Adversary`.

    Args:
      run: The run.
      options: ``{"function": "module:function", "epsilon": ..., **options}``; ``threat`` says of
        what kind the budget is (`build_threat`), an ``objective`` is ``"module:function"``.  None
        is no attack.
      encoder: What an attack gets that has a field `source`; None is the run's public encoder.

    Raises:
      ValueError: If a function or an option is not known, or the budget makes no sense.
    """
    if options is None:
        return None
    options = dict(options)
    function = resolve(function_of("of training", options))
    if "epsilon" not in options:
        raise ValueError('the attack of training needs an "epsilon", for example 8/255')
    make = build_threat(options.pop("threat", None))
    threat = make(options.pop("epsilon"))
    shape = (run.encoder.image_size, run.encoder.image_size, 3)
    threats.check(threat, shape)
    if "objective" in options:
        options["objective"] = resolve(options["objective"])
    if "source" in getattr(function, "__dataclass_fields__", {}):
        options["source"] = encoder or run.encoder
    try:
        attack = function(threat, **options)
    except TypeError as error:
        raise ValueError(f"{function.__name__} does not take that: {error}") from error
    if isinstance(attack, UniversalPool):
        check_fits_gray(threat, shape)
    # A whole number among the leaves would be an integer, and another program than a fraction.
    return jax.tree.map(lambda leaf: float(leaf) if isinstance(leaf, int) else leaf, attack)


def build_optimizer(
    classifier: Classifier,
    config: Mapping[str, Any],
    steps_per_epoch: int,
    *,
    show: str | None = None,
) -> tuple[optax.GradientTransformation, frozenset[str]]:
    """Returns the layer-wise optimizer and the frozen paths; logs the table of rates.

    Raises:
      ValueError: If a pattern matches no parameter, or a parameter is not covered.
    """
    params = classifier.variables["params"]
    rates = finetuning.layer_rates(params, config["rates"])
    if show:
        table = finetuning.render_table(finetuning.layer_table(params, rates))
        _log.info("%s: learning rates\n%s", show, table)
    anchored = config.get("l2_sp", 0.0)
    make_tx = functools.partial(
        finetuning.adam_l2,
        weight_decay=0.0 if anchored else config["weight_decay"],
        decay=config["decay"],
        steps_per_epoch=steps_per_epoch,
    )
    parts = [finetuning.layerwise_optimizer(params, rates, make_tx)]
    if anchored:  # the encoder is pulled to where it started instead of to zero
        head = {part: part == "head" for part in params}
        parts.insert(0, optax.masked(optax.add_decayed_weights(config["weight_decay"]), head))
        pull = functools.partial(finetuning.pull_to_start, params)
        # In the state, as rates are: two runs that differ in it share one program.
        parts.insert(0, optax.inject_hyperparams(lambda weight: pull(weight))(float(anchored)))
    if config.get("prune"):
        parts.append(finetuning.hold_zeros(params))
    tx = parts[0] if len(parts) == 1 else optax.chain(*parts)
    return tx, finetuning.frozen_paths(rates)


def build_step(
    run: Run,
    name: str,
    classifier: Classifier,
    config: Mapping[str, Any],
    losses: Losses,
    attack: Any,
    steps_per_epoch: int,
    *,
    seed: int | None = None,
    encoder: Encoder | None = None,
    show: bool = False,
):
    """Returns ``(state, step)`` of a fit, before its first step.

    Args:
      run: The run.
      name: The stage's, from which keys are made.
      classifier: What it starts from.
      config: Of the stage or recipe: rates, optimization, batch statistics, augmentation.
      losses: Name to (loss, weight).
      attack: As `make_step` takes it.
      steps_per_epoch: Updates per epoch.
      seed: Of the keys; None is the run's.
      encoder: The public encoder that losses compare with; None is the run's.
      show: Whether the table of learning rates is logged.
    """
    # Rates decay by the pass over the data, however often each batch is replayed.
    passed = max(1, steps_per_epoch // getattr(attack, "replays", 1))
    tx, frozen = build_optimizer(classifier, config, passed, show=name if show else None)
    key = stage_key(run.seed if seed is None else seed, name)
    step = finetuning.make_step(
        classifier,
        tx,
        losses=losses,
        key=key,
        attack=attack,
        frozen=frozen,
        axis_name=run.parallel.axis_name,
        **_step_options(config, encoder or run.encoder),
    )
    state = finetuning.init_state(
        classifier, tx, attack, key=jax.random.fold_in(key, 2**31), batch_size=config["batch_size"]
    )
    return state, step


def _step_options(config: Mapping[str, Any], encoder: Encoder) -> dict[str, Any]:
    """What a fine-tuning config says of its step besides losses and rates."""
    return {
        "pretrained": encoder if config.get("compare_with_pretrained") else None,
        "batch_statistics": config["batch_statistics"],
        "augment": resolve(config["augment"]) if config["augment"] else None,
    }


def fit(
    run: Run,
    name: str,
    classifier: Classifier,
    config: Mapping[str, Any],
    losses: Losses,
    *,
    attack: Any = None,
    against: Mapping[str, Any] | None = None,
    seed: int | None = None,
    encoder: Encoder | None = None,
    best: str | None = None,
    afterwards: Afterwards | None = None,
    known: Mapping[str, Any] | None = None,
) -> StageDirectory:
    """Trains a classifier under the rules of `config` and leaves the best epoch's variables.

    Args:
      run: The run.
      name: The stage's name.
      classifier: What it starts from.
      config: Of the stage or recipe.
      losses: Name to (loss, weight).
      attack: What crafts the adversarial images, or None.
      against: Attacks by name under which validation measures robust accuracy, the worst of them;
        None is `attack` itself.  An `UniversalPool` is always measured under its own members.
      seed: Of batches and keys; None is the run's.
      encoder: The public encoder that it was built on; None is the run's.
      best: Which epoch is kept: the best by ``"clean"`` or ``"robust"`` validation accuracy, or the
        ``"last"``, for which nothing is validated; None is robust where there is an attack.
      afterwards: What is done to the best variables; returns them and more results.
      known: Results that are known before.
    """
    seed = run.seed if seed is None else seed
    train_set, validation = run.downstream
    inputs = {
        "start": fingerprint(classifier.variables),
        "train": train_set.fingerprint(),
        "validation": validation.fingerprint(),
    }
    with run.open(name, config, inputs, seed) as stage:
        if stage.done:
            return stage
        batches = data.Batches(
            train_set,
            config["batch_size"],
            seed=seed,
            stage=name,
            parallel=run.parallel,
            replays=getattr(attack, "replays", 1),
        )
        epoch = batches.steps_per_epoch
        state, step = build_step(
            *(run, name, classifier, config, losses, attack, epoch),
            seed=seed,
            encoder=encoder,
            show=True,
        )
        state, found = train(
            stage,
            state,
            step,
            batches,
            epochs=config["epochs"],
            parallel=run.parallel,
            progress=run.progress,
            **_judged(run, stage, classifier, attack, against, best, config.get("patience")),
        )
        variables = without_attack((found or state).variables)
        variables, extra = afterwards(variables) if afterwards else (variables, {})
        results = {
            **(known or {}),
            **_told(state, found, epoch, gradients_per_epoch(attack, step.passes)),
            "catastrophic_overfitting": overfitted(stage.metrics(), len(validation)),
            **extra,
        }
        keep_classifier(run, stage, classifier.with_variables(variables), results, encoder)
        stage.finish(variables, results)
    return stage


def _judged(
    run: Run, stage, classifier: Classifier, attack, against, best, patience
) -> dict[str, Any]:
    """How `train` finds the best epoch; nothing where the last one is taken."""
    best = best or ("clean" if attack is None else "robust")
    if best == "last":
        return {}

    def at_epoch_end(_, variables: Variables) -> dict[str, float]:
        measured = validate(run, classifier, attack, against, variables)
        if "validation_one_step_accuracy" in measured:
            overfitted([*stage.metrics(), measured], len(run.downstream[1]), stage.path.name)
        return measured

    return {
        "at_epoch_end": at_epoch_end,
        "score": f"validation_{best}_accuracy",
        "patience": patience,
    }


def _told(state: TrainState, best: Best | None, steps_per_epoch: int, gradients: int) -> dict:
    """What a training says of itself; without a best epoch the last one was taken."""
    epochs = int(state.step) // steps_per_epoch
    return {
        "best_epoch": int(best.epoch) if best else epochs,
        "epochs": epochs,
        "steps": int(state.step),
        "validation_score": float(best.score) if best else None,
        "skipped": int(state.counters["skipped"]),
        "gradient_evaluations_per_image": epochs * gradients,
    }


def gradients_per_epoch(attack: Any, passes: int) -> int:
    """Returns gradient evaluations per image in an epoch: the attack's and the update's passes."""
    each = passes + (0 if attack is None else getattr(attack, "gradient_evaluations", 0))
    return each * getattr(attack, "replays", 1)


def without_attack(variables: Variables) -> Variables:
    """Returns a classifier's variables on the host, without an adversary's perturbations."""
    found = {name: tree for name, tree in variables.items() if name != finetuning.COLLECTION}
    return jax.device_get(found)


@struct.dataclass
class _NoAttack:
    def __call__(self, key, model, image, label=None):
        return image


def validate(
    run: Run,
    template: Classifier,
    attack: Any,
    against: Mapping[str, Any] | None,
    variables: Variables,
) -> dict[str, float]:
    """Scores variables on the validation images.

    Returns:
      ``validation_clean_accuracy``; with an attack ``validation_robust_accuracy``, the worst case
      per image over `against`; for an attack of one step also ``validation_one_step_accuracy``,
      under itself, which is what catastrophic overfitting is told by.
    """
    one_step = {}
    if isinstance(attack, UniversalPool):
        deltas = jax.device_get(variables[finetuning.COLLECTION]["deltas"])
        strongest = {f"member{i}": m for i, m in enumerate(attack.members(deltas))}
    else:
        strongest = dict(against or {"attack": attack}) if attack is not None else {}
        if against and _takes_one_step(attack):
            one_step = {"one step": attack}
    results = evaluation.score(
        template.with_variables(without_attack(variables)),
        data.epoch_batches(run.downstream[1], scoring_batch_size(run)),
        {**strongest, **one_step} or {"nothing": _NoAttack()},
        key=stage_key(run.seed, "validation"),
        parallel=run.parallel,
    )
    metrics = {"validation_clean_accuracy": next(iter(results.values())).counts.clean_accuracy}
    if strongest:
        worst = evaluation.worst_case(results[name] for name in strongest)
        metrics["validation_robust_accuracy"] = worst.counts.robust_accuracy
    for name in one_step:
        metrics["validation_one_step_accuracy"] = results[name].counts.robust_accuracy
    return metrics


def _takes_one_step(attack: Any) -> bool:
    """Whether it is an attack on single images with one gradient: these overfit to themselves."""
    gradients = getattr(attack, "gradient_evaluations", 0)
    return gradients == 1 and not isinstance(attack, finetuning.Adversary)


def scoring_batch_size(run: Run) -> int:
    """Returns how many images are scored at a time: of the stage that the config has."""
    of = next(name for name in ("evaluate", "defend") if name in run.config)
    return run.config[of]["batch_size"]


def overfitted(
    lines: Iterable[Mapping[str, float]], images: int, name: str | None = None
) -> int | None:
    """Returns the epoch of catastrophic overfitting; None where there is none.

    Args:
      lines: Of ``metrics.jsonl``, in order.
      images: How many validation images there are.
      name: Of the stage, to warn of it at the epoch where it happens.
    """
    history = [
        (line["validation_one_step_accuracy"], line["validation_robust_accuracy"])
        for line in lines
        if "validation_one_step_accuracy" in line
    ]
    epoch = finetuning.overfitting_epoch(history, images=images) if history else None
    if name and epoch == len(history) > 0:
        _log.warning("%s: %s", name, finetuning.overfitting_warning(history, epoch))
    return epoch


def keep_classifier(
    run: Run,
    stage: StageDirectory,
    classifier: Classifier,
    results: Mapping[str, Any],
    encoder: Encoder | None = None,
) -> None:
    """Writes ``classifier/``, which `weights.load_classifier` reads without this run's config."""
    if jax.process_index():
        return
    builder, options = run.own_builder if encoder is None else (None, None)
    card = {"stage": stage.path.name, "downstream": run.downstream[0].name, **results}
    try:
        weights.save_classifier(
            classifier,
            stage.path / "classifier",
            manifests.json_ready(card),
            builder=builder,
            options=options,
        )
    except ValueError as error:  # final/ has everything: an hour's training is not lost for this
        _log.warning("%s: no classifier/ to be loaded elsewhere: %s", stage.path.name, error)

"""The fine-tuning stages: `usual`, `stage1`, `sensitivity` and `stage2`, all through one step."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from robust_ssl import data, evaluation, finetuning, manifests, threats, weights
from robust_ssl.attacks import PGD, attack_batch
from robust_ssl.checkpoints import StageDirectory
from robust_ssl.conformance import resolve
from robust_ssl.stages.run import Run
from robust_ssl.stages.training import stage_key, train
from robust_ssl.trees import fingerprint
from robust_ssl.types import Classifier, Variables

_log = logging.getLogger(__name__)


def build_pgd(config: Mapping[str, Any]) -> PGD:
    """Builds the inner attack of ``config.finetune.attack``; it sees labels, as training may."""
    threats.check_epsilon(config["epsilon"])
    return PGD(
        threats.Linf(config["epsilon"]),
        step_size=config["step_size"],
        num_steps=config["num_steps"],
        random_start=config["random_start"],
        keep_best=False,
    )


def build_losses(config: Mapping[str, Any]) -> dict[str, tuple[Any, float]]:
    """Returns Gen-AF's terms and the user's own, ``{"name": ("module:function", weight)}``."""
    mixed = finetuning.mixed_losses(
        config["adv_ratio"],
        config["regularization_weight"],
        on=config["regularize"],
        compat=config["compat"],
    )
    return {**mixed, **_own(config)}


def clean_losses(config: Mapping[str, Any]) -> dict[str, tuple[Any, float]]:
    """Returns clean cross-entropy and the user's own terms, for `usual` and `stage2`."""
    return {**finetuning.mixed_losses(0.0), **_own(config)}


def usual(run: Run) -> StageDirectory:
    """Fine-tunes in the usual way: clean cross-entropy, under ``config.usual.rates``."""
    config = run.config["usual"]
    classifier = run.classifier(run.config["downstream_head"])
    return _finetune(run, "usual", classifier, config, clean_losses(config), attack=None)


def stage1(run: Run) -> StageDirectory:
    """Gen-AF's first stage: two tracks, on adversarial images, under genetic regularisation."""
    config = run.config["finetune"]
    classifier = run.classifier(run.config["downstream_head"])
    pgd = build_pgd(config["attack"])
    return _finetune(run, "stage1", classifier, config, build_losses(config), attack=pgd)


def sensitivity(run: Run) -> StageDirectory:
    """Measures how much robustness hangs on each layer of stage 1, on validation images.

    Returns:
      The stage's directory; its results are ``{"scores": ..., "selected": ...}``.
    """
    config = run.config["sensitivity"]
    first = load_classifier(run, "stage1")
    images = run.downstream[1].subset(min(config["images"], len(run.downstream[1])))
    inputs = {"stage1": fingerprint(first.variables), "validation": images.fingerprint()}
    with run.open("sensitivity", config, inputs) as stage:
        if stage.done:
            return stage
        size = len(images) - len(images) % len(run.parallel.devices)
        batch = images.read(np.arange(size))
        clean, labels = evaluation.to_pixels(batch["images"]), jnp.asarray(batch["labels"])
        pgd = build_pgd(run.config["finetune"]["attack"])
        key = stage_key(run.seed, "sensitivity")
        adversarial = jax.jit(attack_batch)(pgd, key, first, clean, labels)
        scores = finetuning.layer_sensitivity(
            first,
            np.asarray(adversarial),
            np.asarray(labels),
            num_steps=config["num_steps"],
            learning_rate=config["learning_rate"],
            radius=config["radius"],
            parallel=run.parallel,
        )
        selected = finetuning.select_redundant(
            scores, top_k=config["top_k"], top_k_fraction=config["top_k_fraction"]
        )
        _log.info("robust-redundant layers: %s", ", ".join(selected))
        gradients = size * (build_gradients(pgd) + 1 + len(scores) * config["num_steps"])
        stage.finish(
            None,
            {"scores": scores, "selected": selected, "gradient_evaluations": gradients},
        )
    return stage


def stage2(run: Run) -> StageDirectory:
    """Gen-AF's second stage: only the robust-redundant layers move, on clean images.

    Afterwards the interpolation guard walks back towards stage 1 until the robust accuracy on
    validation is within ``config.stage2.tolerance`` of stage 1's.
    """
    config = run.config["stage2"]
    first = load_classifier(run, "stage1")
    selected = sensitivity(run).results["selected"]
    rates = finetuning.rates_for(selected, config["learning_rate"])

    def guarded(variables: Variables) -> tuple[Variables, dict[str, Any]]:
        validate = functools.partial(_validate, run, first, run.config["finetune"]["attack"])

        def measure(mixture):
            metrics = validate(mixture)
            return metrics["clean_accuracy"], metrics["robust_accuracy"]

        chosen = finetuning.guard(
            first.variables, variables, measure, tolerance=config["tolerance"]
        )
        _log.info("interpolation guard: alpha %.1f", chosen.alpha)
        return chosen.variables, {
            "alpha": chosen.alpha,
            "curve": [point._asdict() for point in chosen.curve],
        }

    return _finetune(
        run,
        "stage2",
        first,
        {**config, "rates": rates},
        clean_losses(config),
        attack=None,
        afterwards=guarded,
    )


def load_classifier(run: Run, stage: str) -> Classifier:
    """Returns the classifier that a finished fine-tuning stage left."""
    directory = {"usual": usual, "stage1": stage1, "stage2": stage2}[stage](run)
    template = run.classifier(run.config["downstream_head"])
    return template.with_variables(directory.load_final(template.variables))


def build_gradients(pgd: PGD | None) -> int:
    """Image gradients that an inner attack costs per image; 0 without one."""
    return 0 if pgd is None else pgd.gradient_evaluations


def _own(config: Mapping[str, Any]) -> dict[str, tuple[Any, float]]:
    return {name: tuple(entry) for name, entry in config.get("losses", {}).items()}


def _finetune(
    run: Run,
    name: str,
    classifier: Classifier,
    config: Mapping[str, Any],
    losses: Mapping[str, tuple[Any, float]],
    *,
    attack: PGD | None,
    afterwards: Callable[[Variables], tuple[Variables, dict[str, Any]]] | None = None,
) -> StageDirectory:
    """Trains a classifier under the rules of `config` and leaves the best epoch's variables."""
    train_set, validation = run.downstream
    inputs = {
        "start": fingerprint(classifier.variables),
        "train": train_set.fingerprint(),
        "validation": validation.fingerprint(),
    }
    with run.open(name, config, inputs) as stage:
        if stage.done:
            return stage
        batches = data.Batches(
            train_set, config["batch_size"], seed=run.seed, stage=name, parallel=run.parallel
        )
        tx, frozen = build_optimizer(classifier, config, batches.steps_per_epoch, show=name)
        step = finetuning.make_step(
            classifier,
            tx,
            losses=losses,
            key=stage_key(run.seed, name),
            attack=attack,
            frozen=frozen,
            axis_name=run.parallel.axis_name,
            **step_options(run, config),
        )
        against = None if attack is None else run.config["finetune"]["attack"]
        state, best = train(
            stage,
            finetuning.init_state(classifier, tx),
            step,
            batches,
            epochs=config["epochs"],
            parallel=run.parallel,
            progress=run.progress,
            at_epoch_end=lambda epoch, variables: {
                f"validation_{metric}": value
                for metric, value in _validate(run, classifier, against, variables).items()
            },
            score=f"validation_{'clean' if attack is None else 'robust'}_accuracy",
        )
        variables, extra = jax.device_get(best.variables), {}
        if afterwards is not None:
            variables, extra = afterwards(variables)
        results = {
            "best_epoch": int(best.epoch),
            "validation_score": float(best.score),
            "skipped": int(state.counters["skipped"]),
            "gradient_evaluations_per_image": config["epochs"] * (build_gradients(attack) + 1),
            **extra,
        }
        _keep_classifier(run, stage, classifier.with_variables(jax.device_get(variables)), results)
        stage.finish(jax.device_get(variables), results)
    return stage


def step_options(run: Run, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a fine-tuning config says of its step besides losses and rates."""
    return {
        "pretrained": run.encoder if config.get("compare_with_pretrained") else None,
        "batch_statistics": config["batch_statistics"],
        "augment": resolve(config["augment"]) if config["augment"] else None,
    }


def _keep_classifier(run: Run, stage: StageDirectory, classifier: Classifier, results) -> None:
    """Writes ``classifier/``, which `weights.load_classifier` reads without this run's config."""
    if jax.process_index():
        return
    builder, options = run.own_builder
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


def build_optimizer(
    classifier: Classifier,
    config: Mapping[str, Any],
    steps_per_epoch: int,
    *,
    show: str | None = None,
):
    """Returns the layer-wise optimiser and the frozen paths; logs the table of rates.

    Raises:
      ValueError: If a pattern matches no parameter, or a parameter is not covered.
    """
    params = classifier.variables["params"]
    rates = finetuning.layer_rates(params, config["rates"])
    if show:
        table = finetuning.render_table(finetuning.layer_table(params, rates))
        _log.info("%s: learning rates\n%s", show, table)
    make_tx = functools.partial(
        finetuning.adam_l2,
        weight_decay=config["weight_decay"],
        decay=config["decay"],
        steps_per_epoch=steps_per_epoch,
    )
    tx = finetuning.layerwise_optimizer(params, rates, make_tx)
    return tx, finetuning.frozen_paths(rates)


@struct.dataclass
class _NoAttack:
    def __call__(self, key, model, image, label=None):
        return image


def _validate(
    run: Run, template: Classifier, against: Mapping[str, Any] | None, variables: Variables
) -> dict[str, float]:
    """Scores variables on the validation images, under the training attack if there is one."""
    _, validation = run.downstream
    attack = _NoAttack() if against is None else build_pgd(against)
    results = evaluation.score(
        template.with_variables(jax.device_get(variables)),
        data.epoch_batches(validation, run.config["evaluate"]["batch_size"]),
        {"validation": attack},
        key=stage_key(run.seed, "validation"),
        parallel=run.parallel,
    )
    counts = results["validation"].counts
    metrics = {"clean_accuracy": counts.clean_accuracy}
    return metrics if against is None else {**metrics, "robust_accuracy": counts.robust_accuracy}

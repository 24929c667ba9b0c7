"""The fine-tuning stages: `usual`, `stage1`, `sensitivity` and `stage2`, all through one step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import evaluation, finetuning, threats
from robust_ssl.attacks import PGD, attack_batch
from robust_ssl.checkpoints import StageDirectory
from robust_ssl.stages import fitting
from robust_ssl.stages.run import Run
from robust_ssl.stages.training import stage_key
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
    return fitting.fit(run, "usual", classifier, config, clean_losses(config))


def stage1(run: Run) -> StageDirectory:
    """Gen-AF's first stage: two tracks, on adversarial images, under genetic regularization."""
    config = run.config["finetune"]
    classifier = run.classifier(run.config["downstream_head"])
    pgd = build_pgd(config["attack"])
    return fitting.fit(run, "stage1", classifier, config, build_losses(config), attack=pgd)


def sensitivity(run: Run) -> StageDirectory:
    """Measures how much robustness hangs on each layer of stage 1, on validation images.

    Returns:
      The stage's directory; its results are ``{"scores": ..., "selected": ...}``.
    """
    first = load_classifier(run, "stage1")
    pgd = build_pgd(run.config["finetune"]["attack"])
    return measure_sensitivity(run, "sensitivity", first, pgd, run.config["sensitivity"])


def measure_sensitivity(
    run: Run,
    name: str,
    classifier: Classifier,
    attack: Any,
    config: Mapping[str, Any],
    seed: int | None = None,
) -> StageDirectory:
    """Measures a classifier's layers on attacked validation images and selects some; a stage.

    Args:
      run: The run.
      name: The stage's name.
      classifier: Whose layers are measured.
      attack: Crafts the images, once.
      config: ``images``, ``num_steps``, ``learning_rate``, ``radius`` of `layer_sensitivity`;
        ``top_k`` or ``top_k_fraction`` of `select_redundant`.
      seed: Of the keys; None is the run's.
    """
    images = run.downstream[1].subset(min(config["images"], len(run.downstream[1])))
    inputs = {"start": fingerprint(classifier.variables), "validation": images.fingerprint()}
    with run.open(name, config, inputs, seed) as stage:
        if stage.done:
            return stage
        size = len(images) - len(images) % len(run.parallel.devices)
        batch = images.read(np.arange(size))
        clean, labels = evaluation.to_pixels(batch["images"]), jnp.asarray(batch["labels"])
        key = stage_key(run.seed if seed is None else seed, name)
        adversarial = jax.jit(attack_batch)(attack, key, classifier, clean, labels)
        scores = finetuning.layer_sensitivity(
            classifier,
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
        gradients = size * (build_gradients(attack) + 1 + len(scores) * config["num_steps"])
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
    pgd = build_pgd(run.config["finetune"]["attack"])
    return fitting.fit(
        run,
        "stage2",
        first,
        {**config, "rates": rates},
        clean_losses(config),
        afterwards=guarded(run, first, pgd, config["tolerance"]),
    )


def guarded(run: Run, first: Classifier, attack: Any, tolerance: float) -> fitting.Afterwards:
    """Returns the interpolation guard, as `fitting.fit` takes it.

    Args:
      run: Its validation images decide.
      first: Whose robust accuracy is to be kept.
      attack: Under which it is measured.
      tolerance: Robust accuracy that may be lost, a share.
    """

    def measure(mixture: Variables) -> tuple[float, float]:
        metrics = fitting.validate(run, first, attack, None, mixture)
        return metrics["validation_clean_accuracy"], metrics["validation_robust_accuracy"]

    def walk_back(variables: Variables) -> tuple[Variables, dict[str, Any]]:
        chosen = finetuning.guard(first.variables, variables, measure, tolerance=tolerance)
        _log.info("interpolation guard: alpha %.1f", chosen.alpha)
        return chosen.variables, {
            "alpha": chosen.alpha,
            "curve": [point._asdict() for point in chosen.curve],
        }

    return walk_back


def load_classifier(run: Run, stage: str) -> Classifier:
    """Returns the classifier that a finished fine-tuning stage left."""
    directory = {"usual": usual, "stage1": stage1, "stage2": stage2}[stage](run)
    template = run.classifier(run.config["downstream_head"])
    return template.with_variables(directory.load_final(template.variables))


def build_gradients(pgd: PGD | None) -> int:
    """Image gradients that an inner attack costs per image; 0 without one."""
    return 0 if pgd is None else pgd.gradient_evaluations


def _own(config: Mapping[str, Any]) -> dict[str, tuple[Any, float]]:
    return fitting.build_losses(config.get("losses", {}))

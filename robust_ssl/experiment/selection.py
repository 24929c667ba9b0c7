"""Which layers move: those that robustness hangs on least; and how far back a guard goes."""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import evaluation, finetuning
from robust_ssl.attacks import attack_batch
from robust_ssl.experiment import fitting
from robust_ssl.experiment.context import Context, model_inputs
from robust_ssl.experiment.loop import stage_key
from robust_ssl.experiment.recipe import Selection
from robust_ssl.types import Classifier, Variables
from robust_ssl.workdir import StageDirectory

_log = logging.getLogger(__name__)


def choose_layers(
    context: Context, name: str, classifier: Classifier, selection: Selection, seed: int
) -> StageDirectory:
    """Measures a classifier's layers on attacked validation images and chooses some.

    Args:
      context: The run; ``training.validation`` crafts the images, once.
      name: The directory's.
      classifier: Whose layers are measured.
      selection: How, and how many are chosen.
      seed: Of the keys.

    Returns:
      The directory; its results are ``scores`` by kernel, ``selected`` and
      ``gradient_evaluations``, over all images.
    """
    validation = context.downstream[1]
    images = validation.subset(min(selection.images, len(validation)))
    attack = context.plan.training.validation.build(context.encoder)
    inputs = {**model_inputs("start", classifier), "validation": images.fingerprint()}
    settings = {"select": selection, "attack": context.plan.training.validation}
    with context.open(name, settings, inputs, seed) as stage:
        if stage.done:
            return stage
        batch = images.read(np.arange(len(images)))
        clean, labels = evaluation.to_pixels(batch["images"]), jnp.asarray(batch["labels"])
        key = stage_key(seed, name)
        adversarial = jax.jit(attack_batch)(attack, key, classifier, clean, labels)
        scores = finetuning.layer_sensitivity(
            classifier,
            np.asarray(adversarial),
            np.asarray(labels),
            num_steps=selection.num_steps,
            learning_rate=selection.learning_rate,
            radius=selection.radius,
            parallel=context.parallel,
        )
        selected = selection.choose(scores)
        _log.info("robust-redundant layers: %s", ", ".join(selected))
        ascents = 1 + len(scores) * (selection.num_steps - 1)  # after the last step there is none
        gradients = len(images) * (attack.gradient_evaluations + ascents)
        results = {"scores": scores, "selected": selected, "gradient_evaluations": gradients}
        stage.finish(results)
    return stage


def guarded(context: Context, start: Classifier, tolerance: float) -> fitting.Afterwards:
    """Returns the interpolation guard, as `fitting.fit` takes it.

    It walks back towards the start until the robust accuracy on validation images is within
    `tolerance` of the start's.

    Args:
      context: Its validation images and attack decide.
      start: Whose robust accuracy is to be kept.
      tolerance: Robust accuracy that may be lost, a share.
    """
    attack = context.plan.training.validation.build(context.encoder)

    def measure(mixture: Variables) -> tuple[float, float]:
        scores = fitting.validate(context, start, attack, mixture)
        return scores["validation_clean_accuracy"], scores["validation_robust_accuracy"]

    def walk_back(variables: Variables) -> tuple[Variables, dict[str, Any]]:
        chosen = finetuning.guard(start.variables, variables, measure, tolerance=tolerance)
        _log.info("interpolation guard: alpha %.1f", chosen.alpha)
        return chosen.variables, {
            "alpha": chosen.alpha,
            "curve": [point._asdict() for point in chosen.curve],
        }

    return walk_back

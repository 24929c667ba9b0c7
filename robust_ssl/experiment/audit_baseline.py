"""What an audit leaves for inspections: a baseline of the classifier that is to be used."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from robust_ssl import disk, evaluation, inspection
from robust_ssl.build import name_of
from robust_ssl.experiment import train
from robust_ssl.experiment.attack import at_main_budget, attack
from robust_ssl.experiment.context import Context
from robust_ssl.experiment.sections import SavedClassifier
from robust_ssl.inspection import baselines
from robust_ssl.types import Classifier

FOLDER = "baseline"
IMAGES = 512  # of the test split; the baseline holds them
_log = logging.getLogger(__name__)


def write_baseline(context: Context, model: Classifier) -> dict[str, Any] | None:
    """Writes a baseline into the working directory, unless it is there.

    Returns:
      Where the classifier and the baseline lie, from the working directory, and the code that it
      needs; None where there is none, or the classifier has no directory that could be inspected.
    """
    folder, recipe = context.workdir / FOLDER, context.plan.recipes.get(context.plan.audit.secured)
    if recipe is not None and not recipe.is_trained:
        return None
    saved, code = SavedClassifier(), {}
    if recipe is not None:
        place = train.directory(recipe, context.plan.training.seeds[0])
        source: Any = context.workdir / place
        code = train.own_code(context, recipe)
    else:
        place = context.plan.audit.secured
        saved = context.plan.classifiers[place]
        source = model
        if saved.path:
            source, code = disk.expanded(saved.path), saved.own
            place = os.path.relpath(source, context.workdir)
    done = (folder / baselines.CARD).is_file() or jax.process_index() > 0
    if not (done or _write(context, source, saved, folder, code)):
        return None
    if recipe is None and not saved.path:
        return None  # `inspection.inspect` takes the value, the command does not
    named = {n: one if isinstance(one, str) else name_of(one) for n, one in code.items()}
    return {"model": place, "baseline": FOLDER, "own": named}


def _write(
    context: Context, source: Any, saved: SavedClassifier, folder: Any, code: Mapping[str, Any]
) -> bool:
    count = min(IMAGES, len(context.test))
    examples = context.test.subset(count, context.plan.seed)
    batch = examples.read(np.arange(count))
    noise = {name for name, member in context.plan.suite.attacks.items() if member.is_noise}
    public = at_main_budget(context, attack(context))
    fitted = [one.perturbation for one in public if one.attack not in noise]
    images = np.asarray(evaluation.to_pixels(batch["images"]))
    try:
        labels = _labels(batch["labels"], saved, context.test.class_names)
        inspection.baseline(source, images, labels, fitted, folder, **code)
    except (ValueError, OSError) as error:
        # Hours of measurement must not end for want of a baseline, which can be made later.
        _log.warning("%s: no baseline for inspections was made: %s", folder, error)
        return False
    return True


def _labels(labels: np.ndarray, saved: SavedClassifier, names: Any) -> np.ndarray:
    """Returns labels in the order of the logits: a classifier from elsewhere has its own."""
    if not saved.path:
        return labels
    return inspection.in_order_of_logits(saved.load(), labels, names)

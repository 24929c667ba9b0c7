"""What an audit leaves for inspections: a baseline of the classifier that is to be used."""

from __future__ import annotations

import logging
from typing import Any

import jax
import numpy as np

from robust_ssl import evaluation, inspection
from robust_ssl.experiment import train
from robust_ssl.experiment.attack import at_main_budget, attack
from robust_ssl.experiment.context import Context
from robust_ssl.types import Classifier

FOLDER = "baseline"
IMAGES = 512  # of the test split; the baseline holds them
_log = logging.getLogger(__name__)


def write_baseline(context: Context, model: Classifier) -> dict[str, Any] | None:
    """Writes a baseline into the working directory, unless it is there.

    Returns:
      Where the classifier and the baseline lie, from the working directory; None where there is no
      inspection, or the classifier has no directory that could be inspected.
    """
    folder, recipe = context.workdir / FOLDER, context.plan.recipes.get(context.plan.audit.secured)
    if recipe is not None and not recipe.is_trained:
        return None
    place = context.plan.audit.secured
    if recipe is not None:
        place = train.directory(recipe, context.plan.training.seeds[0])
        source: Any = context.workdir / place
    else:
        saved = context.plan.classifiers[place]
        place, source = saved.path or place, saved.path or model
    if not folder.is_dir() and jax.process_index() == 0 and not _write(context, source, folder):
        return None
    return {"model": place, "baseline": FOLDER}


def _write(context: Context, source: Any, folder: Any) -> bool:
    count = min(IMAGES, len(context.test))
    batch = context.test.read(np.arange(count))
    noise = {name for name, member in context.plan.suite.attacks.items() if member.is_noise}
    public = at_main_budget(context, attack(context))
    fitted = [one.perturbation for one in public if one.attack not in noise]
    images = np.asarray(evaluation.to_pixels(batch["images"]))
    try:
        inspection.baseline(source, images, context.test_labels[:count], fitted, folder)
    except (ValueError, OSError) as error:
        # Hours of measurement must not end for want of a baseline, which can be made later.
        _log.warning("%s: no baseline for inspections was made: %s", folder, error)
        return False
    return True

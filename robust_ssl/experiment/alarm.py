"""The alarm of one-step training: when it is looked at, and on how many images."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from robust_ssl import finetuning
from robust_ssl.experiment.recipe import Recipe

_log = logging.getLogger(__name__)

# Of a recipe that is not validated.  The illness takes accuracy under PGD to about zero, which so
# many images tell from the 10 % or more of before, at a tenth of an epoch's gradients.
IMAGES = 128


def takes_one_step(attack: Any) -> bool:
    """Whether it is an attack on single images with one gradient: these overfit to themselves."""
    gradients = getattr(attack, "gradient_evaluations", 0)
    return gradients == 1 and not isinstance(attack, finetuning.Adversary)


def looked_at(recipe: Recipe, validation: Any) -> Any:
    """Returns the validation images that the alarm of a recipe looks at.

    All, where each epoch is validated anyway; a few, where the last epoch is taken whatever it is.
    """
    few = recipe.best == "last" and len(validation) > IMAGES
    return validation.subset(IMAGES) if few else validation


def overfitted(
    lines: Iterable[Mapping[str, float]], images: int, name: str | None = None
) -> int | None:
    """Returns the epoch of catastrophic overfitting; None where there is none.

    Args:
      lines: Of ``metrics.jsonl``, in order.
      images: How many validation images were looked at.
      name: Of the stage, to warn of it at the epoch where it happens.
    """
    history: list[tuple[float, float]] = []
    for line in lines:
        if "validation_one_step_accuracy" in line:
            # Epochs without an attack are not looked at: before it is attacked it withstands none.
            before = int(line.get("epoch", len(history) + 1)) - 1 - len(history)
            history += before * [(0.0, 0.0)]
            pair = line["validation_one_step_accuracy"], line["validation_robust_accuracy"]
            history.append(pair)
    epoch = finetuning.overfitting_epoch(history, images=images) if history else None
    if name and epoch == len(history) > 0:
        _log.warning("%s: %s", name, finetuning.overfitting_warning(history, epoch))
    return epoch
